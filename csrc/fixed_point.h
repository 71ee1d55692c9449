// Factors of a sum of products in int16, of which the sum in int32 is exact. No include guard: a
// kernel file includes it once per instruction set, after simd.h and large_pages.h.
//
// Numerics: for rounded factors a and b, |sum a b| <= |a| |b| (Cauchy and Schwarz) < 2^31, as their
//   norms stay below kInputNorm + 6 and kWeightNorm + 6 (6 is half the root of the 128 terms: what
//   rounding adds). So 128 equal terms have 12 to 13 bits each, where bfloat16 has 8, and the error
//   is relative to the largest terms of the sum, not to each one. Channels are balanced by their
//   weights, so that a large input that meets small weights does not push the others out (for sums
//   over tiles: the tiles). NaN and infinities: the factor, and with it the whole sum, is not
//   finite.

namespace vqfast::VQFAST_ISA {
namespace {

constexpr float kInputNorm = 32750, kWeightNorm = 65500;
constexpr float kLargestInt = 32767;
constexpr float kLargestFactor = 0x1p125f;  // its reciprocal is a normal number

// to nearest, ties to even; saturating, or anything for NaN
VQFAST_INLINE void store_int16(int16_t* p, VF v, int n) {
#if VQFAST_LANES == 16
  const __m256i rounded = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)v));
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1u), rounded);
#else
  const VF magic = broadcast(12582912.0f);  // the float that has no fraction bits left
  const VI rounded =
      (VI)(vmin(vmax(v, broadcast(-kLargestInt)), broadcast(kLargestInt)) + magic) - (VI)magic;
  int16_t narrow[kLanes];
  for (int i = 0; i < kLanes; ++i) narrow[i] = static_cast<int16_t>(rounded[i]);
  __builtin_memcpy(p, narrow, sizeof(int16_t) * n);
#endif
}

// two int16 in each lane, low and high, to nearest even; anything for NaN
VQFAST_INLINE VI int16_pair(VF low, VF high) {
#if VQFAST_LANES == 16
  const __m512i l = _mm512_cvtps_epi32((__m512)low), h = _mm512_cvtps_epi32((__m512)high);
  return (VI)_mm512_mask_blend_epi16(0xAAAAAAAA, l, _mm512_slli_epi32(h, 16));
#elif VQFAST_LANES == 8
  const __m256i l = _mm256_cvtps_epi32((__m256)low), h = _mm256_cvtps_epi32((__m256)high);
  return (VI)_mm256_blend_epi16(l, _mm256_slli_epi32(h, 16), 0xAA);
#else
  const VF magic = broadcast(12582912.0f);  // the float that has no fraction bits left
  return (((VI)(low + magic) - (VI)magic) & 0xFFFF) | ((VI)(high + magic) - (VI)magic) << 16;
#endif
}

VQFAST_INLINE VF total(VF v) {  // the sum of all lanes, in each
  VI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int d = kLanes / 2; d > 0; d /= 2) v += __builtin_shuffle(v, lane ^ d);
  return v;
}

// The largest sum of squares of a row of v [rows, width], of any magnitude; NaN if one is.
inline double largest_square(const float* v, int64_t rows, int64_t stride, int64_t width) {
  double most = 0;
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += double{v[r * stride + i]} * v[r * stride + i];
    if (sum != sum) return sum;
    most = std::max(most, sum);
  }
  return most;
}

// What brings the norm of every row of v [rows, width] to `norm` or less, and its values to 32767;
// width: a multiple of kLanes.
template <int rows>
float bounding_factor(const float* v, int64_t stride, int64_t width, float norm) {
  VF most{}, all{}, largest{};
  for (int r = 0; r < rows; ++r) {
    VF sum{};
    for (int64_t i = 0; i < width; i += kLanes) {
      const VF each = load(v + r * stride + i);
      sum = fma(each, each, sum);
      if (norm > kLargestInt) largest = vmax((VF)((VI)each & 0x7FFFFFFF), largest);
    }
    sum = total(sum);
    most = vmax(sum, most);
    all += sum;
  }
  double square = most[0];
  if (!(all[0] < 1e30f && square > 1e-24)) square = largest_square(v, rows, stride, width);
  double factor = norm / std::sqrt(square);
  if (norm > kLargestInt) factor = std::min(factor, double{kLargestInt} / reduce_max(largest));
  return factor > kLargestFactor ? kLargestFactor : static_cast<float>(factor);
}

// The bits of the largest magnitude of n bfloat16 values from each of `count` places; kInfinity or
// more: one is not finite.
constexpr int kInfinity = 0x7F80;
inline int largest_bits(const bf16* const* from, int count, int64_t n) {
  typedef int16_t Words __attribute__((vector_size(4 * kLanes)));
  Words most{};
  int largest = 0;
  for (int k = 0; k < count; ++k) {
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      Words each;
      __builtin_memcpy(&each, from[k] + i, sizeof each);
      each &= 0x7FFF;
      most = each > most ? each : most;
    }
    for (; i < n; ++i) largest = std::max<int>(largest, from[k][i].bits & 0x7FFF);
  }
  for (int i = 0; i < 2 * kLanes; ++i) largest = std::max<int>(largest, most[i]);
  return largest;
}

// What brings the norm of each lane of v [n, kLanes] to kInputNorm or less; n: a multiple of 4.
VQFAST_INLINE VF bounding_factors(const float* v, int64_t n) {
  // the sum of (v scale)^2
  const auto squares = [&](VF scale) __attribute__((always_inline)) {
    VF sums[4] = {};
    for (int64_t i = 0; i < n; i += 4)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const VF each = load(v + (i + k) * kLanes) * scale;
        sums[k] = fma(each, each, sums[k]);
      }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  };
  VF scale = broadcast(1), square = squares(scale);
  const VI fits = (square < broadcast(1e30f)) & (square > broadcast(1e-24f));
  int32_t all = -1;
  for (int i = 0; i < kLanes; ++i) all &= fits[i];
  if (!all) {  // the same of values about 1
    VF largest = broadcast(1 / kLargestFactor);
    for (int64_t i = 0; i < n; ++i)
      largest = vmax((VF)((VI)load(v + i * kLanes) & 0x7FFFFFFF), largest);
    scale = 1.0f / vmin(largest, broadcast(kLargestFactor));
    square = squares(scale);
  }
  VF root;
  for (int i = 0; i < kLanes; ++i) root[i] = std::sqrt(square[i]);
  return vmin(broadcast(kLargestFactor), kInputNorm / root * scale);  // NaN stays
}

// How int16 factors are scaled: inputs by `channel`, weights by its reciprocal and, per output, by
// `output`. [C] are padded to whole vectors.
struct Balance {
  Scratch<float> channel, inverse, output;

  // from w [rows, C]; a channel's factor is the size of its weights, 1 that of the largest
  template <class T>
  void channels(const T* w, int64_t rows, int64_t C) {
    const int64_t padded = (C + kLanes - 1) / kLanes * kLanes;
    channel = scratch<float>(padded);
    inverse = scratch<float>(padded);
    float most = 0;
    for (int64_t c = 0; c < padded; c += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, C - c));
      const VF infinity = broadcast(__builtin_inff());
      VF size{};
      for (int64_t r = 0; r < rows; ++r) {
        const VF each = (VF)((VI)load_n(w + r * C + c, n) & 0x7FFFFFFF);
        size = select(each < infinity, vmax(each, size), size);
      }
      store(channel.get() + c, size);
      most = std::max(most, reduce_max(size));
    }
    for (int64_t c = 0; c < padded; ++c) {
      const float size = most > 0 ? std::max(channel[c] / most, 1e-30f) : 1;
      channel[c] = size;
      inverse[c] = 1 / size;
    }
  }
};

}  // namespace
}  // namespace vqfast::VQFAST_ISA
