// Pairs of bfloat16 in the 32 bits of a lane, the operands of vdpbf16ps: a step of a product takes
// two elements of the sum. For the attention kernels. No include guard: a kernel file includes it
// once per instruction set, after attend.h and tiled_attention.h.
//
// A vector of pairs travels as VF. Only lanes of 512 bits have them; whether the CPU does is
// has_avx512_bf16() in kernel.h.

namespace vqfast::VQFAST_ISA::attention {

// The first element of each pair, and zero.
VQFAST_INLINE VF first_of_pair(VF x) { return (VF)((VI)x & 0xFFFF); }

// The rest is defined for lanes of 512 bits only, and declared for the branches not taken.
VF round_both(VF a, VF b);
VF interleave(VF both);
VF round_pair(VF a, VF b);
void store_halves(float* a, float* b, VF both);
void write_row_rounded(const View& out, int64_t row, const float* src, float factor);
VF add_pair(VF sum, VF pair);
VF pair_dots(const Head& a, const Head& b, int64_t begin, int64_t n);
void pack_row_pairs(const Head& x, int64_t begin, int64_t n, int64_t padded, float* dst, int ld);
void pack_transposed_pairs(const Head& x, int64_t begin, int64_t n, int64_t padded, float* dst,
                           int64_t ld);
void pack_pairs_of_rows(const Head& x, int64_t begin, int64_t n, float* dst, int ld);

#if VQFAST_LANES == 16

// The 16 of a, then the 16 of b, rounded to nearest even.
VQFAST_INLINE VF round_both(VF a, VF b) {
  __m512i both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(b), "v"(a));
  return (VF)both;
}

// (a, b) of each lane, from round_both.
VQFAST_INLINE VF interleave(VF both) {
  const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (VF)_mm512_permutexvar_epi16(turns, (__m512i)both);
}

// (a, b) of each lane, rounded to nearest even.
VQFAST_INLINE VF round_pair(VF a, VF b) { return interleave(round_both(a, b)); }

// From round_both: a's and b's numbers in pairs of neighbours, 8 each.
VQFAST_INLINE void store_halves(float* a, float* b, VF both) {
  _mm256_storeu_si256((__m256i*)a, _mm512_castsi512_si256((__m512i)both));
  _mm256_storeu_si256((__m256i*)b, _mm512_extracti64x4_epi64((__m512i)both, 1));
}

// d elements of src times `factor`, at `row` of the contiguous bfloat16 output [B, H, T, d].
inline void write_row_rounded(const View& out, int64_t row, const float* src, float factor) {
  const int d = static_cast<int>(out.shape[3]);
  bf16* dst = out.as<bf16>() + row * d;
  for (int t = 0; t < d; t += 2 * kLanes) {
    const int n = std::min(d - t, 2 * kLanes);
    const VF a = load(src + t), b = n > kLanes ? load(src + t + kLanes) : VF{};
    _mm512_mask_storeu_epi16(dst + t, n == 2 * kLanes ? ~0u : (1u << n) - 1u,
                             (__m512i)round_both(a * factor, b * factor));
  }
}

// sum + both elements of each pair.
VQFAST_INLINE VF add_pair(VF sum, VF pair) {
  return multiply_add<true>(pair, (VF)(VI{} + 0x3F803F80), sum);
}

// Elements [2 t, 2 t + 2 kLanes) of a row, zeros from d on.
VQFAST_INLINE VF load_pairs(const bf16* row, int64_t col, int t, int d) {
  const int n = std::min(d - 2 * t, 2 * kLanes);
  if (n <= 0) return VF{};
  if (col == 1) return (VF)_mm512_maskz_loadu_epi16(n == 32 ? ~0u : (1u << n) - 1u, row + 2 * t);
  uint16_t x[2 * kLanes] = {};
  for (int i = 0; i < n; ++i) x[i] = row[(2 * t + i) * col].bits;
  VF v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

// lane i = <row begin + i of a, the same of b>; lanes from n on hold no sense.
inline VF pair_dots(const Head& a, const Head& b, int64_t begin, int64_t n) {
  const bf16 *x = static_cast<const bf16*>(a.data), *y = static_cast<const bf16*>(b.data);
  VF part[kLanes] = {};
  for (int64_t i = 0; i < std::min<int64_t>(n, kLanes); ++i)
    for (int t = 0; 2 * t < a.d; t += kLanes)
      part[i] = multiply_add<true>(load_pairs(x + (begin + i) * a.row, a.col, t, a.d),
                                   load_pairs(y + (begin + i) * b.row, b.col, t, b.d), part[i]);
  return add_across<kLanes>(part);
}

// dst [padded][ld]: rows [begin, begin + n) in pairs along d, zeros up to `padded` rows and ld
// pairs.
inline void pack_row_pairs(const Head& x, int64_t begin, int64_t n, int64_t padded, float* dst,
                           int ld) {
  const bf16* data = static_cast<const bf16*>(x.data);
  for (int64_t i = 0; i < n; ++i)
    for (int t = 0; t < ld; t += kLanes)
      store(dst + i * ld + t, load_pairs(data + (begin + i) * x.row, x.col, t, x.d));
  std::fill(dst + n * ld, dst + padded * ld, 0.0f);
}

// dst [round_up(pairs of d, kLanes)][ld]: column j is row begin + j in pairs along d, zero columns
// from n up to `padded`.
inline void pack_transposed_pairs(const Head& x, int64_t begin, int64_t n, int64_t padded,
                                  float* dst, int64_t ld) {
  const bf16* data = static_cast<const bf16*>(x.data);
  for (int64_t j = 0; j < padded; j += kLanes)
    for (int t = 0; 2 * t < x.d; t += kLanes) {
      VF m[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        m[i] = j + i < n ? load_pairs(data + (begin + j + i) * x.row, x.col, t, x.d) : VF{};
      transpose(m);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(dst + (t + i) * ld + j, m[i]);
    }
}

// dst [(n + 1) / 2][ld]: lane c of row u pairs element c of rows begin + 2 u and begin + 2 u + 1;
// zeros past n rows and d columns.
inline void pack_pairs_of_rows(const Head& x, int64_t begin, int64_t n, float* dst, int ld) {
  const bf16* data = static_cast<const bf16*>(x.data);
  __m512i low, high;
  {
    uint16_t index[64];
    for (int i = 0; i < 64; ++i) index[i] = static_cast<uint16_t>(i / 2 + (i & 1) * 32);
    __builtin_memcpy(&low, index, 64);
    __builtin_memcpy(&high, index + 32, 64);
  }
  for (int64_t i = 0; i < n; i += 2)
    for (int t = 0; t < ld; t += 2 * kLanes) {
      const bf16* row = data + (begin + i) * x.row;
      const __m512i a = (__m512i)load_pairs(row, x.col, t / 2, x.d);
      const __m512i b = i + 1 < n ? (__m512i)load_pairs(row + x.row, x.col, t / 2, x.d) : __m512i{};
      float* to = dst + i / 2 * ld + t;
      store(to, (VF)_mm512_permutex2var_epi16(a, low, b));
      if (t + kLanes < ld) store(to + kLanes, (VF)_mm512_permutex2var_epi16(a, high, b));
    }
}

#endif

}  // namespace vqfast::VQFAST_ISA::attention
