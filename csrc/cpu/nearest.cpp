// Computes: for each row z_n the nearest code, argmin_k score64(z_n, c_k), and that score; the
//   definition is in nearest_exact.h.
// Contract: z [N, D], codebook [K, D] contiguous; ties give the lowest index; a row that is not
//   finite gives index 0 and score NaN; a code that is not finite never wins. Equal on every
//   instruction set, thread count and split of the rows.
// Numerics: three steps, each of which keeps every code that may win by a proved bound: a screen
//   (int8 or int16, nearest_int.h; float32, nearest_f32.h; cells of codes, nearest_cells.h) leaves
//   some groups of codes, a float32 score of these (nearest_rerank.h) one or two codes, float64
//   decides.
// Shape of the code: codes are packed on every call, as a cache keyed by address goes stale unseen.
//   Codes equal to an earlier one are dropped, as a collapsed codebook would send all of them to
//   float64. Rows are cut into blocks whose minima stay in the second-level cache; a block belongs
//   to one thread. A few rows are not worth packing for: all codes go to the second step, shared
//   out by codes. Memory: 32 MiB of packed codes, under 4 MiB per thread, 8 bytes per row.
// Ladder: see bench/LOG.md, 2026-11-25.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "half.h"
#include "kernel.h"
#include "parallel.h"
#define VQFAST_THIS_FILE "cpu/nearest.cpp"
#include "foreach_isa.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {
namespace {

VQFAST_INLINE VF lesser(VF a, VF b) {
#if VQFAST_LANES == 16
  return (VF)_mm512_min_ps((__m512)a, (__m512)b);
#elif VQFAST_LANES == 8
  return (VF)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return vmin(a, b);
#endif
}

VQFAST_INLINE VF larger(VF a, VF b) {
#if VQFAST_LANES == 16
  return (VF)_mm512_max_ps((__m512)a, (__m512)b);
#elif VQFAST_LANES == 8
  return (VF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return vmax(a, b);
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

// clang-format off: each needs those before it
#include "nearest_exact.h"
#include "nearest_book.h"
#include "nearest_rerank.h"
#include "nearest_f32.h"
#include "nearest_cells.h"
#if defined(VQFAST_VNNI) || VQFAST_LANES == 8
#define VQFAST_INT_SCREEN 1
#include "nearest_int.h"
#endif
// clang-format on

constexpr int64_t kFewRows = 8;
// Where int8 leaves too many codes, or saves too little, float32 screens with whole rows in
// registers: at D 4 (65,536 codes) it takes 0.45 of int8's time, at D 8 1.8 times (262,144: 2.4
// times, 1,024: 0.85 times). One thread of Zen 5, 2026-11-25.
constexpr bool int_pays(int64_t K, int64_t D) { return D > 8 || (D > 4 && K >= 4096); }

struct Answer {
  int64_t* index;
  float* distance;
  double* score;  // best so far over the runs of codes, NaN before the first
};

// Scratch of one row in the second and third step.
struct Decision {
  std::vector<double> z, scratch;  // [D]
  std::vector<float> unit;         // [D] a row divided by its norm
  Shortlist shortlist;

  explicit Decision(int64_t D) : z(D), scratch(D), unit(D) {}

  // The best of the codes that `each` names, or -1. norm: of the row, for cosine; else 0.
  template <class F>
  int64_t best(const Book& b, const float* x, double norm, bool rounded, double* score, F&& each) {
    load64(x, norm, b.D, z.data());
    if (b.metric == kCosine) {
      for (int64_t i = 0; i < b.D; ++i) unit[i] = static_cast<float>(z[i]);
      x = unit.data();
    }
    shortlist.start(b, x);
    each(shortlist);
    Contest contest(b.codes, z.data(), scratch.data(), b.D, b.metric);
    shortlist.survivors([&](int64_t k) {
      if (all_finite(b.codes + k * b.D, b.D)) contest.enter(k);
    });
    return contest.winner(score, rounded);
  }
};

void keep(const Answer& out, int64_t n, int64_t k, double score) {
  if (k < 0 || out.score[n] <= score) return;  // NaN: the first one
  out.score[n] = score;
  out.index[n] = k;
  out.distance[n] = static_cast<float>(score);
}

// norm of a row as `load64` takes it, negative where the row is not finite
double row_norm(const float* x, int64_t D, int metric) {
  if (!all_finite(x, D)) return -1.0;
  return metric == kCosine ? norm64(x, D) : 0.0;
}

// Rows of one thread, a block at a time.
template <class Screen>
struct Blocks {
  const Book& book;
  const Screen& screen;
  const View& z;
  int64_t size;
  typename Screen::Rows rows;
  std::vector<float> values;  // [size, D], where z is not float32
  std::vector<double> norms;  // [size]
  Decision decision;

  Blocks(const Book& book, const Screen& screen, const View& z, int64_t size)
      : book(book), screen(screen), z(z), size(size), norms(size), decision(book.D) {
    screen.reserve(rows, size);
    if (z.dtype != DType::f32) values.resize(size * book.D);
  }

  // screens rows n0 .. n0 + count and calls f(row of the block, its values)
  template <class F>
  void each(int64_t n0, int64_t count, F&& f) {
    const int64_t D = book.D;
    const float* x = z.as<float>() + n0 * D;
    if (z.dtype != DType::f32) {
      widen(z, n0 * D, count * D, values.data());
      x = values.data();
    }
    for (int64_t r = 0; r < count; ++r) norms[r] = row_norm(x + r * D, D, book.metric);
    screen.screen(x, norms.data(), count, rows);
    for (int64_t r = 0; r < count; ++r) {
      if (norms[r] >= 0.0) f(r, x + r * D);  // else index 0 and NaN since the start
    }
  }

  void search(int64_t n0, int64_t count, const Answer& out) {
    const bool whole = screen.count == book.K;
    each(n0, count, [&](int64_t r, const float* x) {
      double score;
      const int64_t k = decision.best(book, x, norms[r], whole, &score,
                                      [&](Shortlist& list) { screen.flagged(rows, r, list); });
      keep(out, n0 + r, k, score);
    });
  }
};

template <class Screen>
void search_run(const Book& book, const Screen& screen, const View& z, int threads,
                const Answer& out) {
  const int64_t N = z.shape[0], block = screen.block_rows(N, threads);
  parallel_for(threads, N, block, [&](int64_t begin, int64_t end) {
    Blocks<Screen> blocks(book, screen, z, block);
    for (int64_t n = begin; n < end; n += block) blocks.search(n, std::min(block, end - n), out);
  });
}

// Few rows: every code goes to the second step. Each thread takes a range of codes.
void search_directly(const Book& b, const View& z, int threads, const Answer& out) {
  const int64_t N = z.shape[0], D = b.D;
  const int64_t parts = std::min<int64_t>(threads, std::max<int64_t>(1, b.K * N * D >> 14));
  std::vector<float> values(N * D);
  widen(z, 0, N * D, values.data());
  std::vector<int64_t> code(parts * N, -1);
  std::vector<double> score(parts * N);
  parallel_for(threads, parts, 1, [&](int64_t begin, int64_t end) {
    Decision decision(D);
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t n = 0; n < N; ++n) {
        const float* x = values.data() + n * D;
        const double norm = row_norm(x, D, b.metric);
        if (norm < 0.0) continue;
        code[p * N + n] = decision.best(
            b, x, norm, parts == 1, &score[p * N + n],
            [&](Shortlist& list) { list.enter(b.K * p / parts, b.K * (p + 1) / parts); });
      }
    }
  });
  for (int64_t p = 0; p < parts; ++p) {
    for (int64_t n = 0; n < N; ++n) keep(out, n, code[p * N + n], score[p * N + n]);
  }
}

#ifdef VQFAST_INT_SCREEN
// Counts what a screen leaves.
struct Tally {
  int64_t codes = 0;
  void enter(int64_t begin, int64_t end) { codes += std::max<int64_t>(0, end - begin); }
  float high() const { return std::numeric_limits<float>::infinity(); }
};

// Whether the integer screen of these codes leaves few enough of them, by a sample of rows.
bool selective(const Book& book, const IntScreen& screen, const View& z) {
  constexpr int64_t kSample = 16;
  const int64_t N = z.shape[0], rows = std::min(kSample, N);
  Blocks<IntScreen> blocks(book, screen, z, kSample);
  Tally left;
  int64_t seen = 0;
  for (int64_t j = 0; j < rows; j += IntScreen::kRowUnit) {
    blocks.each(j * (N - rows) / rows + j, std::min(IntScreen::kRowUnit, rows - j),
                [&](int64_t r, const float*) {
                  ++seen;
                  screen.flagged(blocks.rows, r, left);
                });
  }
  return left.codes * 16 <= std::max<int64_t>(1024, seen * screen.count);
}

// Calls use(screen) when codes and rows are for integers. false: they are not, and nothing was
// used.
template <class F>
bool with_integers(Book& book, const View& z, int64_t first, int64_t count, int threads, F&& use) {
  IntScreen screen;
  screen.pack(book, first, count, threads);
  if (!screen.fits() || !selective(book, screen, z)) return false;
  use(screen);
  return true;
}
#endif

// Cutting the codes into cells costs what other screens take for some 128 rows and halving. It
// saves half of 8,192 rows at D 4 and K 16,384, two thirds at D 5 and K 65,536, nothing at D 8 and
// K 262,144 (Zen 5, 2026-11-25).
bool cells_pay(const Book& b, int64_t N) {
  const int halvings = std::ilogb(static_cast<double>(b.K)) - 5;
  const bool few_dimensions = b.D <= 4 || (b.D <= CellScreen::kMaxD && b.K >= 65536);
  return few_dimensions && b.metric != kDot && b.K >= 2048 && N >= 128 * halvings;
}

// Packs the codes for the rows of z, a run of codes after another; use(screen) after each.
template <class F>
void each_screen(Book& book, const View& z, int threads, F&& use) {
  prepare_book(book);
  if (cells_pay(book, z.shape[0])) {
    CellScreen screen;
    screen.build(book, threads);
    if (screen.cells > 0) use(screen);
    return;
  }
  int64_t first = 0;
#ifdef VQFAST_INT_SCREEN
  const int64_t run = IntScreen::run_codes(book);
  while (int_pays(book.K, book.D) && first < book.K) {
    const int64_t count = std::min(run, book.K - first);
    if (!with_integers(book, z, first, count, threads, use)) break;
    first += count;
  }
#endif
  if (first == book.K) return;
  FloatScreen screen;
  screen.begin(book, threads);
  while (first < book.K) {
    const int64_t count = std::min(FloatScreen::run_codes(book), book.K - first);
    screen.pack(book, first, count, threads);
    use(screen);
    first += count;
  }
}

void run(const Args& args) {
  const View &z = args.t[0], &codebook = args.t[1];
  const int64_t N = z.shape[0];
  std::vector<double> scores(N, std::numeric_limits<double>::quiet_NaN());
  const Answer out{args.t[2].as<int64_t>(), args.t[3].as<float>(), scores.data()};
  std::fill(out.index, out.index + N, int64_t{0});
  std::fill(out.distance, out.distance + N, std::numeric_limits<float>::quiet_NaN());
  if (N == 0) return;
  Book book;
  open_book(codebook, static_cast<int>(args.s[0].i), args.threads, book);
  if (N <= kFewRows) return search_directly(book, z, args.threads, out);
  each_screen(book, z, args.threads,
              [&](const auto& screen) { search_run(book, screen, z, args.threads, out); });
}

// All that a search of z does before its first row: no op, benches time it. Gives the number of
// codes that were packed, which leaves out repeated ones and those that are not finite.
void run_prepare(const Args& args) {
  const View &z = args.t[0], &codebook = args.t[1];
  Book book;
  open_book(codebook, static_cast<int>(args.s[0].i), args.threads, book);
  if (z.shape[0] > kFewRows) each_screen(book, z, args.threads, [](const auto&) {});
  *args.t[2].as<int64_t>() = std::count(book.skip.begin(), book.skip.end(), uint8_t{0});
}

#undef VQFAST_INT_SCREEN

}  // namespace

KERNEL(nearest, "f32|f16|bf16 f32|f16|bf16 -> i64 f32", run)
KERNEL(nearest_prepare, "f32|f16|bf16 f32|f16|bf16 -> i64", run_prepare)

}  // namespace vqfast::VQFAST_ISA
