// Vectors of VQFAST_LANES floats (16, 8 or 4) for the instruction set being compiled; see
// foreach_isa.h.
// GCC vector types give + - * / and comparisons on every target; what they lack is below. A fused
// multiply-add is written out as fma(); `base` rounds the product. Nothing here reads or writes
// past the n elements that it is given.
#if !defined(VQFAST_SIMD_FOR_VNNI) && defined(VQFAST_VNNI)
#define VQFAST_SIMD_FOR_VNNI
#define VQFAST_SIMD_NOW 1
#elif !defined(VQFAST_SIMD_FOR_512) && VQFAST_LANES == 16 && !defined(VQFAST_VNNI)
#define VQFAST_SIMD_FOR_512
#define VQFAST_SIMD_NOW 1
#elif !defined(VQFAST_SIMD_FOR_256) && VQFAST_LANES == 8
#define VQFAST_SIMD_FOR_256
#define VQFAST_SIMD_NOW 1
#elif !defined(VQFAST_SIMD_FOR_128) && VQFAST_LANES == 4
#define VQFAST_SIMD_FOR_128
#define VQFAST_SIMD_NOW 1
#endif

#ifdef VQFAST_SIMD_NOW
#undef VQFAST_SIMD_NOW

#include "half.h"

namespace vqfast::VQFAST_ISA {

#define VQFAST_INLINE inline __attribute__((always_inline))

constexpr int kLanes = VQFAST_LANES;
typedef float VF __attribute__((vector_size(VQFAST_LANES * 4)));
typedef int32_t VI __attribute__((vector_size(VQFAST_LANES * 4)));

// minus zero is free; plus zero would be an addition, as it changes the sign of -0
VQFAST_INLINE VF broadcast(float x) { return x - VF{}; }
VQFAST_INLINE VI broadcast_int(int32_t x) { return VI{} + x; }

VQFAST_INLINE VF load(const float* p) {
  VF v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
VQFAST_INLINE void store(float* p, VF v) { __builtin_memcpy(p, &v, sizeof v); }

// the first n lanes (0 <= n <= kLanes, of which >= tells gcc); the others are `other`, or are not
// written
VQFAST_INLINE VF load_n(const float* p, int n, float other = 0.0f) {
#if VQFAST_LANES == 16
  return (VF)_mm512_mask_loadu_ps((__m512)broadcast(other), (__mmask16)((1u << n) - 1u), p);
#else
  if (n >= kLanes) return load(p);
  VF v = broadcast(other);
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
VQFAST_INLINE void store_n(float* p, VF v, int n) {
#if VQFAST_LANES == 16
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), (__m512)v);
#else
  if (n >= kLanes) return store(p, v);
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

VQFAST_INLINE VF fma(VF a, VF b, VF c) {  // a * b + c
#if VQFAST_LANES == 16
  return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VQFAST_LANES == 8
  return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

VQFAST_INLINE VF select(VI mask, VF a, VF b) {  // mask lanes are 0 or -1
  return (VF)(((VI)a & mask) | ((VI)b & ~mask));
}
VQFAST_INLINE VF vmax(VF a, VF b) { return select(a > b, a, b); }  // b where either is NaN
VQFAST_INLINE VF vmin(VF a, VF b) { return select(a < b, a, b); }

VQFAST_INLINE float reduce_add(VF v) {  // pairwise, one order on a given number of lanes
  float x[kLanes];
  store(x, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}
VQFAST_INLINE float reduce_max(VF v) {
  float x[kLanes];
  store(x, v);
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
VQFAST_INLINE float reduce_min(VF v) { return -reduce_max(-v); }

// ---- half precision in memory, float in registers
VQFAST_INLINE VF load(const f16* p) {
#if VQFAST_LANES == 16
  return (VF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif VQFAST_LANES == 8
  return (VF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  VF v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
VQFAST_INLINE VF load(const bf16* p) {
  VI v;
#if VQFAST_LANES == 16
  v = (VI)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif VQFAST_LANES == 8
  v = (VI)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  for (int i = 0; i < kLanes; ++i) v[i] = p[i].bits;
#endif
  return (VF)(v << 16);
}
template <class T>
VQFAST_INLINE VF load_n(const T* p, int n, float other = 0.0f) {
  if (n >= kLanes) return load(p);
  VF v = broadcast(other);
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}
VQFAST_INLINE void store(f16* p, VF v) {
#if VQFAST_LANES == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif VQFAST_LANES == 8
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<f16>(v[i]);
#endif
}
VQFAST_INLINE void store(bf16* p, VF v) {
  const VI bits = (VI)v;  // round to nearest even; NaN stays NaN
  const VI rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const VI out = (v != v) ? ((bits >> 16) | 0x40) : rounded;
#if VQFAST_LANES == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)out));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = (uint16_t)out[i];
#endif
}
template <class T>
VQFAST_INLINE void store_n(T* p, VF v, int n) {
  if (n >= kLanes) return store(p, v);
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
}

// e^x, relative error < 2e-7 (checked in tests/test_simd.py); 0 below -87.33, infinity above 88.72,
// NaN stays
VQFAST_INLINE VF vexp(VF x) {
  const VF low = broadcast(-87.33654f), high = broadcast(88.72283f);
#if VQFAST_LANES == 16
  // the operands of min and max stand so that a NaN stays
  const VF c = (VF)_mm512_min_ps((__m512)high + 1.0f, _mm512_max_ps((__m512)low, (__m512)x));
  const VF n = (VF)_mm512_roundscale_ps((__m512)(c * 1.44269504f), _MM_FROUND_NO_EXC);
#else
  VF c = select(x < low, low, x);
  c = select(c > high, high, c);
  // n = round(x / ln 2), through the float that has no fraction bits left
  const VF magic = broadcast(12582912.0f);
  const VF n = fma(c, broadcast(1.44269504f), magic) - magic;
#endif
  VF r = fma(n, broadcast(-0.693359375f), c);
  r = fma(n, broadcast(2.12194440e-4f), r);
  VF p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p * r, r, r) + 1.0f;
#if VQFAST_LANES == 16
  // times 2^n, which gives infinity where it must
  const __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
  return (VF)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)n);
#else
  // times 2^n in two steps, as n may be 128
  VI k = __builtin_convertvector(n, VI);
  const VI half = k >> 1;
  p = p * (VF)((half + 127) << 23) * (VF)((k - half + 127) << 23);
  p = select(x < low, VF{}, p);
  p = select(x > high, broadcast(__builtin_inff()), p);
  return (x != x) ? x : p;
#endif
}

}  // namespace vqfast::VQFAST_ISA
#endif
