// Factors of a sum of products in int16, of which the sum in int32 is exact. No include guard: a
// kernel file includes it once per instruction set, after simd.h and large_pages.h.
//
// Numerics: for rounded factors a and b, |sum a b| <= |a| |b| (Cauchy and Schwarz) < 2^31, as their
//   norms stay below kInputNorm + 6 and kWeightNorm + 6 (6 is half the root of the 128 terms: what
//   rounding adds). So 128 equal terms have 12 to 13 bits each, where bfloat16 has 8, and the error
//   is relative to the largest terms of the sum, not to each one. Channels are balanced by their
//   weights, so that a large input that meets small weights does not push the others out. NaN and
//   infinities: the factor, and with it the whole sum, is not finite.

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
