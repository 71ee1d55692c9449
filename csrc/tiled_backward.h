// Backward pass of causal_attention and full_attention; a kernel file of one of them includes it
// once per instruction set.
//
// Computes: with p_ij = exp(scale <q_i, k_j> - lse_i) for the keys that row i sees, j <= i or all,
//   delta_i = <grad_i, out_i> and s_ij = p_ij (<grad_i, v_j> - delta_i):  dv_j = sum_i p_ij grad_i,
//   dk_j = scale sum_i s_ij q_i, dq_i = scale sum_j s_ij k_j, for grad, q, k, v, out [B, H, T, d],
//   d <= 512, lse [B, H, T] float32.
// Contract: any strides of grad, q, k, v and out, also expanded ones; the gradients are contiguous.
//   A pair (i, j) that i does not see is not used, whatever q_i, k_j and v_j hold.
// Numerics: sums are float32, one rounding to the output type. Scores are rounded as in the
//   forward pass, and scale enters together with lse in one multiply-add. dk and dv add blocks of
//   kRowBlock rows and dq blocks of kKeyBlock keys, so errors grow with the block and with T /
//   block, not with T. bfloat16 inputs on a CPU with vdpbf16ps: products of inputs are exact, p and
//   s are rounded to bfloat16 once, 2^x has a relative error below 4e-6; the largest error stays
//   below 0.35 of the allowed one. Otherwise half-precision inputs are widened.
// Shape of the code: a unit of work is a (batch, head), or for long sequences a range of its keys.
//   For each block of keys it packs K in rows, K and V transposed, then walks the rows from the
//   diagonal on: scores and <grad, v> of 6 rows into strips, p and s in place, then three products
//   of strips with packed rows. dk and dv stay in scratch; dq gathers in float32 for the unit, and
//   ranges are added in order afterwards. Which unit exists depends on T alone, so the bits do not
//   depend on the number of threads. Five products of T^2 d / 2 multiply-adds. Pairs: one rounding
//   instruction gives s in pairs of keys, for dq; its 16-bit halves interleaved are the pairs of
//   rows that dk and dv add over. Where the diagonal splits a pair, both factors are masked.
//   Wide heads go by stripes of columns in the three products, and their rows are padded: a power
//   of two between them fills few sets of the cache.
// Ladder: GFLOP/s of forward and backward together (3.5 times the forward pass), one thread of a
//   loaded Zen 5, 32 heads, d = 64, T = 256 / 1024, 2026-11-25; torch's SDPA: fp32 43 / 61, bf16 41
//   / 82. Pieces of 32 and the old forward pass: fp32 93 / 151, bf16 119 / 168. Pieces of 64 and
//   the new one: fp32 99 / 162, bf16 134 / 197. The backward pass alone, 2026-11-30, a machine that
//   gives half of that (vdpbf16ps 233, fma 116 at most): bf16 widened 76 / 93, in pairs 124 / 164,
//   delta without transposes and the sum of p made one in the first 6 rows only 133 / 172,
//   gradients rounded by vcvtne2ps2bf16 139 / 176. No gain: blocks of
//   192 keys, with 96 or 48 rows.

#include "tiled_attention.h"
// clang-format off: in the order of their use
#include "attend.h"
#include "tiled_pairs.h"
// clang-format on

namespace vqfast::VQFAST_ISA {
namespace {

using namespace attention;

constexpr int kKeyBlock = 96;  // both are multiples of kRows and even; keys also of kLanes
constexpr int kRowBlock = 96;
constexpr int64_t kRange = 2016;     // keys of a unit at most, a multiple of kKeyBlock
constexpr int64_t kFullRange = 480;  // of one that sees all rows: such heads are few and wide
constexpr int64_t kMostRanges = 8;
constexpr float kLog2e = 1.44269504f;

// One head's inputs.
struct Problem {
  Head grad, q, k, v;
  const float *lse, *delta;  // [T]
  float scale;
  int64_t T;
  bool causal;
};

// Memory of one thread. Floats, or pairs of bfloat16 as 32 bits, which lie along d for the scores
// and along the sum for the other products.
struct Scratch {
  int width;                               // d in whole vectors
  int ld;                                  // from row to row of what is d wide
  int steps;                               // d, or pairs of d
  int packed;                              // steps in whole vectors
  std::vector<float> k, kt, vt, dk, dv;    // a block of keys
  std::vector<float> q, grad, lse, delta;  // a block of rows
  std::vector<float> q_pairs, grad_pairs;  // q and grad in pairs of rows
  std::vector<float> p, s;                 // [kRowBlock][kKeyBlock], or half the rows in pairs
  std::vector<float> s_along;              // s in pairs of keys, [kRowBlock][kKeyBlock / 2]
  std::vector<float> scores, dots;         // pairs: of kRows rows, before they become p and s
  Scratch(int d, bool pairs)
      : width(round_up(d, kLanes)),
        ld(padded_stride(width)),
        steps(pairs ? (d + 1) / 2 : d),
        packed(pairs ? round_up(steps, kLanes) : ld),
        k((pairs ? kKeyBlock / 2 : kKeyBlock) * ld),
        kt(packed * kKeyBlock),
        vt(packed * kKeyBlock),
        dk(kKeyBlock * ld),
        dv(kKeyBlock * ld),
        q(kRowBlock * packed),
        grad(kRowBlock * packed),
        lse(kRowBlock),
        delta(kRowBlock),
        q_pairs(pairs ? kRowBlock / 2 * ld : 0),
        grad_pairs(q_pairs.size()),
        p((pairs ? kRowBlock / 2 : kRowBlock) * kKeyBlock),
        s(p.size()),
        s_along(pairs ? kRowBlock * kKeyBlock / 2 : 0),
        scores(pairs ? kRows * kKeyBlock : 0),
        dots(scores.size()) {}
};

// dst [rows in pairs][ld]: zeros from n rows up to `padded`.
void pack_padded_pairs_of_rows(const Head& x, int64_t begin, int64_t n, int padded, float* dst,
                               int ld) {
  pack_pairs_of_rows(x, begin, n, dst, ld);
  std::fill(dst + (n + 1) / 2 * ld, dst + padded / 2 * ld, 0.0f);
}

template <bool kPairs>
void pack_row_block(const Problem& x, int64_t begin, Scratch& m) {
  const int64_t n = std::min<int64_t>(kRowBlock, x.T - begin);
  if constexpr (kPairs) {
    pack_row_pairs(x.q, begin, n, kRowBlock, m.q.data(), m.packed);
    pack_row_pairs(x.grad, begin, n, kRowBlock, m.grad.data(), m.packed);
    pack_padded_pairs_of_rows(x.q, begin, n, kRowBlock, m.q_pairs.data(), m.ld);
    pack_padded_pairs_of_rows(x.grad, begin, n, kRowBlock, m.grad_pairs.data(), m.ld);
  } else {
    pack_rows(x.q, begin, n, kRowBlock, 1.0f, m.q.data(), m.ld);
    pack_rows(x.grad, begin, n, kRowBlock, 1.0f, m.grad.data(), m.ld);
  }
  for (int64_t i = 0; i < kRowBlock; ++i) {
    // exp(score - infinity) = 0 takes rows past the end out of every sum
    m.lse[i] = i < n ? x.lse[begin + i] : std::numeric_limits<float>::infinity();
    m.delta[i] = i < n ? x.delta[begin + i] : 0.0f;
  }
}

template <bool kPairs>
void pack_key_block(const Problem& x, int64_t begin, int64_t n, Scratch& m) {
  if constexpr (kPairs) {
    pack_padded_pairs_of_rows(x.k, begin, n, kKeyBlock, m.k.data(), m.ld);
    pack_transposed_pairs(x.k, begin, n, kKeyBlock, m.kt.data(), kKeyBlock);
    pack_transposed_pairs(x.v, begin, n, kKeyBlock, m.vt.data(), kKeyBlock);
  } else {
    pack_rows(x.k, begin, n, kKeyBlock, 1.0f, m.k.data(), m.ld);
    pack_transposed(x.k, begin, n, kKeyBlock, m.kt.data(), kKeyBlock);
    pack_transposed(x.v, begin, n, kKeyBlock, m.vt.data(), kKeyBlock);
  }
}

// For a row whose n keys are all in the strip: makes the sum of p exactly one again, and returns
// delta as sum p <grad, v>. It is what the early rows need, where the roundings of lse and out
// would be most of the error; in bfloat16, where those of p and s are as large, only the first
// ones.
float settle(float* p, const float* dots, int n) {
  VF total{}, along{};
  for (int j = 0; j < n; j += kLanes) total += load_n(p + j, std::min(kLanes, n - j));
  const float sum = reduce_add(total);
  if (sum == 0.0f) return 0.0f;  // lse = inf: a row past the end, or one with nothing to attend to
  for (int j = 0; j < n; j += kLanes) {
    const int width = std::min(kLanes, n - j);
    const VF weight = load_n(p + j, width) / sum;
    store_n(p + j, weight, width);
    along = fma(weight, load_n(dots + j, width), along);
  }
  return reduce_add(along);
}

// Weights in place of the scores of one row.
template <bool kPairs>
VQFAST_INLINE VF weight(VF score, VF scale, VF lse) {
  const VF x = fma(score, scale, -lse);
  return kPairs ? exp2_nonpositive<4>(x) : vexp(x);  // pairs: scale and lse are in base 2
}

// p and s of rows r and r + 1 in pairs, from their scores (kWeighed: from p) and <grad, v>.
template <bool kWeighed>
void pair_rows(Scratch& m, int at, int r, int columns, VF scale, const float (&lse)[kRows],
               const float (&delta)[kRows]) {
  const float *scores = m.scores.data() + r * kKeyBlock, *dots = m.dots.data() + r * kKeyBlock;
  float *p = m.p.data() + (at + r) / 2 * kKeyBlock, *s = m.s.data() + (at + r) / 2 * kKeyBlock;
  float* along = m.s_along.data() + (at + r) * (kKeyBlock / 2);
  const VF lse_a = broadcast(lse[r]), lse_b = broadcast(lse[r + 1]);
  for (int j = 0; j < columns; j += kLanes) {
    VF a = load(scores + j), b = load(scores + kKeyBlock + j);
    if (!kWeighed) {
      a = weight<true>(a, scale, lse_a);
      b = weight<true>(b, scale, lse_b);
    }
    store(p + j, round_pair(a, b));
    const VF both = round_both(a * (load(dots + j) - delta[r]),
                               b * (load(dots + kKeyBlock + j) - delta[r + 1]));
    store(s + j, interleave(both));
    store_halves(along + j / 2, along + (kKeyBlock + j) / 2, both);
  }
}

// p and s of the tile of rows from `at` in the block, for the first `columns` keys of the key
// block. whole > 0: the tile's first row sees that many keys, row r `more` r more, and they are all
// in this block.
template <bool kPairs>
void weigh(Scratch& m, float scale, int at, int columns, int whole, int more) {
  float* p = kPairs ? m.scores.data() : m.p.data() + at * kKeyBlock;
  float* s = kPairs ? m.dots.data() : m.s.data() + at * kKeyBlock;
  dot_products<kPairs>(m.q.data() + at * m.packed, m.packed, m.kt.data(), kKeyBlock, m.steps, p,
                       kKeyBlock, columns);
  dot_products<kPairs>(m.grad.data() + at * m.packed, m.packed, m.vt.data(), kKeyBlock, m.steps, s,
                       kKeyBlock, columns);
  const VF factor = broadcast(kPairs ? scale * kLog2e : scale);
  float lse[kRows], delta[kRows];
  for (int r = 0; r < kRows; ++r) {
    lse[r] = kPairs ? m.lse[at + r] * kLog2e : m.lse[at + r];
    delta[r] = m.delta[at + r];
    if (kPairs && whole == 0) continue;
    float *pr = p + r * kKeyBlock, *sr = s + r * kKeyBlock;
    const VF row_lse = broadcast(lse[r]);
    for (int j = 0; j < columns; j += kLanes)
      store(pr + j, weight<kPairs>(load(pr + j), factor, row_lse));
    if (whole > 0) delta[r] = settle(pr, sr, whole + r * more);
    if (kPairs) continue;
    for (int j = 0; j < columns; j += kLanes)
      store(sr + j, load(pr + j) * (load(sr + j) - delta[r]));
  }
  if constexpr (kPairs)
    for (int r = 0; r < kRows; r += 2) {
      if (whole > 0)
        pair_rows<true>(m, at, r, columns, factor, lse, delta);
      else
        pair_rows<false>(m, at, r, columns, factor, lse, delta);
    }
}

// Of a last pair of keys that is half, what stands in the second place.
VQFAST_INLINE void drop_second(Scratch& m, int at, int pair) {
  for (int r = at; r < at + kRows; ++r) {
    float& x = m.s_along[r * (kKeyBlock / 2) + pair];
    x = bits_float(float_bits(x) & kFirstOfPair);
  }
}

// The p and s of all rows of a block from `row`.
template <bool kPairs>
void weigh_block(const Problem& x, int64_t row, int64_t key, int keys, Scratch& m) {
  for (int at = 0; at < kRowBlock && row + at < x.T; at += kRows) {
    const int64_t past = row + at - key;
    if (!x.causal) {
      weigh<kPairs>(m, x.scale, at, round_up(keys, kLanes), keys == x.T ? keys : 0, 0);
      if (kPairs && keys % 2) drop_second(m, at, keys / 2);
    } else if (past >= 0) {
      const bool first = key == 0 && past < (kPairs ? kRows : kKeyBlock);
      const int seen = static_cast<int>(past < kKeyBlock ? past + kRows : keys);
      weigh<kPairs>(m, x.scale, at, round_up(seen, kLanes), first ? seen - kRows + 1 : 0, 1);
    }
  }
}

// What the weighed block of rows from `row` adds to `columns` columns from `c` on of the row
// block's dq, and of dk and dv.
template <bool kPairs>
void add_columns(const Problem& x, int64_t row, int64_t key, int keys, int c, int columns,
                 Scratch& m, float* dq) {
  constexpr int kEach = kPairs ? 2 : 1;  // terms of a step
  constexpr int kAlong = kKeyBlock / kEach;
  const float* along = kPairs ? m.s_along.data() : m.s.data();
  for (int at = 0; at < kRowBlock && row + at < x.T; at += kRows) {
    // a tile of rows sees whole keys before itself, and its own triangle if that lies in this block
    const int64_t past = row + at - key;
    if (x.causal && past < 0) continue;
    float* to = dq + at * m.ld + c;
    if (x.causal && past < kKeyBlock)
      product<Walk::kAlongRow, Steps::kFirst, kPairs>(along + at * kAlong, kAlong, m.k.data() + c,
                                                      m.ld, past, to, m.ld, columns);
    else
      product<Walk::kAlongRow, Steps::kAll, kPairs>(along + at * kAlong, kAlong, m.k.data() + c,
                                                    m.ld, round_up(keys, kEach), to, m.ld, columns);
  }
  const int rows =
      static_cast<int>(std::min<int64_t>(kRowBlock, round_up<int64_t>(x.T - row, kRows)));
  const float* q = (kPairs ? m.q_pairs : m.q).data() + c;
  const float* grad = (kPairs ? m.grad_pairs : m.grad).data() + c;
  for (int j = 0; j < keys; j += kRows) {
    // of the rows that see the tile's first key
    const int64_t first = x.causal ? key + j - row : -1;
    if (first >= rows) break;
    const int skip = static_cast<int>(std::max<int64_t>(first, 0));
    const auto add = [&](const std::vector<float>& weights, const float* values,
                         std::vector<float>& to) {
      const float* w = weights.data() + skip / kEach * kKeyBlock + j;
      const float* from = values + skip / kEach * m.ld;
      float* at = to.data() + j * m.ld + c;
      if (first >= 0)
        product<Walk::kDownColumn, Steps::kFrom, kPairs>(w, kKeyBlock, from, m.ld, rows - skip, at,
                                                         m.ld, columns);
      else
        product<Walk::kDownColumn, Steps::kAll, kPairs>(w, kKeyBlock, from, m.ld, rows, at, m.ld,
                                                        columns);
    };
    add(m.p, grad, m.dv);
    add(m.s, q, m.dk);
  }
}

// Block of rows from `row` against the packed block of keys from `key`; `keys` of them exist. dq:
// the row block's.
template <bool kPairs>
void row_block(const Problem& x, int64_t row, int64_t key, int keys, Scratch& m, float* dq) {
  weigh_block<kPairs>(x, row, key, keys, m);
  // wide heads by columns, so that what all tiles read stays in the nearest cache
  const int step = m.width > 128 ? kVecs * kLanes : m.width;
  for (int c = 0; c < m.width; c += step)
    add_columns<kPairs>(x, row, key, keys, c, std::min(step, m.width - c), m, dq);
}

template <bool kPairs>
void write_gradient(const View& out, int64_t row, const float* sum, float factor) {
  if constexpr (kPairs)
    write_row_rounded(out, row, sum, factor);
  else
    write_row(out, row, sum, [&](VF x) { return x * factor; });
}

// Keys [begin, end), begin a multiple of kKeyBlock: dk and dv of the head that starts at `out_row`,
// and this range's part of dq [T rounded up to kRowBlock][ld], which holds zeros.
template <bool kPairs>
void run_range(const Problem& x, int64_t begin, int64_t end, const View& dk, const View& dv,
               int64_t out_row, Scratch& m, float* dq) {
  for (int64_t key = begin; key < end; key += kKeyBlock) {
    const int keys = static_cast<int>(std::min<int64_t>(kKeyBlock, end - key));
    pack_key_block<kPairs>(x, key, keys, m);
    std::fill(m.dk.begin(), m.dk.end(), 0.0f);
    std::fill(m.dv.begin(), m.dv.end(), 0.0f);
    for (int64_t row = x.causal ? key : 0; row < x.T; row += kRowBlock) {
      pack_row_block<kPairs>(x, row, m);
      row_block<kPairs>(x, row, key, keys, m, dq + row * m.ld);
    }
    for (int j = 0; j < keys; ++j) {
      write_gradient<kPairs>(dk, out_row + key + j, m.dk.data() + j * m.ld, x.scale);
      write_gradient<kPairs>(dv, out_row + key + j, m.dv.data() + j * m.ld, 1.0f);
    }
  }
}

// delta of the n rows from `begin`. Floats: <grad, out> is rounded as <grad, v> is; x and y are
// memory for the columns of kRowBlock rows.
template <bool kPairs>
void row_deltas(const Head& grad, const Head& out, int64_t begin, int64_t n, float* x, float* y,
                float* delta) {
  if constexpr (kPairs) {
    for (int64_t i = 0; i < n; i += kLanes)
      store_n(delta + begin + i, pair_dots(grad, out, begin + i, n - i),
              static_cast<int>(std::min<int64_t>(kLanes, n - i)));
  } else {
    pack_transposed(grad, begin, n, kRowBlock, x, kRowBlock);
    pack_transposed(out, begin, n, kRowBlock, y, kRowBlock);
    float dots[kRowBlock];
    column_dots(x, y, kRowBlock, grad.d, dots, kRowBlock);
    std::copy_n(dots, n, delta + begin);
  }
}

// delta [B, H, T].
template <bool kPairs>
void all_deltas(const Args& a, const View& grad, const View& out, float* delta) {
  const int64_t H = grad.shape[1], T = grad.shape[2];
  const int64_t blocks = (T + kRowBlock - 1) / kRowBlock;
  parallel_for(a.threads, grad.shape[0] * H * blocks, 1, [&](int64_t from, int64_t to) {
    const int size = kPairs ? 0 : round_up(static_cast<int>(grad.shape[3]), kLanes) * kRowBlock;
    std::vector<float> columns(2 * size);
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t head = unit / blocks, begin = unit % blocks * kRowBlock;
      row_deltas<kPairs>(head_of(grad, head / H, head % H), head_of(out, head / H, head % H), begin,
                         std::min<int64_t>(kRowBlock, T - begin), columns.data(),
                         columns.data() + size, delta + head * T);
    }
  });
}

// dq rows [begin, end) of the head that starts at `out_row`: the ranges' parts added in order,
// times scale.
template <bool kPairs>
void write_dq(std::vector<float>& parts, int64_t part_size, int64_t ranges, int ld, float scale,
              int64_t begin, int64_t end, const View& dq, int64_t out_row) {
  for (int64_t i = begin; i < end; ++i) {
    float* total = parts.data() + i * ld;
    for (int64_t r = 1; r < ranges; ++r)
      for (int t = 0; t < ld; t += kLanes)
        store(total + t, load(total + t) + load(parts.data() + r * part_size + i * ld + t));
    write_gradient<kPairs>(dq, out_row + i, total, scale);
  }
}

template <bool kPairs>
void run_all(const Args& a, bool causal) {
  const View &grad = a.t[0], &q = a.t[1], &k = a.t[2], &v = a.t[3], &out = a.t[4], &lse = a.t[5];
  const View &dq = a.t[6], &dk = a.t[7], &dv = a.t[8];
  const float scale = static_cast<float>(a.s[0].f);
  const int64_t heads = q.shape[0] * q.shape[1], H = q.shape[1], T = q.shape[2];
  const int d = static_cast<int>(q.shape[3]), ld = padded_stride(round_up(d, kLanes));
  if (q.numel() == 0) return;
  std::vector<float> delta(heads * T);
  all_deltas<kPairs>(a, grad, out, delta.data());
  const auto problem = [&](int64_t head) {
    const int64_t b = head / H, h = head % H;
    return Problem{head_of(grad, b, h),
                   head_of(q, b, h),
                   head_of(k, b, h),
                   head_of(v, b, h),
                   lse.as<float>() + head * T,
                   delta.data() + head * T,
                   scale,
                   T,
                   causal};
  };
  const int64_t part_size = round_up<int64_t>(T, kRowBlock) * ld;
  const int64_t most = causal ? kRange : kFullRange;
  const int64_t ranges = std::min(kMostRanges, (T + most - 1) / most);
  if (ranges == 1) {
    parallel_for(a.threads, heads, 1, [&](int64_t from, int64_t to) {
      Scratch m(d, kPairs);
      std::vector<float> part(part_size);
      for (int64_t head = from; head < to; ++head) {
        std::fill(part.begin(), part.end(), 0.0f);
        run_range<kPairs>(problem(head), 0, T, dk, dv, head * T, m, part.data());
        write_dq<kPairs>(part, part_size, 1, ld, scale, 0, T, dq, head * T);
      }
    });
    return;
  }
  // long sequences: one head at a time, its ranges in parallel
  const int64_t range = round_up<int64_t>((T + ranges - 1) / ranges, kKeyBlock);
  std::vector<float> parts(ranges * part_size);
  for (int64_t head = 0; head < heads; ++head) {
    std::fill(parts.begin(), parts.end(), 0.0f);
    parallel_for(a.threads, ranges, 1, [&](int64_t from, int64_t to) {
      Scratch m(d, kPairs);
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t r = fold(unit, ranges), begin = r * range, end = std::min(T, begin + range);
        run_range<kPairs>(problem(head), begin, end, dk, dv, head * T, m,
                          parts.data() + r * part_size);
      }
    });
    parallel_for(a.threads, T, 64, [&](int64_t from, int64_t to) {
      write_dq<kPairs>(parts, part_size, ranges, ld, scale, from, to, dq, head * T);
    });
  }
}

// Inputs grad, q, k, v, out, lse, outputs dq, dk, dv; causal: as in the forward pass.
void run_backward(const Args& a, bool causal) {
#if VQFAST_LANES == 16
  // grad, q, k, v, out
  const bool pairs =
      std::all_of(a.t, a.t + 5, [](const View& x) { return x.dtype == DType::bf16; });
  if (pairs && has_avx512_bf16()) return run_all<true>(a, causal);
#endif
  run_all<false>(a, causal);
}

}  // namespace
}  // namespace vqfast::VQFAST_ISA
