// Computes: for each row z_n the nearest code, argmin_k score64(z_n, c_k), and that score; the
//   definition is in nearest_exact.h.
// Contract: z [N, D], codebook [K, D] contiguous; ties give the lowest index; a row that is not
//   finite gives index 0 and score NaN; a code that is not finite never wins. Equal on every
//   instruction set, thread count and split of the rows.
// Numerics: a float32 screen leaves every code that may win, float64 decides. In units of S, a
//   power of two that brings the largest code coordinate near 1, and about a centre m, let
//     a = S (z - m),  b_k = S (c_k - m),  t_k = |b_k|^2 / 2 - a.b_k,
//   which orders codes as |z - c_k|^2 does (dot: m = 0 and no norm). The screen computes t_k from a
//   and b rounded to float32, and half of score64 differs from it, up to a constant of the row, by
//     E_k = (D+16) 2^-24 (|a||b_k| + |b_k|^2/2)  rounding of a, b, products and sums, any order
//         + (D+8) 2^-53 (|a| + |b_k|)^2          rounding of score64 itself
//         + (D+8) 2^-122 (1 + |a|)               underflow, flushed or not
//   at most, so a code with t_k - E_k > min_j (t_j + E_j) cannot win. |b_k| is taken as the largest
//   of its tile of codes. Rows with a coordinate above 2^50 are not screened: every code goes to
//   float64. No other scale needs care: underflow only widens the set that float64 sees.
// Shape of the code: codes are packed on every call (a cache keyed by address goes stale unseen)
//   into tiles of kLanes x V codes. Lane l holds V consecutive codes, so the minimum over a tile's
//   V vectors gives kLanes group minima with no shuffle and no index; a flagged group is V
//   neighbouring rows of the codebook. D > 8: register tile of 12 (6) rows x 2 vectors, z broadcast
//   from L1. D <= 8: z stays in registers, codes stream, one load feeds several rows. Codes equal
//   to an earlier one are dropped, as a collapsed codebook would send all of them to float64.
//   Memory: 32 MiB of packed codes, under 2 MiB per thread, 8 bytes per row.
// Ladder: packing that wrote one code after another cost as much as screening 200 rows (K 16384,
//   D 256); by panels, with one pass less over the codebook, a third of that. This is the float32
//   step, at the rate of torch's sgemm on the same core (Zen 4, 2026-11-23: 38 GMAC/s for both at
//   D 256, on a shared machine). An int8 screen (vpdpbusd) has four times its rate from D = 32 on.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "half.h"
#include "kernel.h"
#include "parallel.h"
#define VQFAST_THIS_FILE "cpu/nearest.cpp"
#include "foreach_isa.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {
namespace {

#include "nearest_exact.h"

constexpr int kTileRows = VQFAST_LANES == 16 ? 12 : 6;  // divides kRowUnit, as do 1, 2 and 4
constexpr int64_t kRowUnit = 12;
constexpr int64_t kPackedBytes = int64_t{32} << 20;
constexpr float kWild = 0x1p50f;
constexpr int64_t kFewRows = 4;

VQFAST_INLINE VF lesser(VF a, VF b) {
#if VQFAST_LANES == 16
  return (VF)_mm512_min_ps((__m512)a, (__m512)b);
#elif VQFAST_LANES == 8
  return (VF)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return vmin(a, b);
#endif
}

VQFAST_INLINE uint32_t at_most(VF a, VF b) {  // bit l: a[l] <= b[l]
#if VQFAST_LANES == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#elif VQFAST_LANES == 8
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ)));
#else
  const VI le = a <= b;
  uint32_t m = 0;
  for (int l = 0; l < kLanes; ++l) m |= static_cast<uint32_t>(le[l] & 1) << l;
  return m;
#endif
}

inline bool all_finite(const float* x, int64_t D) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < D; ++i) bad |= (float_bits(x[i]) & 0x7F800000u) == 0x7F800000u;
  return !bad;
}

// The codebook as float32, what is known of each code, and the frame (m, S) of the screen.
struct Book {
  const float* codes;  // [K, D]
  int64_t K, D;
  int metric;
  std::unique_ptr<float[]> converted;
  std::vector<uint8_t> skip;   // [K] not finite, or equal to an earlier code
  std::vector<double> norms;   // [K], cosine only
  std::vector<uint64_t> hash;  // [K], equal for equal codes
  std::vector<double> centre;  // [D]
  double scale = 1.0;          // S

  double norm(int64_t k) const { return metric == kCosine ? norms[k] : 0.0; }
};

template <class T>
void widen(const T* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
}
void widen(const View& v, int64_t first, int64_t n, float* out) {
  if (v.dtype == DType::f16) widen(v.as<f16>() + first, out, n);
  if (v.dtype == DType::bf16) widen(v.as<bf16>() + first, out, n);
  if (v.dtype == DType::f32) std::memcpy(out, v.as<float>() + first, n * sizeof(float));
}

inline uint64_t hash_of(const float* x, int64_t D) {
  uint64_t h = 0;
  for (int64_t i = 0; i < D; ++i) {
    const uint32_t bits = float_bits(x[i] + 0.0f);  // -0 and 0 are one code
    h += static_cast<uint64_t>(bits) *
         (0x9E3779B97F4A7C15u + static_cast<uint64_t>(i) * 0xD1B54A32D192ED04u);
  }
  return h;
}

void skip_repeated(Book& b) {
  uint64_t room = 16;
  while (room < static_cast<uint64_t>(2 * b.K)) room *= 2;
  std::vector<int64_t> table(room, -1);
  for (int64_t k = 0; k < b.K; ++k) {
    if (b.skip[k]) continue;
    uint64_t at = (b.hash[k] * 0x9E3779B97F4A7C15u) >> 20 & (room - 1);
    for (; table[at] >= 0; at = (at + 1) & (room - 1)) {
      if (b.hash[table[at]] != b.hash[k]) continue;
      const float *x = b.codes + table[at] * b.D, *y = b.codes + k * b.D;
      int64_t i = 0;
      while (i < b.D && x[i] == y[i]) ++i;
      b.skip[k] = i == b.D;
      break;  // equal hashes of unequal codes: nothing is lost but a shortcut
    }
    if (table[at] < 0) table[at] = k;
  }
}

// m: the median of each coordinate over a sample (a mean would follow a single huge code)
void place_centre(Book& b) {
  constexpr int64_t kSample = 33;
  std::vector<double> rows, column;
  b.centre.assign(b.D, 0.0);
  if (b.metric == kDot) return;
  int64_t count = 0;
  for (int64_t j = 0; j < std::min(kSample, b.K); ++j) {
    const int64_t k = b.K <= kSample ? j : j * b.K / kSample;
    const float* c = b.codes + k * b.D;
    if (!all_finite(c, b.D)) continue;
    rows.resize((count + 1) * b.D);
    load64(c, b.metric == kCosine ? norm64(c, b.D) : 0.0, b.D, rows.data() + count++ * b.D);
  }
  column.resize(count);
  for (int64_t i = 0; i < b.D && count > 0; ++i) {
    for (int64_t j = 0; j < count; ++j) column[j] = rows[j * b.D + i];
    std::nth_element(column.begin(), column.begin() + count / 2, column.end());
    b.centre[i] = column[count / 2];
  }
}

// float32 codes, and per code whether it takes part and its norm; with `frame` also (m, S) and
// repeated codes
void read_book(const View& v, int metric, int threads, bool frame, Book& b) {
  b.K = v.shape[0];
  b.D = v.shape[1];
  b.metric = metric;
  b.codes = v.as<float>();
  if (v.dtype != DType::f32) {
    b.converted.reset(new float[b.K * b.D]);
    b.codes = b.converted.get();
    parallel_for(threads, b.K, 64, [&](int64_t begin, int64_t end) {
      widen(v, begin * b.D, (end - begin) * b.D, b.converted.get() + begin * b.D);
    });
  }
  b.skip.resize(b.K);
  if (metric == kCosine) b.norms.resize(b.K);
  if (frame) place_centre(b);
  if (frame) b.hash.resize(b.K);
  std::vector<double> reach(b.K, 0.0);
  parallel_for(threads, b.K, 64, [&](int64_t begin, int64_t end) {
    std::vector<double> row(b.D);
    for (int64_t k = begin; k < end; ++k) {
      const float* c = b.codes + k * b.D;
      b.skip[k] = !all_finite(c, b.D);
      if (b.skip[k]) continue;
      if (metric == kCosine) b.norms[k] = norm64(c, b.D);
      if (!frame) continue;
      b.hash[k] = hash_of(c, b.D);
      load64(c, b.norm(k), b.D, row.data());
      for (int64_t i = 0; i < b.D; ++i) row[i] -= b.centre[i];
      reach[k] = largest_magnitude(row.data(), b.D);
    }
  });
  if (!frame) return;
  const double top = *std::max_element(reach.begin(), reach.end());
  if (top > 0.0) b.scale = std::ldexp(1.0, -std::ilogb(top));
  skip_repeated(b);
}

// A run of codes packed for the screen: tile t, vector v, lane l is code first + (t V + ...) as
// `code_of` says.
struct Packed {
  int64_t first, count, tiles;
  int64_t depth;                   // D, padded to 1, 2, 4 or 8 for the small kernel
  int V;                           // vectors per tile, codes per group
  int width;                       // vectors that lie side by side: 2, or 1 for the small kernel
  std::unique_ptr<float[]> codes;  // [tiles][V / width][depth][width][kLanes], negated
  std::vector<float>
      bias;  // [tiles][V][kLanes]  |b|^2/2, 0 for dot, infinity where there is no code
  std::vector<float> slope, shift;  // [tiles]: E = |a| slope + shift + a part that is the row's

  int64_t tile_codes() const { return static_cast<int64_t>(kLanes) * V; }
};

// Codes of a tile, and their slots: of each pair (or single vector) all lanes, so that stores stay
// in one panel.
void pack_tile(const Book& b, Packed& p, int64_t t, double* row) {
  const int64_t W = p.width, step = W * kLanes, D = b.D;
  float* bias = p.bias.data() + t * p.tile_codes();
  double widest = 0.0;
  for (int slot = 0; slot < p.V * kLanes; ++slot) {
    const int64_t panel = slot / step, l = slot % step / W, w = slot % W, v = panel * W + w;
    const int64_t k = t * p.tile_codes() + l * p.V + v;
    float* out =
        p.codes.get() + t * p.tile_codes() * p.depth + panel * p.depth * step + w * kLanes + l;
    if (k >= p.count || b.skip[p.first + k]) {
      for (int64_t i = 0; i < p.depth; ++i) out[i * step] = 0.0f;
      bias[v * kLanes + l] = std::numeric_limits<float>::infinity();
      continue;
    }
    load64(b.codes + (p.first + k) * D, b.norm(p.first + k), D, row);
    for (int64_t i = 0; i < D; ++i) row[i] = (b.centre[i] - row[i]) * b.scale;
    for (int64_t i = 0; i < D; ++i) out[i * step] = static_cast<float>(row[i]);
    for (int64_t i = D; i < p.depth; ++i) out[i * step] = 0.0f;
    const double square = sum_squares(row, D);
    bias[v * kLanes + l] = b.metric == kDot ? 0.0f : static_cast<float>(square / 2);
    widest = square > widest ? square : widest;
  }
  const double g = static_cast<double>(D + 16) * 0x1p-24, h = static_cast<double>(D + 8) * 0x1p-52;
  const double up = 1.0 + 0x1p-12;  // covers the rounding of these two and of sums with them
  p.slope[t] = static_cast<float>(g * std::sqrt(widest) * up + 0x1p-110);
  p.shift[t] = static_cast<float>((g / 2 + h) * widest * up + 0x1p-110);
}

void pack(const Book& b, int64_t first, int64_t count, int threads, Packed& p) {
  p.first = first;
  p.count = count;
  const bool small = b.D <= 8;
  p.width = small ? 1 : 2;
  p.depth = small ? (b.D <= 2 ? b.D : b.D <= 4 ? 4 : 8) : b.D;
  p.V = small ? 16 : b.D <= 64 ? 8 : 4;
  while (p.V > 2 && p.tile_codes() / 2 >= count) p.V /= 2;
  p.tiles = (count + p.tile_codes() - 1) / p.tile_codes();
  p.codes.reset(new float[p.tiles * p.tile_codes() * p.depth]);
  p.bias.resize(p.tiles * p.tile_codes());
  p.slope.resize(p.tiles);
  p.shift.resize(p.tiles);
  parallel_for(threads, p.tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> row(b.D);
    for (int64_t t = begin; t < end; ++t) pack_tile(b, p, t, row.data());
  });
}

// ---- the screen: minima [rows][tiles][kLanes] of groups of V codes

// R rows against all V vectors of a tile; z in registers
template <int DEPTH, int R>
void small_rows(const float* a, int64_t rows, const float* tile, const float* bias, int V,
                int64_t stride, float* minima) {
  for (int64_t r = 0; r < rows; r += R) {
    VF x[R][DEPTH], m[R];
    for (int i = 0; i < R; ++i) {
      for (int d = 0; d < DEPTH; ++d) x[i][d] = broadcast(a[(r + i) * DEPTH + d]);
      m[i] = broadcast(std::numeric_limits<float>::infinity());
    }
    for (int v = 0; v < V; ++v) {
      const float* c = tile + static_cast<int64_t>(v) * DEPTH * kLanes;
      const VF start = load(bias + v * kLanes);
      VF s[R];
      for (int i = 0; i < R; ++i) s[i] = start;
#pragma GCC unroll 8
      for (int d = 0; d < DEPTH; ++d) {
        const VF y = load(c + d * kLanes);
        for (int i = 0; i < R; ++i) s[i] = fma(x[i][d], y, s[i]);
      }
      for (int i = 0; i < R; ++i) m[i] = lesser(m[i], s[i]);
    }
    for (int i = 0; i < R; ++i) store(minima + (r + i) * stride, m[i]);
  }
}

// kTileRows rows against two vectors of codes at a time; sums in registers
void tile_rows(const float* a, int64_t rows, int64_t D, const float* tile, const float* bias, int V,
               int64_t stride, float* minima) {
  constexpr int R = kTileRows;
  for (int64_t r = 0; r < rows; r += R) {
    const float* x = a + r * D;
    for (int v = 0; v < V; v += 2) {
      const float* c = tile + static_cast<int64_t>(v) * D * kLanes;
      const VF first = load(bias + v * kLanes), second = load(bias + (v + 1) * kLanes);
      VF s0[R], s1[R];
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i) s0[i] = first, s1[i] = second;
      for (int64_t d = 0; d < D; ++d) {
        const VF y0 = load(c + d * 2 * kLanes), y1 = load(c + d * 2 * kLanes + kLanes);
#pragma GCC unroll 12
        for (int i = 0; i < R; ++i) {
          const VF z = broadcast(x[i * D + d]);
          s0[i] = fma(z, y0, s0[i]);
          s1[i] = fma(z, y1, s1[i]);
        }
      }
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i) {
        float* out = minima + (r + i) * stride;
        const VF m = lesser(s0[i], s1[i]);
        store(out, v == 0 ? m : lesser(m, load(out)));
      }
    }
  }
}

void screen(const Packed& p, const float* a, int64_t rows, float* minima) {
  constexpr int kMany = VQFAST_LANES == 16 ? 16 : 8;  // registers for z
  const int64_t stride = p.tiles * kLanes;
  for (int64_t t = 0; t < p.tiles; ++t) {
    const float* tile = p.codes.get() + t * p.tile_codes() * p.depth;
    const float* bias = p.bias.data() + t * p.tile_codes();
    float* out = minima + t * kLanes;
    if (p.width == 2) {
      tile_rows(a, rows, p.depth, tile, bias, p.V, stride, out);
    } else if (p.depth == 8) {
      small_rows<8, kMany / 8>(a, rows, tile, bias, p.V, stride, out);
    } else if (p.depth == 4) {
      small_rows<4, kMany / 4>(a, rows, tile, bias, p.V, stride, out);
    } else if (p.depth == 2) {
      small_rows<2, 4>(a, rows, tile, bias, p.V, stride, out);
    } else {
      small_rows<1, 4>(a, rows, tile, bias, p.V, stride, out);
    }
  }
}

// ---- one block of rows, by one thread

struct Rows {
  std::vector<float> values, a,
      minima;                      // [rows, D] when converted; [rows, depth]; [rows, tiles, kLanes]
  std::vector<double> z, scratch;  // [D]
  std::vector<float> length;       // [rows] |a|, or -1 not finite, or infinity: not to be screened
};

// a = S (z - m), rounded, and its length; false where the row is not finite
float place_row(const Book& b, const float* x, int64_t depth, double* row, float* a) {
  std::fill(a, a + depth, 0.0f);
  if (!all_finite(x, b.D)) return -1.0f;
  load64(x, b.metric == kCosine ? norm64(x, b.D) : 0.0, b.D, row);
  for (int64_t i = 0; i < b.D; ++i) row[i] = (row[i] - b.centre[i]) * b.scale;
  if (largest_magnitude(row, b.D) > kWild) return std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < b.D; ++i) a[i] = static_cast<float>(row[i]);
  return static_cast<float>(std::sqrt(sum_squares(row, b.D)) * (1.0 + 0x1p-12));
}

// every group whose least screened score reaches the bound, in ascending order of codes
template <class F>
void flagged(const Packed& p, const float* minima, float length, int64_t D, F&& group) {
  const bool all = length == std::numeric_limits<float>::infinity();
  const double d = static_cast<double>(D + 8), A = length;
  const float own =
      all ? 0.0f
          : static_cast<float>(d * 0x1p-52 * A * A * (1.0 + 0x1p-12) + d * 0x1p-121 * (1.0 + A));
  VF best = broadcast(std::numeric_limits<float>::infinity());
  if (!all) {
    for (int64_t t = 0; t < p.tiles; ++t) {
      const float e = length * p.slope[t] + p.shift[t] + own;
      best = lesser(best, load(minima + t * kLanes) + e);
    }
  }
  const float least = reduce_min(best);
  for (int64_t t = 0; t < p.tiles; ++t) {
    const float e = all ? 0.0f : length * p.slope[t] + p.shift[t] + own;
    uint32_t mask = at_most(load(minima + t * kLanes), broadcast(all ? least : least + e));
    for (; mask; mask &= mask - 1) {
      const int64_t first = t * p.tile_codes() + static_cast<int64_t>(__builtin_ctz(mask)) * p.V;
      group(p.first + first, p.first + std::min(p.count, first + p.V));
    }
  }
}

struct Answer {
  int64_t* index;
  float* distance;
  double* score;  // best so far over the runs of codes
};

// the codes that `each` names, against row x in float64
template <class F>
void decide(const Book& b, const float* x, double* z, double* scratch, int64_t n, const Answer& out,
            F&& each) {
  const bool cosine = b.metric == kCosine;
  load64(x, cosine ? norm64(x, b.D) : 0.0, b.D, z);
  Contest contest(b.codes, cosine ? b.norms.data() : nullptr, z, scratch, b.D, b.metric);
  each([&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      if (!b.skip[k]) contest.enter(k);
    }
  });
  double score;
  const int64_t k = contest.winner(&score);
  if (k >= 0 && !(out.score[n] <= score)) {  // NaN: the first one
    out.score[n] = score;
    out.index[n] = k;
    out.distance[n] = static_cast<float>(score);
  }
}

void search_block(const Book& b, const Packed& p, const View& z, int64_t n0, int64_t rows, Rows& w,
                  const Answer& out) {
  const int64_t D = b.D, padded = (rows + kRowUnit - 1) / kRowUnit * kRowUnit;
  const float* x = z.as<float>() + n0 * D;
  if (z.dtype != DType::f32) {
    widen(z, n0 * D, rows * D, w.values.data());
    x = w.values.data();
  }
  for (int64_t r = 0; r < rows; ++r) {
    w.length[r] = place_row(b, x + r * D, p.depth, w.z.data(), w.a.data() + r * p.depth);
  }
  std::fill(w.a.data() + rows * p.depth, w.a.data() + padded * p.depth, 0.0f);
  screen(p, w.a.data(), padded, w.minima.data());
  for (int64_t r = 0; r < rows; ++r) {
    if (w.length[r] < 0.0f) continue;  // index 0 and NaN since the start
    decide(b, x + r * D, w.z.data(), w.scratch.data(), n0 + r, out, [&](auto&& enter) {
      flagged(p, w.minima.data() + r * p.tiles * kLanes, w.length[r], D, enter);
    });
  }
}

// a few rows: cheaper in float64 against every code than to pack the codes
void search_directly(const Book& b, const View& z, int64_t N, int threads, const Answer& out) {
  parallel_for(threads, N, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> x(b.D);
    std::vector<double> row(b.D), scratch(b.D);
    for (int64_t n = begin; n < end; ++n) {
      widen(z, n * b.D, b.D, x.data());
      if (!all_finite(x.data(), b.D)) continue;
      decide(b, x.data(), row.data(), scratch.data(), n, out, [&](auto&& enter) { enter(0, b.K); });
    }
  });
}

// rows per block: z and the minima of a block stay in the second-level cache
int64_t block_rows(const Packed& p, int64_t N, int threads) {
  int64_t rows = std::min<int64_t>(96, 32768 / p.depth);
  rows = std::min(rows, (int64_t{1} << 20) / (p.tiles * kLanes * 4));
  rows = std::min(rows, (N + threads - 1) / threads);
  return std::max<int64_t>(1, (rows + kRowUnit - 1) / kRowUnit) * kRowUnit;
}

void run(const Args& args) {
  const View &z = args.t[0], &codebook = args.t[1];
  const int64_t N = z.shape[0], D = z.shape[1], K = codebook.shape[0];
  std::vector<double> scores(N, std::numeric_limits<double>::quiet_NaN());
  const Answer out{args.t[2].as<int64_t>(), args.t[3].as<float>(), scores.data()};
  std::fill(out.index, out.index + N, int64_t{0});
  std::fill(out.distance, out.distance + N, std::numeric_limits<float>::quiet_NaN());
  if (N == 0) return;
  Book book;
  const bool few = N <= kFewRows;
  read_book(codebook, static_cast<int>(args.s[0].i), args.threads, !few, book);
  if (few) return search_directly(book, z, N, args.threads, out);
  const int64_t unit = kLanes * 16;
  const int64_t run_codes =
      std::max(unit, std::min<int64_t>(65536, kPackedBytes / (4 * D)) / unit * unit);
  for (int64_t first = 0; first < K; first += run_codes) {
    Packed p;
    pack(book, first, std::min(run_codes, K - first), args.threads, p);
    const int64_t block = block_rows(p, N, args.threads);
    parallel_for(args.threads, N, block, [&](int64_t begin, int64_t end) {
      Rows w;
      if (z.dtype != DType::f32) w.values.resize(block * D);
      w.a.resize(block * p.depth);
      w.minima.resize(block * p.tiles * kLanes);
      w.z.resize(D);
      w.scratch.resize(D);
      w.length.resize(block);
      for (int64_t n = begin; n < end; n += block)
        search_block(book, p, z, n, std::min(block, end - n), w, out);
    });
  }
}

}  // namespace

KERNEL(nearest, "f32|f16|bf16 f32|f16|bf16 -> i64 f32", run)

}  // namespace vqfast::VQFAST_ISA
