// Products of rows of words with a panel of 2 kLanes columns, which all convolutions but the
// gradient of conv3x3 end in: rows are transformed tiles of Winograd, positions with their
// neighbours, or outputs. No include guard: a kernel file includes it once per instruction set,
// after simd.h and dot.h.
//
// A word is 4 bytes of what is summed over: one value in float32, two in bfloat16 or int16 (0 for a
// second one that does not exist). kNative: has_avx512_bf16() in kernel.h.

namespace vqfast::VQFAST_ISA {
namespace {

constexpr int kWide = 2 * kLanes;             // columns of a panel and of a register tile
constexpr int kRows = kLanes == 16 ? 12 : 6;  // rows of a register tile
constexpr int64_t kChain = 64;                // words of one chain; its part of a panel fits L1

// [kLanes, kLanes] words -> transposed, n rows of it, kWide apart
inline void transpose(const int32_t* from, int64_t n, int32_t* to) {
  VI rows[kLanes], lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) rows[i] = load_int(from + i * kLanes);
#pragma GCC unroll 4
  for (int d = 1; d < kLanes; d *= 2) {
    // lanes d and more from the other row; kLanes + i is lane i of the second operand
    const VI low = (lane & d) ? lane - d + kLanes : lane,
             high = (lane & d) ? lane + kLanes : lane + d;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & d)) {
        const VI a = rows[i], b = rows[i + d];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + d] = __builtin_shuffle(a, b, high);
      }
  }
  for (int i = 0; i < n; ++i) __builtin_memcpy(to + i * kWide, &rows[i], sizeof(VI));
}

// m [kR, kWide] = v [kR, n of words] u [n, kWide], or += if add; of int16 each row times its scale.
// kAsks: with each word one line of memory is asked for. extra: scale [kR], or lines [n]. Every
// loop over the rows is unrolled by hand, the first one too: one that is not keeps the sums in
// memory.
template <class F, bool kNative, int kR, bool kAsks = false>
__attribute__((noinline)) void multiply(
    const int32_t* v, int64_t words, const int32_t* u, int64_t n, bool add, float* m,
    const std::conditional_t<kAsks, const void*, float>* extra) {
  constexpr bool kFixed = std::is_same_v<F, int16_t>;
  static_assert(!(kFixed && kAsks));
  using Sum = std::conditional_t<kFixed, VI, VF>;
  Sum low[kR], high[kR];
#pragma GCC unroll 12
  for (int r = 0; r < kR; ++r) low[r] = high[r] = Sum{};
  for (int64_t k = 0; k < n; ++k, ++v, u += kWide) {
    if constexpr (kAsks) __builtin_prefetch(extra[k]);
    const VI u0 = load_int(u), u1 = load_int(u + kLanes);
    const int32_t* row = v;
#pragma GCC unroll 12
    for (int r = 0; r < kR; ++r, row += words) {
      const VI each = every_lane(row);
      if constexpr (kFixed) {
        low[r] = dot2_int(low[r], u0, each);
        high[r] = dot2_int(high[r], u1, each);
      } else if constexpr (sizeof(F) == 2) {
        low[r] = dot2<kNative>(low[r], u0, each);
        high[r] = dot2<kNative>(high[r], u1, each);
      } else {
        low[r] = fma((VF)each, (VF)u0, low[r]);
        high[r] = fma((VF)each, (VF)u1, high[r]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kR; ++r) {
    float* to = m + r * kWide;
    VF left, right;
    if constexpr (kFixed) {
      left = __builtin_convertvector(low[r], VF) * extra[r];
      right = __builtin_convertvector(high[r], VF) * extra[r];
    } else {
      left = low[r];
      right = high[r];
    }
    store(to, add ? load(to) + left : left);
    store(to + kLanes, add ? load(to + kLanes) + right : right);
  }
}

// The same for any number of rows; what v holds in rows past `rows` is computed, never stored. The
// scales reach as far as v.
template <class F, bool kNative>
void multiply_rows(const int32_t* v, int64_t words, int64_t rows, const int32_t* u, int64_t n,
                   bool add, float* m, const float* scale = nullptr) {
  for (int64_t t = 0; t < rows; t += kRows, v += kRows * words, m += kRows * kWide) {
    const float* of = std::is_same_v<F, int16_t> ? scale + t : nullptr;
    if (rows - t <= kRows / 3)
      multiply<F, kNative, kRows / 3>(v, words, u, n, add, m, of);
    else if (rows - t <= kRows / 3 * 2)
      multiply<F, kNative, kRows / 3 * 2>(v, words, u, n, add, m, of);
    else
      multiply<F, kNative, kRows>(v, words, u, n, add, m, of);
  }
}

}  // namespace
}  // namespace vqfast::VQFAST_ISA
