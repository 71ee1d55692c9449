// Forward pass of causal_attention and full_attention; a kernel file of one of them includes it
// once per instruction set.
//
// Computes: out_i = sum_j softmax_j(scale <q_i, k_j>) v_j and
//   lse_i = log sum_j exp(scale <q_i, k_j>) over the keys that row i sees, j <= i or all, for q, k,
//   v [B, H, T, d], d <= 512, out like q and contiguous, lse [B, H, T] float32.
// Contract: any strides of q, k, v. Keys and values after row i are not used for it, whatever they
//   hold. A row whose scores are all -inf gives zeros and lse = +inf. NaN among what a row sees
//   gives NaN.
// Numerics: sums are float32. Scores are chains over d in pieces of 64; the output adds blocks of
//   kBlock keys, so its error grows with kBlock + T / kBlock. 2^x has 2 ulp; scale * log2(e) is
//   multiplied into the scores. No overflow below the range of float32: the running maximum is
//   taken out of every exponent. bfloat16 inputs on a CPU with vdpbf16ps: products of q and k are
//   exact, weights are rounded to bfloat16 and the rounded ones are what out is divided by, so
//   equal values stay equal; lse is of the weights before the rounding. Otherwise half-precision
//   inputs are widened.
// Shape of the code: a unit of work is some blocks of kQueries rows of a (batch, head). The first
//   block of a head takes the rows that are over, so a T that is no multiple costs next to nothing:
//   that block sees few keys. For each block of keys the unit packs K and V in rows (bfloat16: V in
//   pairs of rows), then for each block of rows: scores with the queries in the lanes, so maximum
//   and sum need no horizontal step; weights in place; and weights times V into the block's output,
//   which is rescaled in the same store. Vectors and tiles that lie in the future are skipped;
//   where all keys are seen, only those past the end are masked. The order of work inside a row
//   depends on T and d alone: equal bits for any number of threads.
// Ladder: GFLOP/s of useful work, one thread of a loaded Zen 5, 32 heads, d = 64, T = 256 / 1024,
//   2026-11-25; torch's SDPA: fp32 41 / 62, bf16 40 / 60.
//   rows of 6 queries against transposed keys:        fp32  83 / 134, bf16 107 / 151
//   queries in the lanes, all inlined into one body:  fp32 100 / 169, bf16 104 / 137 (vdpbf16ps)
//   tiles as functions, so addresses stay in registers:               bf16 120 / 180
//   vdpbf16ps by value, so sums stay in registers:    fp32 100 / 164, bf16 177 / 283
//   out by one reciprocal a row and vcvtne2ps2bf16, 2026-11-30: bf16 +2 %, d = 128 +9 %.
//   No gain: prefetch of the next block's keys and values (T = 256 -2 %, T = 1024 +5 %, in noise).

#include "tiled_attention.h"
// clang-format off: in the order of their use
#include "attend.h"
#include "tiled_pairs.h"
// clang-format on

namespace vqfast::VQFAST_ISA {
namespace {

using namespace attention;

constexpr int kQueries = 32;  // rows of a block, in the lanes of kAcross vectors
constexpr int kAcross = kQueries / kLanes;
constexpr int kBlock = 64;                      // keys at a time
constexpr int kKeyTile = kLanes == 16 ? 8 : 4;  // keys of a tile of scores
constexpr int kRowTile = 4;                     // rows of a tile of the output
constexpr int64_t kMostRows = 512;              // of a unit of work; half of it for wide heads
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504f;
constexpr double kLn2 = 0.693147180559945309;

// Memory of one thread. Packed q, k and v hold floats, or pairs of bfloat16 as 32 bits.
struct Scratch {
  int width;   // d in whole vectors
  int ld;      // from row to row of what is d wide
  int steps;   // d, or pairs of d
  int packed;  // steps in whole vectors
  std::vector<float> q, k, v, strip, sum, top, shift, total, exact;
  Scratch(int d, bool pairs, int64_t rows)
      : width(round_up(d, kLanes)),
        ld(padded_stride(width)),
        steps(pairs ? (d + 1) / 2 : d),
        packed(round_up(steps, kLanes)),
        q(rows * packed),
        k(kBlock * packed),
        v(kBlock * ld),
        strip(kBlock * kQueries),
        sum(rows * ld),
        top(rows),
        shift(rows),
        total(rows),
        exact(rows) {}
};

// Scores times this are exponents of 2. Never zero, as scores of the future are -inf.
VQFAST_INLINE float exponent_factor(float scale) {
  return scale == 0 ? 1.0f : std::fabs(scale) * kLog2e;
}

// Rows [begin, end) of a head against keys [first, first + keys).
struct Block {
  int64_t begin, end, first;
  int keys;
  float scale;  // of scores to exponents of 2, >= 0
  bool causal;
  // Key j of the block is seen by the lanes from past(j) on, by all or none where rows see all
  // keys.
  int64_t past(int j) const { return causal ? j - (begin - first) : j < keys ? 0 : kQueries; }
  // Keys that row r sees of the block, where it does not end before.
  int64_t seen(int r) const { return causal ? begin - first + r + 1 : kBlock; }
};

VQFAST_INLINE VI lanes_from(int first) {
  VI v;
  for (int i = 0; i < kLanes; ++i) v[i] = first + i;
  return v;
}

// Vectors of queries that see nothing of the keys from j on.
VQFAST_INLINE int blind(const Block& b, int j) {
  const int64_t past = b.past(j);
  return past <= 0 ? 0 : static_cast<int>(std::min<int64_t>(past / kLanes, kAcross));
}

// Scores of kKeyTile keys from j on and NV vectors of queries. The last piece of the sum over d
// also takes the maximum; kMasked: keys of the future become -inf.
template <int NV, bool kPairs, bool kMasked>
__attribute__((noinline)) void score_tile(const Scratch& s, const float* q, const Block& b, int j,
                                          int vector, float* strip, VF (&most)[kAcross]) {
  const float* k = s.k.data() + j * s.packed;
  q += vector * kLanes;
  strip += j * kQueries + vector * kLanes;
  for (int begin = 0; begin < s.steps; begin += kPiece) {
    const int end = std::min(s.steps, begin + kPiece);
    VF acc[kKeyTile][NV] = {};
    for (int t = begin; t < end; ++t) {
      VF qv[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) qv[v] = load(q + t * kQueries + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kKeyTile; ++r) {
        const VF x = broadcast(k[r * s.packed + t]);
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) acc[r][v] = multiply_add<kPairs>(x, qv[v], acc[r][v]);
      }
    }
    const bool last = end == s.steps;
#pragma GCC unroll 8
    for (int r = 0; r < kKeyTile; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        float* at = strip + r * kQueries + v * kLanes;
        VF x = begin == 0 ? acc[r][v] : load(at) + acc[r][v];
        if (last && kMasked) {
          const int past = static_cast<int>(b.past(j + r));
          x = lanes_from((vector + v) * kLanes) >= past ? x : broadcast(-kInf);
        }
        store(at, x);
        if (last) most[vector + v] = vmax(x, most[vector + v]);  // NaN is passed over here
      }
  }
}

template <bool kPairs>
void scores(const Scratch& s, const float* q, const Block& b, float* strip, VF (&most)[kAcross]) {
  for (int j = 0; j < b.keys; j += kKeyTile) {
    const bool masked = b.past(j + kKeyTile - 1) > 0;
    for (int v = blind(b, j); v < kAcross;) {
      if (kAcross - v == 1) {  // only ever the second half of the diagonal
        score_tile<1, kPairs, true>(s, q, b, j, v, strip, most);
        v += 1;
      } else {
        if (masked)
          score_tile<2, kPairs, true>(s, q, b, j, v, strip, most);
        else
          score_tile<2, kPairs, false>(s, q, b, j, v, strip, most);
        v += 2;
      }
    }
  }
}

// Scores to weights relative to the running maximum, in place (pairs: keys 2 u and 2 u + 1 in row
// 2 u); keep: what the earlier sums of each query have to be multiplied with.
template <bool kPairs>
__attribute__((noinline)) void soften(const Block& b, const VF (&most)[kAcross], float* strip,
                                      float* top, float* shift, float* total, float* exact,
                                      float* keep) {
  const VF scale = broadcast(b.scale);
  for (int v = 0; v < kAcross; ++v) {
    const int lane = v * kLanes;
    const VF before = load(top + lane), now = vmax(most[v], before), minus_inf = broadcast(-kInf);
    const VF from = now == minus_inf ? VF{} : now * scale;
    const VF factor =
        before == minus_inf ? broadcast(1.0f) : exp2_nonpositive<6>(load(shift + lane) - from);
    VF sum{}, all{};
    for (int j = 0; j < b.keys; j += kKeyTile) {
      if (v < blind(b, j)) break;
      float* at = strip + j * kQueries + lane;
#pragma GCC unroll 8
      for (int r = 0; r < kKeyTile; r += 2) {
        float *even = at + r * kQueries, *odd = even + kQueries;
        const VF a = exp2_nonpositive<kPairs ? 4 : 6>(fma(load(even), scale, -from));
        const VF c = exp2_nonpositive<kPairs ? 4 : 6>(fma(load(odd), scale, -from));
        sum += a + c;
        if constexpr (kPairs) {
          const VF both = round_pair(a, c);
          store(even, both);
          all = add_pair(all, both);
        } else {
          store(even, a);
          store(odd, c);
        }
      }
    }
    store(top + lane, now);
    store(shift + lane, from);
    store(keep + lane, factor);
    store(exact + lane, fma(load(exact + lane), factor, sum));
    store(total + lane, fma(load(total + lane), factor, kPairs ? all : sum));
  }
}

// One key or pair of keys for the rows [from, kRowTile); half: row `from` sees only the pair's
// first.
template <int NV, bool kPairs>
VQFAST_INLINE void row_step(const float* p, const float* v, int from, bool half,
                            VF (&acc)[kRowTile][NV]) {
  VF value[NV];
#pragma GCC unroll 4
  for (int i = 0; i < NV; ++i) value[i] = load(v + i * kLanes);
#pragma GCC unroll 4
  for (int r = 0; r < kRowTile; ++r) {
    if (r < from) continue;
    const VF x = broadcast(p[r]);
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) {
      const VF y = half && r == from ? first_of_pair(value[i]) : value[i];
      acc[r][i] = multiply_add<kPairs>(x, y, acc[r][i]);
    }
  }
}

// The steps that not all rows of a tile take, from the first row's last key on; kOdd: the parity of
// `seen`, for pairs.
template <int NV, bool kPairs, bool kOdd>
VQFAST_INLINE void diagonal_steps(const float* p, const float* v, int ld, int64_t seen, int steps,
                                  VF (&acc)[kRowTile][NV]) {
  constexpr int kEach = kPairs ? 2 : 1;
  const int64_t at = kPairs ? seen >> 1 : seen;  // rounded down
#pragma GCC unroll 4
  for (int e = 0; e < kRowTile / kEach; ++e) {
    if (at + e < 0 || at + e >= steps) continue;
    // kOdd: keys 2 e - 1 and 2 e after the seen ones; else keys 2 e and 2 e + 1, or key e
    const int from = !kPairs ? e + 1 : kOdd ? 2 * e : 2 * e + 1;
    row_step<NV, kPairs>(p + (at + e) * kEach * kQueries, v + (at + e) * ld, from, kPairs, acc);
  }
}

// kRowTile rows of the output, NV vectors of it: sum = sum * keep + weights * V. The tile's first
// row sees `seen` keys of the block (any number), each further row one more.
template <int NV, bool kPairs>
__attribute__((noinline)) void output_tile(const float* p, const float* v, int ld, int64_t seen,
                                           int keys, const float* keep, bool fresh, float* sum) {
  constexpr int kEach = kPairs ? 2 : 1;   // keys of a step
  constexpr int kRow = kEach * kQueries;  // of the weights of a step
  const int steps = (keys + kEach - 1) / kEach;
  const int whole = static_cast<int>(std::min<int64_t>(std::max<int64_t>(seen, 0) / kEach, steps));
  VF acc[kRowTile][NV] = {};
  for (int t = 0; t < whole; ++t) row_step<NV, kPairs>(p + t * kRow, v + t * ld, 0, false, acc);
  if (seen < steps * kEach) {  // also where the last pair is half
    if (kPairs && (seen & 1))
      diagonal_steps<NV, kPairs, true>(p, v, ld, seen, steps, acc);
    else
      diagonal_steps<NV, kPairs, false>(p, v, ld, seen, steps, acc);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRowTile; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) {
      float* to = sum + r * ld + i * kLanes;
      store(to, fresh ? acc[r][i] : fma(load(to), broadcast(keep[r]), acc[r][i]));
    }
}

template <bool kPairs>
void outputs(const Scratch& s, const Block& b, const float* keep, float* sum) {
  constexpr int kMost = kLanes == 16 ? 4 : 2;
  const int rows = static_cast<int>(b.end - b.begin);
  for (int t = 0; t < s.width;) {
    const int left = (s.width - t) / kLanes;
    // five vectors go as 3 + 2: a tile one vector wide would wait for its loads
    const int take = left >= 2 * kMost || left <= kMost ? std::min(left, kMost) : (left + 1) / 2;
    for (int r = 0; r < rows; r += kRowTile) {
      const int64_t seen = b.seen(r);
      const auto tile = [&](auto width) {
        output_tile<decltype(width)::value, kPairs>(s.strip.data() + r, s.v.data() + t, s.ld, seen,
                                                    b.keys, keep + r, b.first == 0,
                                                    sum + r * s.ld + t);
      };
      if (take == 1) tile(std::integral_constant<int, 1>{});
      if (take == 2) tile(std::integral_constant<int, 2>{});
      if constexpr (kMost == 4) {
        if (take == 3) tile(std::integral_constant<int, 3>{});
        if (take == 4) tile(std::integral_constant<int, 4>{});
      }
    }
    t += take * kLanes;
  }
}

// The queries of a block, with the sign of `scale`: b.scale is its size.
template <bool kPairs>
void pack_queries(const Head& q, const Block& b, float scale, float* to) {
  const int64_t rows = b.end - b.begin;
  int size;
  if constexpr (kPairs) {
    pack_transposed_pairs(q, b.begin, rows, kQueries, to, kQueries);
    size = (q.d + 1) / 2 * kQueries;
  } else {
    pack_transposed(q, b.begin, rows, kQueries, to, kQueries);
    size = q.d * kQueries;
  }
  if (scale == 0) std::fill_n(to, size, 0.0f);
  if (scale >= 0) return;
  const VI sign = VI{} + static_cast<int32_t>(kPairs ? 0x80008000u : 0x80000000u);
  for (int i = 0; i < size; i += kLanes) store(to + i, (VF)((VI)load(to + i) ^ sign));
}

template <bool kPairs>
void pack_keys(const Head& k, const Head& v, int64_t first, int64_t n, Scratch& s) {
  const int64_t padded = round_up<int64_t>(n, kKeyTile);
  if constexpr (kPairs) {
    pack_row_pairs(k, first, n, padded, s.k.data(), s.packed);
    pack_pairs_of_rows(v, first, n, s.v.data(), s.ld);
  } else {
    pack_rows(k, first, n, padded, 1.0f, s.k.data(), s.packed);
    pack_rows(v, first, n, n, 1.0f, s.v.data(), s.ld);
  }
}

// Blocks of rows: the first takes the rows that are over.
VQFAST_INLINE int64_t block_begin(int64_t T, int64_t block) {
  return block == 0 ? 0 : T - (round_up<int64_t>(T, kQueries) - block * kQueries);
}

// Blocks [from, to) of the rows of one head.
template <bool kPairs>
void run_unit(const Head& q, const Head& k, const Head& v, float scale, int64_t T, bool causal,
              int64_t from, int64_t to, Scratch& s) {
  const float factor = exponent_factor(scale);
  const auto block = [&](int64_t i) {
    return Block{block_begin(T, i), block_begin(T, i + 1), 0, 0, factor, causal};
  };
  std::fill(s.top.begin(), s.top.end(), -kInf);
  for (auto* x : {&s.shift, &s.total, &s.exact}) std::fill(x->begin(), x->end(), 0.0f);
  for (int64_t i = from; i < to; ++i)
    pack_queries<kPairs>(q, block(i), scale, s.q.data() + (i - from) * kQueries * s.packed);
  const int64_t end = causal ? block_begin(T, to) : T;
  for (int64_t first = 0; first < end; first += kBlock) {
    pack_keys<kPairs>(k, v, first, std::min<int64_t>(kBlock, end - first), s);
    for (int64_t i = from; i < to; ++i) {
      Block b = block(i);
      const int64_t last = causal ? b.end : T;
      if (last <= first) continue;
      b.first = first;
      b.keys = static_cast<int>(std::min<int64_t>(kBlock, last - first));
      const int64_t at = (i - from) * kQueries;
      VF most[kAcross];
      float keep[kQueries];
      for (VF& x : most) x = broadcast(-kInf);
      scores<kPairs>(s, s.q.data() + at * s.packed, b, s.strip.data(), most);
      soften<kPairs>(b, most, s.strip.data(), s.top.data() + at, s.shift.data() + at,
                     s.total.data() + at, s.exact.data() + at, keep);
      outputs<kPairs>(s, b, keep, s.sum.data() + at * s.ld);
    }
  }
}

// What one unit has gathered for the rows of one block.
template <bool kPairs>
void write_block(const Scratch& s, int64_t at, int64_t rows, float scale, const View& out,
                 float* lse, int64_t row) {
  const double size = std::fabs(scale), factor = exponent_factor(scale);
  for (int64_t i = at; i < at + rows; ++i, ++row) {
    const bool none = s.top[i] == -kInf && s.total[i] == 0.0f;
    const float *sum = s.sum.data() + i * s.ld, total = none ? 1.0f : s.total[i];
    if constexpr (kPairs)
      write_row_rounded(out, row, sum, 1.0f / total);
    else
      write_row(out, row, sum, [&](VF x) { return x / total; });
    // the sum is of 2^(factor * score - shift), and shift is rounded
    const double off = s.shift[i] - s.top[i] * factor;
    const double log_sum = s.top[i] * size + (off * kLn2 + std::log(s.exact[i]));
    lse[row] = none ? kInf : static_cast<float>(log_sum);
  }
}

template <bool kPairs>
void run_all(const Args& a, bool causal) {
  const View &q = a.t[0], &k = a.t[1], &v = a.t[2], &out = a.t[3], &lse = a.t[4];
  const float scale = static_cast<float>(a.s[0].f);
  const int64_t heads = q.shape[0] * q.shape[1], H = q.shape[1], T = q.shape[2];
  const int64_t blocks = (T + kQueries - 1) / kQueries;
  // units as large as a fair share allows: each packs the keys again
  int64_t unit = std::min(blocks, (q.shape[3] > 256 ? kMostRows / 2 : kMostRows) / kQueries);
  const int64_t shares = causal ? 4 * a.threads : a.threads;  // causal: they differ in weight
  while (unit > (causal ? 2 : 1) && heads * ((blocks + unit - 1) / unit) < shares)
    unit = (unit + 1) / 2;
  const int64_t units = (blocks + unit - 1) / unit;
  parallel_for(a.threads, heads * units, 1, [&](int64_t from, int64_t to) {
    Scratch s(static_cast<int>(q.shape[3]), kPairs, unit * kQueries);
    for (int64_t i = from; i < to; ++i) {
      const int64_t head = i / units, b = head / H, h = head % H;
      const int64_t begin = fold(i % units, units) * unit, end = std::min(blocks, begin + unit);
      run_unit<kPairs>(head_of(q, b, h), head_of(k, b, h), head_of(v, b, h), scale, T, causal,
                       begin, end, s);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block_begin(T, block);
        write_block<kPairs>(s, (block - begin) * kQueries, block_begin(T, block + 1) - row, scale,
                            out, lse.as<float>(), head * T + row);
      }
    }
  });
}

// Inputs q, k, v [B, H, T, d], outputs out and lse; causal: row i sees the keys up to i, else all.
void run_attention(const Args& a, bool causal) {
  if (a.t[0].numel() == 0) return;
#if VQFAST_LANES == 16
  if (a.t[0].dtype == DType::bf16 && has_avx512_bf16()) return run_all<true>(a, causal);
#endif
  run_all<false>(a, causal);
}

}  // namespace
}  // namespace vqfast::VQFAST_ISA
