// Computes: dw[o, p, q, c] = sum_{b, i, j} g[b, i, j, o] x[b, i + p - 1, j + q - 1, c] (x zero
//   outside) and db[o] = sum_{b, i, j} g[b, i, j, o]: the gradients of weight and bias of a 3x3
//   convolution of stride 1 and padding 1. x [B, H, W, C], g [B, H, W, O], dw [O, 3, 3, C], db [O],
//   all contiguous; x and g of one type, dw and db of it or float32.
//
// Contract: any H, W, C, O; small problems are refused, as the transforms would not pay.
//
// Numerics: the transpose of Winograd's F(m x m, 3x3) in the weights: dw = G'[sum (A g A') . (B' d
//   B)]G over tiles of m x m gradients g and (m + 2)^2 inputs d. Each of its sums runs over blocks
//   of kWords words of tiles, and these are added in float32 one after the other, those of a span
//   first: an order that depends on the shape alone, not on the threads. Bfloat16: transforms are
//   computed in float32 and rounded to int16, two tiles to a word, about a scale for each block,
//   frequency and channel or output; sums are exact (fixed_point.h). Tiles are balanced first, as
//   large inputs with small gradients would push the others out. m = 4 from 256 positions on, else
//   2. Before the result is rounded the error is 0.23 times that of oneDNN's gradient (root mean
//   square, random data); that of m = 2 with bfloat16 factors was 2.4 times. Float32: m = 4 from
//   16384 positions on, else 2; a block is a sum of chains of kPart multiply-adds. The error of m =
//   4 is 0.9 to 1.5 times that of oneDNN's there, 2 to 4 times on 1024 positions; chains of 32 had
//   1.2 times as much. db sums what is not rounded. A NaN or infinity spoils its channel or output.
//
// Shape of the code: 16 C O / 4 or 36 C O / 16 multiply-adds per position, not 9 C O: 2.25 or 4
//   times fewer. A unit of work is a block of outputs and a panel of 2 kLanes channels, with all
//   its sums, over a span of the positions; a thread takes consecutive units, so that transformed
//   gradients serve all its panels of that block. Few channels and many positions: up to four
//   spans, whose sums are added at the end; else one. Int16 needs two passes: the norms of a vector
//   of channels are known after all tiles of a block. A register tile is kRows outputs x 2 vectors.
//
// Ladder (1 thread of Zen 4, loaded, 2026-11-30), 128 channels at 256px. Bfloat16: oneDNN's 141 ms;
//   F(2x2, 3x3) in bfloat16 48; F(4x4, 3x3) in int16 39; without the largest value of each lane 35;
//   33 as the search for the largest of a tile asks memory for whole rows, of which 21 are the
//   limit of vpdpwssd. Float32: 93 -> 60. 512 channels: 4 images of 16px 19 -> 9.5 as sums end in
//   vectors of channels and 256 outputs are a unit (128: 7 % slower at 256 channels), 7.4 past the
//   caches; one of 16px 2.8, where conv_few_weight takes 6.7; 4 of 4px 1.7, m = 2 1.3 (2.0). No
//   gain: asking for the next tiles (1 to 2 %), blocks of 64 words of int16 (equal) or 128 (5 to
//   10 % slower), all frequencies of a few outputs at a time (30 % slower at 256 channels),
//   prefetching sums (2 %, with F(2x2, 3x3)). 2 threads, before spans and with them: bfloat16 21.8
//   -> 17.1 ms, float32 32.8 -> 29.5; 256 channels at 128px in four spans took 2.3 times as long.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernel.h"
#include "large_pages.h"
#include "parallel.h"

#ifndef VQFAST_ISA
namespace vqfast {
namespace {
const char* why_not(const Inputs& a) {
  const View &x = a.t[0], &g = a.t[1];
  if (x.dtype != g.dtype) return "inputs differ in dtype";
  if (x.shape[0] * x.shape[1] * x.shape[2] < 16) return "fewer than 16 positions";
  if (x.shape[3] < 32) return "fewer than 32 channels";
  return nullptr;
}
}  // namespace
REFUSES(conv3x3_weight, why_not)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/conv3x3_weight.cpp"
#include "foreach_isa.h"
// clang-format off: simd.h comes first
#include "simd.h"
#include "dot.h"
#include "winograd.h"
#include "fixed_point.h"
#include "winograd_gradient.h"
// clang-format on

namespace vqfast::VQFAST_ISA {
namespace {

constexpr int kPanel = 2 * kLanes;                  // channels of a unit
constexpr int64_t kMostOutputs = 256, kLeast = 32;  // of a unit; multiples of kLanes
// With few channels a thread would transform the gradients for few of them: positions are cut into
// spans of at least kSpanBlocks blocks instead, which have sums of their own. With more channels or
// outputs these would leave the caches.
constexpr int64_t kFewChannels = 128, kMostSpans = 4, kSpanBlocks = 8;

// T: of x and g; To: of dw and db; kOut: rows and columns of a tile
template <class T, class To, int kOut>
struct Gradient {
  using Tiles = GradientTiles<T, kOut>;
  using Column = typename Tiles::Column;
  static constexpr bool kFixed = Tiles::kFixed;
  static constexpr int kTaps = Tiles::kTaps, kF = Tiles::kF;
  static constexpr int64_t kWords = Tiles::kWords, kTiles = Tiles::kTiles;
  // outputs of a register tile; float32 has its sums twice
  static constexpr int kRows = kFixed && kLanes == 16 ? 8 : 4;
  static constexpr int64_t kPart = 8;  // words that float32 adds one after the other
  // from frequency to frequency; without the odd vectors here and below all of them would fall into
  // the same sets of L1
  static constexpr int64_t kPanelSize = kWords * kPanel + kLanes;

  Tiles map;
  int64_t C, O, outputs;  // outputs: of a unit
  To *dw, *db;
  int64_t spans;                        // of blocks
  Scratch<float> span_sums, span_bias;  // [spans, units, kF size()] and [spans, O]

  explicit Gradient(const Args& a)
      : map(a),
        C(map.C),
        O(map.O),
        outputs(std::min(kMostOutputs, whole_vectors(O))),
        dw(a.t[2].as<To>()),
        db(a.t[3].as<To>()),
        spans(C > kFewChannels || O > kMostOutputs
                  ? 1
                  : std::clamp<int64_t>(map.blocks / kSpanBlocks, 1, kMostSpans)) {
    while (outputs > kLeast && spans * units() < a.threads) outputs = whole_vectors(outputs / 2);
  }

  static int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
  int64_t panels() const { return (C + kPanel - 1) / kPanel; }
  int64_t units() const { return (O + outputs - 1) / outputs * panels(); }
  int64_t block_size() const { return outputs * kWords + kLanes; }  // of one frequency
  int64_t size() const { return outputs * kPanel + kLanes; }        // likewise of sums of a unit

  // Every loop over the rows is unrolled by hand, the first one too: one that is not keeps the sums
  // in memory.

  // low, high [kRows] = sum over n words of u [kRows of kLanes] v [kPanel]
  template <class Sum>
  VQFAST_INLINE static void chain(const int32_t* u, const int32_t* v, int64_t n, Sum* low,
                                  Sum* high) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) low[r] = high[r] = Sum{};
    for (int64_t t = 0; t < n; ++t, u += kLanes, v += kPanel) {
      const VI v0 = load_int(v), v1 = load_int(v + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const VI each = every_lane(u + r);
        if constexpr (kFixed) {
          low[r] = dot2_int(low[r], v0, each);
          high[r] = dot2_int(high[r], v1, each);
        } else {
          low[r] = fma((VF)each, (VF)v0, low[r]);
          high[r] = fma((VF)each, (VF)v1, high[r]);
        }
      }
    }
  }

  // sums [kRows, kPanel] = or += if add, the same of a block, without the factors of int16
  __attribute__((noinline)) static void multiply(const int32_t* u, const float* u_inverse,
                                                 const int32_t* v, const float* v_inverse,
                                                 int64_t n, bool add, float* sums) {
    VF low[kRows], high[kRows];
    if constexpr (kFixed) {
      VI low_int[kRows], high_int[kRows];
      chain(u, v, n, low_int, high_int);
      const VF left = load(v_inverse), right = load(v_inverse + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        low[r] = __builtin_convertvector(low_int[r], VF) * u_inverse[r] * left;
        high[r] = __builtin_convertvector(high_int[r], VF) * u_inverse[r] * right;
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) low[r] = high[r] = VF{};
      for (int64_t t = 0; t < n; t += kPart) {
        VF low_part[kRows], high_part[kRows];
        chain(u + t * kLanes, v + t * kPanel, std::min(kPart, n - t), low_part, high_part);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          low[r] += low_part[r];
          high[r] += high_part[r];
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      float* to = sums + r * kPanel;
      store(to, add ? load(to) + low[r] : low[r]);
      store(to + kLanes, add ? load(to + kLanes) + high[r] : high[r]);
    }
  }

  // Whole lines of memory go past the caches: nobody reads them before the optimiser, and Linux or
  // the cache would fetch each one before it is written.
  VQFAST_INLINE static void put(To* to, VF v, int n) {
#if VQFAST_LANES == 16
    if constexpr (sizeof(To) == 4)
      if (n == kLanes && reinterpret_cast<uintptr_t>(to) % sizeof v == 0)
        return _mm512_stream_ps(to, (__m512)v);
#endif
    store_n(to, v, n);
  }

  // G' m G of one output and panel -> dw; m[f * stride + c]
  void transform_sums(const float* m, int64_t stride, int64_t o, int64_t panel) const {
    for (int half = 0; half < kPanel; half += kLanes) {
      const int64_t c = panel * kPanel + half;
      if (c >= C) return;
      const int n = static_cast<int>(std::min<int64_t>(kLanes, C - c));
      along_both<Tiles::Line::weight_gradients, kTaps, 3>(
          [&](int i, int j)
              __attribute__((always_inline)) { return load(m + (i * kTaps + j) * stride + half); },
          [&](int p, int q, VF v)
              __attribute__((always_inline)) { put(dw + ((o * 3 + p) * 3 + q) * C + c, v, n); });
    }
  }

  // Panels [from, to) of the outputs from `first` on, over the positions of a span; fresh: its
  // tiles are not balanced yet. The sums of one of several spans -> span_sums, span_bias.
  void run_outputs(int64_t span, int64_t first, int64_t from, int64_t to, bool fresh) const {
    const int64_t here = std::min(outputs, O - first), vectors = (here + kLanes - 1) / kLanes;
    const int64_t start = map.blocks * span / spans * kTiles;
    const int64_t stop = std::min(map.B * map.tiles, map.blocks * (span + 1) / spans * kTiles);
    const auto u = scratch<int32_t>(kF * block_size());
    const auto v = scratch<int32_t>(kF * kPanelSize);
    const auto stage = scratch<float>(kFixed ? kF * Tiles::kStage : 0);
    const auto u_inverse = scratch<float>(kF * outputs), v_inverse = scratch<float>(kF * kPanel);
    const auto zeros = map.no_pixel();
    const auto at = scratch<typename Tiles::Places>(1);
    std::vector<float> bias(static_cast<size_t>(outputs));
    const bool once = stop - start <= kTiles;  // the sums of a panel are used up at once
    const auto own = scratch<float>(spans > 1 ? 0 : (once ? 1 : to - from) * kF * size());
    for (int64_t begin = start; begin < stop || begin == start; begin += kTiles) {
      const int64_t end = std::min(stop, begin + kTiles);
      const int64_t words = (end - begin + Tiles::kPer - 1) / Tiles::kPer;
      map.find(begin, zeros.get(), *at.get());
      if constexpr (kFixed)
        if (fresh) map.balance(begin, *at.get());
      for (int64_t k = 0; k < vectors; ++k) {
        const Column of{u.get() + k * kWords * kLanes, block_size(), kLanes,
                        u_inverse.get() + k * kLanes, outputs};
        const VF total = map.fill_gradients(of, words, stage.get(), *at.get(), first + k * kLanes);
        float* b = bias.data() + k * kLanes;
        store(b, load(b) + total);
      }
      for (int64_t p = from; p < to; ++p) {
        for (int half = 0; half < kPanel && p * kPanel + half < C; half += kLanes) {
          const Column of{v.get() + half, kPanelSize, kPanel, v_inverse.get() + half, kPanel};
          map.fill_inputs(of, words, stage.get(), *at.get(), p * kPanel + half);
        }
        float* m =
            spans > 1 ? sums_of(span, first, p) : own.get() + (once ? 0 : p - from) * kF * size();
        for (int64_t f = 0; f < kF; ++f)
          for (int64_t o = 0; o < here; o += kRows)
            multiply(u.get() + f * block_size() + o / kLanes * kWords * kLanes + o % kLanes,
                     u_inverse.get() + f * outputs + o, v.get() + f * kPanelSize,
                     v_inverse.get() + f * kPanel, words, begin > start,
                     m + f * size() + o * kPanel);
        if (end == stop && spans == 1)
          for (int64_t o = 0; o < here; ++o) transform_sums(m + o * kPanel, size(), first + o, p);
      }
    }
    if (from > 0) return;
    for (int64_t o = 0; o < here; ++o)
      if (spans > 1)
        span_bias[span * O + first + o] = bias[o];
      else
        db[first + o] = from_float<To>(bias[o]);
  }

  float* sums_of(int64_t span, int64_t first, int64_t panel) const {
    const int64_t unit = first / outputs * panels() + panel;
    return span_sums.get() + (span * units() + unit) * kF * size();
  }

  // the sums of all spans, in their order -> dw and db
  void add_spans(int threads) const {
    parallel_for(threads, O, 1, [&](int64_t from, int64_t to) {
      const auto m = scratch<float>(kF * kPanel);
      for (int64_t o = from; o < to; ++o) {
        const int64_t first = o / outputs * outputs;
        for (int64_t p = 0; p < panels(); ++p) {
          for (int64_t span = 0; span < spans; ++span) {
            const float* each = sums_of(span, first, p) + (o - first) * kPanel;
            for (int f = 0; f < kF; ++f, each += size())
              for (int half = 0; half < kPanel; half += kLanes) {
                float* to = m.get() + f * kPanel + half;
                store(to, span > 0 ? load(to) + load(each + half) : load(each + half));
              }
          }
          transform_sums(m.get(), kPanel, o, p);
        }
        float sum = 0;
        for (int64_t span = 0; span < spans; ++span) sum += span_bias[span * O + o];
        db[o] = from_float<To>(sum);
      }
    });
  }

  void run(int threads) {
    const int64_t many = panels(), of_span = units();
    const bool apart = spans % threads == 0;  // each span has one thread
    if constexpr (kFixed)
      if (!apart) map.balance_all(threads);
    span_sums = scratch<float>(spans > 1 ? spans * of_span * kF * size() : 0);
    span_bias = scratch<float>(spans > 1 ? spans * O : 0);
    parallel_for(threads, spans * of_span, apart ? of_span : 1, [&](int64_t from, int64_t to) {
      while (from < to) {
        const int64_t block = from / many % (of_span / many), span = from / of_span;
        const int64_t panel = from % many, some = std::min(to - from, many - panel);
        run_outputs(span, block * outputs, panel, panel + some, apart && block == 0);
        from += some;
      }
    });
    if (spans > 1) add_spans(threads);
  }
};

template <class T, class To>
void run_gradient(const Args& a) {
  // From so many positions on large tiles pay: in int16 more sums to transform, in float32 an error
  // that is more than twice that of a direct sum of fewer.
  constexpr int64_t kLargeTiles = sizeof(T) == 2 ? 256 : 16384;
  const View& x = a.t[0];
  if (x.shape[0] * x.shape[1] * x.shape[2] < kLargeTiles)
    return Gradient<T, To, 2>(a).run(a.threads);
  Gradient<T, To, 4>(a).run(a.threads);
}

void run(const Args& a) {
  if (a.t[0].dtype == DType::f32) return run_gradient<float, float>(a);
  if (a.t[2].dtype == DType::f32) return run_gradient<bf16, float>(a);
  run_gradient<bf16, bf16>(a);
}

}  // namespace

KERNEL(conv3x3_weight, "f32|bf16 f32|bf16 -> f32|bf16 f32|bf16", run)

}  // namespace vqfast::VQFAST_ISA
