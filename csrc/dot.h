// Products of small numbers that stand side by side in the 32 bits of a lane. No include guard: a
// kernel file includes it once per instruction set, after simd.h.
//
// Numerics: int8 and int16 products are added in int32, exactly, on every instruction set; it is for
//   the caller to keep the sums below 2^31. Two bfloat16
//   products are added to a float by vdpbf16ps where the CPU has it (no rounding between, subnormal
//   numbers are zero), by two multiply-adds elsewhere.
// Sums go by value: gcc keeps an array of sums in memory if assembler writes to its elements. And
//   assembler it is: gcc 12 copies the accumulator of the intrinsic of vpdpbusd in every call, and
//   vdpbf16ps belongs to no target that this project compiles for.

namespace vqfast::VQFAST_ISA {

// acc[i] + sum over j < 4 of (uint8) w[4 i + j] * (int8) x[j]; w and x hold 4 bytes a lane, x the
// same ones in each
VQFAST_INLINE VI dot4(VI acc, VI w, VI x) {
#if VQFAST_LANES == 16 && defined(VQFAST_VNNI)
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
#elif VQFAST_LANES == 16
  const __m512i low = _mm512_set1_epi16(0xFF), W = (__m512i)w, X = (__m512i)x;
  const __m512i even =
      _mm512_madd_epi16(_mm512_and_si512(W, low), _mm512_srai_epi16(_mm512_slli_epi16(X, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(W, 8), _mm512_srai_epi16(X, 8));
  return acc + (VI)_mm512_add_epi32(even, odd);
#elif VQFAST_LANES == 8
  const __m256i low = _mm256_set1_epi16(0xFF), W = (__m256i)w, X = (__m256i)x;
  const __m256i even =
      _mm256_madd_epi16(_mm256_and_si256(W, low), _mm256_srai_epi16(_mm256_slli_epi16(X, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(W, 8), _mm256_srai_epi16(X, 8));
  return acc + (VI)_mm256_add_epi32(even, odd);
#else
  return acc + (w & 255) * (x << 24 >> 24) + (w >> 8 & 255) * (x << 16 >> 24) +
         (w >> 16 & 255) * (x << 8 >> 24) + (w >> 24 & 255) * (x >> 24);
#endif
}

// acc[i] + w[2 i] * x[0] + w[2 i + 1] * x[1] in int16; w and x hold 2 values a lane
VQFAST_INLINE VI dot2_int(VI acc, VI w, VI x) {
#if VQFAST_LANES == 16 && defined(VQFAST_VNNI)
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
#elif VQFAST_LANES == 16
  return acc + (VI)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif VQFAST_LANES == 8
  return acc + (VI)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#elif defined(__SSE2__)
  return acc + (VI)_mm_madd_epi16((__m128i)w, (__m128i)x);
#else
  return acc + (w << 16 >> 16) * (x << 16 >> 16) + (w >> 16) * (x >> 16);
#endif
}

// acc[i] + w[2 i] * x[0] + w[2 i + 1] * x[1] in bfloat16; w and x hold 2 values a lane. kNative:
// has_avx512_bf16() in kernel.h.
template <bool kNative>
VQFAST_INLINE VF dot2(VF acc, VI w, VI x) {
#if VQFAST_LANES == 16
  if constexpr (kNative) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
  }
#endif
  const int32_t high = static_cast<int32_t>(0xFFFF0000u);
  acc = fma((VF)(w << 16), (VF)(x << 16), acc);
  return fma((VF)(w & high), (VF)(x & high), acc);
}

// low and high rounded to bfloat16, to nearest even, side by side in each lane
template <bool kNative>
VQFAST_INLINE VI pair(VF low, VF high) {
#if VQFAST_LANES == 16
  if constexpr (kNative) {
    __m512i halves;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(halves) : "v"(high), "v"(low));
    VI order;
    for (int i = 0; i < 16; ++i) order[i] = i | (16 + i) << 16;
    return (VI)_mm512_permutexvar_epi16((__m512i)order, halves);
  }
#endif
  const auto rounded = [](VF v) __attribute__((always_inline)) {
    const VI bits = (VI)v;  // NaN stays NaN
    return (v != v) ? (bits | 0x400000) : bits + 0x7FFF + ((bits >> 16) & 1);
  };
  return (rounded(low) >> 16 & 0xFFFF) | (rounded(high) & static_cast<int32_t>(0xFFFF0000u));
}

VQFAST_INLINE VI load_int(const void* p) {
  VI v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

VQFAST_INLINE VI every_lane(const void* p) {  // 4 bytes
  int32_t x;
  __builtin_memcpy(&x, p, sizeof x);
  return broadcast_int(x);
}

}  // namespace vqfast::VQFAST_ISA
