// Register tiles and packing that both attention kernels are made of. Included once per instruction
// set, after simd.h.
//
// Blocks of q, k, v and of the upstream gradient are packed into float32 scratch, padded with zeros
// to whole vectors and whole tiles of kRows rows; everything after that is `product` on packed
// blocks.
//
// A tile keeps kRows x kVecs vectors in registers: 6 x 4 of 32 with AVX-512, 6 x 2 of 16 otherwise;
// a step loads kVecs vectors and broadcasts kRows floats for kRows * kVecs multiply-adds.
//
// The causal diagonal is a triangle inside a tile, unrolled at compile time: a slot of the future
// is not multiplied by zero, it is not read. So NaN there cannot leak, and no multiplication is
// spent on it.

#include "simd.h"
// clang-format off: dot.h needs simd.h
#include "dot.h"
// clang-format on

namespace vqfast::VQFAST_ISA::attention {

constexpr int kRows = 6;
constexpr int kVecs = VQFAST_LANES == 16 ? 4 : 2;

template <class Int>
constexpr Int round_up(Int n, Int to) {
  return (n + to - 1) / to * to;
}

// Floats from row to row of a packed block: rows of `width` a multiple of 1 KiB apart would share
// sets of the cache.
constexpr int padded_stride(int width) { return width % 256 == 0 ? width + kLanes : width; }

// 2^x for x <= 0 (up to rounding); 0 below -126, NaN stays. Relative error below 3e-9 (degree 6) or
// 4e-6 (degree 4) and the roundings; least-squares fit on [-1/2, 1/2], exact at 0.
template <int kDegree>
VQFAST_INLINE VF exp2_nonpositive(VF x) {
  const VF low = broadcast(-126.0f);
#if VQFAST_LANES == 16
  const VF c = (VF)_mm512_max_ps((__m512)low, (__m512)x);  // in this order a NaN stays
  const VF n = (VF)_mm512_roundscale_ps((__m512)c, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VF c = x < low ? low : x;
  const VF magic = broadcast(12582912.0f);
  const VF n = c + magic - magic;
#endif
  const VF r = c - n;
  VF p;
  if constexpr (kDegree == 4) {
    p = fma(broadcast(9.600395337e-03f), r, broadcast(5.591689423e-02f));
    p = fma(p, r, broadcast(2.402371913e-01f));
    p = fma(p, r, broadcast(6.931219697e-01f));
  } else {
    p = fma(broadcast(1.537070493e-04f), r, broadcast(1.339984825e-03f));
    p = fma(p, r, broadcast(9.618373588e-03f));
    p = fma(p, r, broadcast(5.550329015e-02f));
    p = fma(p, r, broadcast(2.402264774e-01f));
    p = fma(p, r, broadcast(6.931471825e-01f));
  }
  p = fma(p, r, broadcast(1.0f));
#if VQFAST_LANES == 16
  const __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
  return (VF)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)n);
#else
  p = p * (VF)((__builtin_convertvector(n, VI) + 127) << 23);
  return x < low ? VF{} : p;
#endif
}

// x * y + acc; kPairs: of pairs of bfloat16 (tiled_pairs.h), the sum of both products of each lane.
template <bool kPairs>
VQFAST_INLINE VF multiply_add(VF x, VF y, VF acc) {
  if constexpr (kPairs) return dot2<true>(acc, (VI)x, (VI)y);
  return fma(x, y, acc);
}

// ---- c[r][:] += sum_t a(r, t) b[t][:] for kRows rows --------------------------------------------

// How a(r, t) lies in memory: a[r * lda + t], or a[t * lda + r].
enum class Walk { kAlongRow, kDownColumn };
// Which terms of the sum a row takes. kAll: t in [0, n). kFirst: t in [0, n + r], the last kRows
// terms being the diagonal. kFrom: t in [r, n), the first kRows terms being the diagonal. With
// pairs a step holds terms 2 t and 2 t + 1, and n is even.
enum class Steps { kAll, kFirst, kFrom };

// The half of a pair that a row takes from a step, as bits.
constexpr int32_t kFirstOfPair = 0xFFFF, kSecondOfPair = -0x10000;

// The step for rows [r_begin, r_end); half: row `r_half` of them takes only that half of the pair.
template <int NV, Walk W, bool kPairs>
VQFAST_INLINE void step(const float* a, int64_t lda, int64_t t, const float* b, int r_begin,
                        int r_end, VF (&acc)[kRows][NV], int r_half = -1, int32_t half = 0) {
  VF bv[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) bv[v] = load(b + v * kLanes);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (r < r_begin || r >= r_end) continue;
    VF x = broadcast(W == Walk::kAlongRow ? a[r * lda + t] : a[t * lda + r]);
    if (r == r_half) x = (VF)((VI)x & half);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const VF y = r == r_half ? (VF)((VI)bv[v] & half) : bv[v];
      acc[r][v] = multiply_add<kPairs>(x, y, acc[r][v]);
    }
  }
}

template <int NV, Walk W, Steps S, bool kPairs>
void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t n, float* c,
          int64_t ldc, bool fresh) {
  constexpr int kDiagonal = kPairs ? kRows / 2 : kRows;  // steps
  VF acc[kRows][NV] = {};
  const int64_t steps = kPairs ? n / 2 : n;
  int64_t t = 0;
  if (S == Steps::kFrom) {
#pragma GCC unroll 8
    for (int i = 0; i < kDiagonal; ++i) {
      if (kPairs)
        step<NV, W, kPairs>(a, lda, i, b + i * ldb, 0, 2 * i + 2, acc, 2 * i + 1, kSecondOfPair);
      else
        step<NV, W, kPairs>(a, lda, i, b + i * ldb, 0, i + 1, acc);
    }
    t = kDiagonal;
  }
  for (; t < steps; ++t) step<NV, W, kPairs>(a, lda, t, b + t * ldb, 0, kRows, acc);
  if (S == Steps::kFirst) {
#pragma GCC unroll 8
    for (int i = 0; i < kDiagonal; ++i) {
      const float* row = b + (steps + i) * ldb;
      if (kPairs)
        step<NV, W, kPairs>(a, lda, steps + i, row, 2 * i, kRows, acc, 2 * i, kFirstOfPair);
      else
        step<NV, W, kPairs>(a, lda, steps + i, row, i, kRows, acc);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      float* at = c + r * ldc + v * kLanes;
      store(at, fresh ? acc[r][v] : load(at) + acc[r][v]);
    }
}

// All `columns` of b and c, a multiple of kLanes; fresh: what c held does not count.
template <Walk W, Steps S, bool kPairs = false>
void product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t n, float* c,
             int64_t ldc, int columns, bool fresh = false) {
  int vectors = columns / kLanes;
  while (vectors > 0) {
    // five vectors go as 3 + 2: a tile one vector wide would wait for its loads
    const int take =
        vectors >= 2 * kVecs || vectors <= kVecs ? std::min(vectors, kVecs) : (vectors + 1) / 2;
    if (take == 1) tile<1, W, S, kPairs>(a, lda, b, ldb, n, c, ldc, fresh);
    if (take == 2) tile<2, W, S, kPairs>(a, lda, b, ldb, n, c, ldc, fresh);
    if constexpr (kVecs == 4) {
      if (take == 3) tile<3, W, S, kPairs>(a, lda, b, ldb, n, c, ldc, fresh);
      if (take == 4) tile<4, W, S, kPairs>(a, lda, b, ldb, n, c, ldc, fresh);
    }
    b += take * kLanes;
    c += take * kLanes;
    vectors -= take;
  }
}

// c[r][j] = <row r of a, column j of b> over `steps` elements or pairs, both packed. The sum goes
// in pieces of kPiece: the error of one long chain would grow with d. Scores of forward and
// backward are added in the same order from the same numbers, so that a score is off by the same in
// weight and lse.
constexpr int kPiece = 64;

template <bool kPairs = false>
void dot_products(const float* a, int64_t lda, const float* b, int64_t ldb, int steps, float* c,
                  int64_t ldc, int columns) {
  for (int t = 0; t < steps; t += kPiece)
    product<Walk::kAlongRow, Steps::kAll, kPairs>(a + t, lda, b + t * ldb, ldb,
                                                  std::min(kPiece, steps - t) * (kPairs ? 2 : 1), c,
                                                  ldc, columns, t == 0);
}

// c[j] = <column j of a, column j of b>, rounded exactly as dot_products does.
inline void column_dots(const float* a, const float* b, int64_t ld, int d, float* c, int columns) {
  for (int j = 0; j < columns; j += kLanes) {
    VF total{};
    for (int t = 0; t < d; t += kPiece) {
      VF sum{};
      for (int i = t; i < std::min(d, t + kPiece); ++i)
        sum = fma(load(a + i * ld + j), load(b + i * ld + j), sum);
      total += sum;
    }
    store(c + j, total);
  }
}

// ---- packing ------------------------------------------------------------------------------------

// One (batch, head) of a [B, H, T, d] view.
struct Head {
  const void* data;
  DType dtype;
  int64_t row, col;  // strides in elements
  int d;
};

inline Head head_of(const View& x, int64_t b, int64_t h) {
  const int64_t offset = b * x.stride[0] + h * x.stride[1];
  const int size = x.dtype == DType::f32 ? 4 : 2;
  return {x.as<char>() + offset * size, x.dtype, x.stride[2], x.stride[3],
          static_cast<int>(x.shape[3])};
}

// Calls f with the head's data as a pointer to its type.
template <class F>
VQFAST_INLINE void with_type(const Head& x, F&& f) {
  if (x.dtype == DType::f32) f(static_cast<const float*>(x.data));
  if (x.dtype == DType::f16) f(static_cast<const f16*>(x.data));
  if (x.dtype == DType::bf16) f(static_cast<const bf16*>(x.data));
}

// Up to kLanes elements of a row from column t on; zeros in the other lanes.
template <class T>
VQFAST_INLINE VF load_piece(const T* row, int64_t col, int t, int d) {
  const int n = d - t < kLanes ? d - t : kLanes;
  if (n <= 0) return VF{};
  if (col == 1) return load_n(row + t, n);
  VF v{};
  for (int i = 0; i < n; ++i) v[i] = to_float(row[(t + i) * col]);
  return v;
}

// dst [padded][ld]: rows [begin, begin + n) times `factor`, zeros up to `padded` rows and ld
// columns.
inline void pack_rows(const Head& x, int64_t begin, int64_t n, int64_t padded, float factor,
                      float* dst, int ld) {
  with_type(x, [&](const auto* data) {
    for (int64_t i = 0; i < n; ++i)
      for (int t = 0; t < ld; t += kLanes)
        store(dst + i * ld + t, load_piece(data + (begin + i) * x.row, x.col, t, x.d) * factor);
  });
  std::fill(dst + n * ld, dst + padded * ld, 0.0f);
}

template <int Swap>
VQFAST_INLINE void exchange(VF& a, VF& b) {
  // swaps the lanes of a that have bit Swap with the lanes of b that lack it
  VI first, second;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    first[i] = i & Swap ? kLanes + i - Swap : i;
    second[i] = i & Swap ? kLanes + i : i + Swap;
  }
#ifdef __clang__
  VF x, y;
  for (int i = 0; i < kLanes; ++i) {
    x[i] = first[i] < kLanes ? a[first[i]] : b[first[i] - kLanes];
    y[i] = second[i] < kLanes ? a[second[i]] : b[second[i] - kLanes];
  }
#else
  const VF x = __builtin_shuffle(a, b, first), y = __builtin_shuffle(a, b, second);
#endif
  a = x;
  b = y;
}

template <int Swap>
VQFAST_INLINE void transpose_step(VF (&m)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & Swap)) exchange<Swap>(m[i], m[i + Swap]);
}

VQFAST_INLINE void transpose(VF (&m)[kLanes]) {
  transpose_step<1>(m);
  transpose_step<2>(m);
  if constexpr (kLanes >= 8) transpose_step<4>(m);
  if constexpr (kLanes >= 16) transpose_step<8>(m);
}

// dst [round_up(d, kLanes)][ld]: column j is row begin + j; zero columns from n up to a whole
// vector of `padded`.
inline void pack_transposed(const Head& x, int64_t begin, int64_t n, int64_t padded, float* dst,
                            int64_t ld) {
  with_type(x, [&](const auto* data) {
    for (int64_t j = 0; j < padded; j += kLanes)
      for (int t = 0; t < x.d; t += kLanes) {
        VF m[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          m[i] = j + i < n ? load_piece(data + (begin + j + i) * x.row, x.col, t, x.d) : VF{};
        transpose(m);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(dst + (t + i) * ld + j, m[i]);
      }
  });
}

// f of d elements of src, rounded to the type of the contiguous [B, H, T, d] output, at `row` of
// it.
template <class F>
void write_row(const View& out, int64_t row, const float* src, F&& f) {
  const int d = static_cast<int>(out.shape[3]);
  const auto write = [&](auto* dst) {
    for (int t = 0; t < d; t += kLanes)
      store_n(dst + row * d + t, f(load(src + t)), std::min(kLanes, d - t));
  };
  if (out.dtype == DType::f32) write(out.as<float>());
  if (out.dtype == DType::f16) write(out.as<f16>());
  if (out.dtype == DType::bf16) write(out.as<bf16>());
}

// Heavy and light of n pieces in turn (0, n-1, 1, n-2, ...): a contiguous share of them is a fair
// one.
VQFAST_INLINE int64_t fold(int64_t i, int64_t n) { return i % 2 ? n - 1 - i / 2 : i / 2; }

}  // namespace vqfast::VQFAST_ISA::attention
