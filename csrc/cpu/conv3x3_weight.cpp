// Computes: dw[o, p, q, c] = sum_{b, i, j} g[b, i, j, o] x[b, i + p - 1, j + q - 1, c] (x zero
//   outside) and db[o] = sum_{b, i, j} g[b, i, j, o]: the gradients of weight and bias of a 3x3
//   convolution of stride 1 and padding 1. x [B, H, W, C], g [B, H, W, O], dw [O, 3, 3, C], db [O],
//   all contiguous; x and g of one type, dw and db of it or float32.
//
// Contract: any H, W, C, O; small problems are refused, as the transforms would not pay.
//
// Numerics: the transpose of Winograd's F(2x2, 3x3) in the weights: dw = G'[sum (A g A') . (B' d
//   B)]G over tiles of 2x2 gradients g and 4x4 inputs d. Each of the 16 sums is float32
//   multiply-adds over kWords words of tiles, and these blocks are added one after the other: an
//   order that depends on the shape alone, not on the threads. Bfloat16: transforms are computed in
//   float32 and both factors rounded before they meet, two tiles to a word; db sums what is not
//   rounded.
//
// Shape of the code: 16 C O / 4 multiply-adds per position in place of 9 C O: 2.25 times fewer. A
//   unit of work is a block of channels and a panel of 2 kLanes outputs, with its 16 sums; a thread
//   takes consecutive units and goes over all positions, so that transformed inputs serve all its
//   panels of that block. Blocks of kWords words keep them in L2; a register tile is kRows channels
//   x 2 vectors.
//
// Ladder (1 thread of Zen 4, loaded, 2026-11-30), bfloat16 128 channels at 256px: 51 ms where
//   oneDNN's gradient takes 141; 36 would be the limit of vdpbf16ps. No gain: prefetching the sums
//   before a register tile (+2 %), 64 channels to a unit (equal, 10 % worse in float32).
#include <algorithm>
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
  if (x.shape[0] * x.shape[1] * x.shape[2] < 1024) return "fewer than 1024 positions";
  if (x.shape[3] < 32 || g.shape[3] < 32) return "fewer than 32 channels";
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
// clang-format on

namespace vqfast::VQFAST_ISA {
namespace {

constexpr int kPanel = 2 * kLanes;                   // outputs of a unit
constexpr int kRows = kLanes == 16 ? 8 : 4;          // channels of a register tile
constexpr int64_t kWords = 64;                       // words of one chain of multiply-adds
constexpr int64_t kMostChannels = 128, kLeast = 32;  // of a unit; multiples of kLanes
// words of one of the 16 transformed gradients; without the odd vectors here and below all 16 would
// fall into the same sets of L1
constexpr int64_t kGradientSize = kWords * kPanel + kLanes;

struct Shape {
  int64_t B, H, W, C, O, across, tiles, channels;  // tiles: of one image; channels: of a unit
  Shape(const Args& a)
      : B(a.t[0].shape[0]),
        H(a.t[0].shape[1]),
        W(a.t[0].shape[2]),
        C(a.t[0].shape[3]),
        O(a.t[1].shape[3]),
        across((W + 1) / 2),
        tiles((H + 1) / 2 * across),
        channels(kMostChannels) {
    while (channels > kLeast && units() < a.threads) channels /= 2;
  }
  int64_t panels() const { return (O + kPanel - 1) / kPanel; }
  int64_t input_size() const { return channels * kWords + kLanes; }  // of the 16 inputs
  int64_t units() const { return (C + channels - 1) / channels * panels(); }
};

struct Corner {  // of a tile: its image, and the first row and column of its 2x2 positions
  int64_t image, row, column;
  Corner(const Shape& s, int64_t tile)
      : image(tile / s.tiles), row(tile % s.tiles / s.across * 2), column(tile % s.across * 2) {}
};

// To: of dw and db; kNative: vdpbf16ps and its rounding are there
template <class T, class To, bool kNative>
struct Gradient {
  static constexpr int kPer = 4 / sizeof(T);  // tiles to a word
  Shape s;
  const T *x, *g;
  To *dw, *db;

  explicit Gradient(const Args& a)
      : s(a), x(a.t[0].as<T>()), g(a.t[1].as<T>()), dw(a.t[2].as<To>()), db(a.t[3].as<To>()) {}

  // the same value of the tiles of a word
  VQFAST_INLINE static void put(int32_t* to, VF (&of)[kPer][16], int i) {
    if constexpr (kPer == 1) {
      store((float*)to, of[0][i]);
    } else {
      const VI word = pair<kNative>(of[0][i], of[1][i]);
      __builtin_memcpy(to, &word, sizeof word);
    }
  }

  // B' d B of channels [first, first + s.channels) of the tiles of a word -> v[f * s.input_size() +
  // group * kWords * kLanes], group counts vectors of channels; zeros past C and tile `end`
  void transform_input(int64_t tile, int64_t end, int64_t first, int32_t* v) const {
    const T* from[kPer][4][4];  // null outside
    for (int part = 0; part < kPer; ++part) {
      const Corner at(s, tile + part);
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
          const int64_t row = at.row + i - 1, column = at.column + j - 1;
          const bool inside = row >= 0 && row < s.H && column >= 0 && column < s.W;
          from[part][i][j] = inside && tile + part < end
                                 ? x + ((at.image * s.H + row) * s.W + column) * s.C + first
                                 : nullptr;
        }
    }
    const int64_t groups = s.channels / kLanes, stride = s.input_size();
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t c = group * kLanes;
      const int n = static_cast<int>(std::clamp<int64_t>(s.C - first - c, 0, kLanes));
      VF out[kPer][16];
#pragma GCC unroll 2
      for (int part = 0; part < kPer; ++part) {
        VF t[4][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          VF d[4];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i)
            d[i] = n > 0 && from[part][i][j] ? load_n(from[part][i][j] + c, n) : VF{};
          t[0][j] = d[0] - d[2];
          t[1][j] = d[1] + d[2];
          t[2][j] = d[2] - d[1];
          t[3][j] = d[1] - d[3];
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          out[part][i * 4] = t[i][0] - t[i][2];
          out[part][i * 4 + 1] = t[i][1] + t[i][2];
          out[part][i * 4 + 2] = t[i][2] - t[i][1];
          out[part][i * 4 + 3] = t[i][1] - t[i][3];
        }
      }
#pragma GCC unroll 16
      for (int f = 0; f < 16; ++f) put(v + f * stride + c * kWords, out, f);
    }
  }

  // A g A' of the tiles of a word and one panel -> u[f * kGradientSize]; zeros past O and tile
  // `end`; total [kPanel] += the sum of each tile's gradients
  void transform_gradient(int64_t tile, int64_t end, int64_t panel, int32_t* u,
                          float* total) const {
    for (int half = 0; half < kPanel; half += kLanes) {
      const int64_t o = panel * kPanel + half;
      const int n = static_cast<int>(std::clamp<int64_t>(s.O - o, 0, kLanes));
      VF out[kPer][16];
#pragma GCC unroll 2
      for (int part = 0; part < kPer; ++part) {
        const Corner at(s, tile + part);
        VF t[4][2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          VF d[2] = {};
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            const int64_t row = at.row + i, column = at.column + j;
            if (n > 0 && tile + part < end && row < s.H && column < s.W)
              d[i] = load_n(g + ((at.image * s.H + row) * s.W + column) * s.O + o, n);
          }
          t[0][j] = d[0];
          t[1][j] = d[0] + d[1];
          t[2][j] = d[0] - d[1];
          t[3][j] = -d[1];
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          out[part][i * 4] = t[i][0];
          out[part][i * 4 + 1] = t[i][0] + t[i][1];
          out[part][i * 4 + 2] = t[i][0] - t[i][1];
          out[part][i * 4 + 3] = -t[i][1];
        }
        store(total + half, load(total + half) + out[part][5]);
      }
#pragma GCC unroll 16
      for (int f = 0; f < 16; ++f) put(u + f * kGradientSize + half, out, f);
    }
  }

  // sums [kRows, kPanel] += sum over n words of v [kRows of kLanes] u [kPanel]. Every loop over the
  // rows is unrolled by hand, the first one too: one that is not keeps the sums in memory.
  __attribute__((noinline)) static void multiply(const int32_t* v, const int32_t* u, int64_t n,
                                                 float* sums) {
    VF low[kRows], high[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) low[r] = high[r] = VF{};
    for (int64_t t = 0; t < n; ++t, v += kLanes, u += kPanel) {
      const VI u0 = load_int(u), u1 = load_int(u + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const VI each = every_lane(v + r);
        if constexpr (kPer == 2) {
          low[r] = dot2<kNative>(low[r], u0, each);
          high[r] = dot2<kNative>(high[r], u1, each);
        } else {
          low[r] = fma((VF)each, (VF)u0, low[r]);
          high[r] = fma((VF)each, (VF)u1, high[r]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      float* to = sums + r * kPanel;
      store(to, load(to) + low[r]);
      store(to + kLanes, load(to + kLanes) + high[r]);
    }
  }

  // G' m G of one channel and panel -> dw; m[f * stride + o]
  void transform_sums(const float* m, int64_t stride, int64_t c, int64_t panel) const {
    for (int half = 0; half < kPanel; half += kLanes) {
      VF t[3][4];
      for (int j = 0; j < 4; ++j) {
        VF d[4];
        for (int i = 0; i < 4; ++i) d[i] = load(m + (i * 4 + j) * stride + half);
        t[0][j] = d[0] + (d[1] + d[2]) * 0.5f;
        t[1][j] = (d[1] - d[2]) * 0.5f;
        t[2][j] = (d[1] + d[2]) * 0.5f + d[3];
      }
      To out[9][kLanes];
      for (int i = 0; i < 3; ++i) {
        store(out[i * 3], t[i][0] + (t[i][1] + t[i][2]) * 0.5f);
        store(out[i * 3 + 1], (t[i][1] - t[i][2]) * 0.5f);
        store(out[i * 3 + 2], (t[i][1] + t[i][2]) * 0.5f + t[i][3]);
      }
      const int64_t first = panel * kPanel + half, end = std::min(s.O, first + kLanes);
      for (int64_t o = first; o < end; ++o)
        for (int k = 0; k < 9; ++k) dw[(o * 9 + k) * s.C + c] = out[k][o - first];
    }
  }

  // panels [from, to) of the block of channels from `first` on, over all positions
  void run_block(int64_t first, int64_t from, int64_t to) const {
    const int64_t size = s.channels * kPanel, tiles = s.B * s.tiles;
    const auto v = scratch<int32_t>(16 * s.input_size());
    const auto u = scratch<int32_t>(16 * kGradientSize);
    std::vector<float> sums(static_cast<size_t>((to - from) * 16 * size));
    std::vector<float> bias(static_cast<size_t>((to - from) * kPanel));
    for (int64_t begin = 0; begin < tiles; begin += kWords * kPer) {
      const int64_t end = std::min(tiles, begin + kWords * kPer);
      const int64_t words = (end - begin + kPer - 1) / kPer;
      for (int64_t t = 0; t < words; ++t)
        transform_input(begin + t * kPer, end, first, v.get() + t * kLanes);
      for (int64_t p = from; p < to; ++p) {
        float total[kPanel] = {};
        for (int64_t t = 0; t < words; ++t)
          transform_gradient(begin + t * kPer, end, p, u.get() + t * kPanel, total);
        float* m = sums.data() + (p - from) * 16 * size;
        for (int64_t f = 0; f < 16; ++f)
          for (int64_t c = 0; c < s.channels; c += kRows)
            multiply(v.get() + f * s.input_size() + c / kLanes * kWords * kLanes + c % kLanes,
                     u.get() + f * kGradientSize, words, m + f * size + c * kPanel);
        float* b = bias.data() + (p - from) * kPanel;
        for (int i = 0; i < kPanel; ++i) b[i] += total[i];
      }
    }
    for (int64_t p = from; p < to; ++p) {
      const float* m = sums.data() + (p - from) * 16 * size;
      for (int64_t c = first; c < std::min(s.C, first + s.channels); ++c)
        transform_sums(m + (c - first) * kPanel, size, c, p);
      if (first > 0) continue;
      const float* b = bias.data() + (p - from) * kPanel;
      for (int64_t o = p * kPanel; o < std::min(s.O, (p + 1) * kPanel); ++o)
        db[o] = from_float<To>(b[o - p * kPanel]);
    }
  }

  void run(int threads) const {
    const int64_t panels = s.panels();
    parallel_for(threads, s.units(), 1, [&](int64_t from, int64_t to) {
      while (from < to) {
        const int64_t block = from / panels, end = std::min(to, (block + 1) * panels);
        run_block(block * s.channels, from - block * panels, end - block * panels);
        from = end;
      }
    });
  }
};

template <class T, bool kNative>
void run_gradient(const Args& a) {
  if (a.t[2].dtype == DType::f32) return Gradient<T, float, kNative>(a).run(a.threads);
  if constexpr (sizeof(T) == 2) Gradient<T, T, kNative>(a).run(a.threads);
}

void run(const Args& a) {
  if (a.t[0].dtype == DType::f32) return run_gradient<float, false>(a);
#if VQFAST_LANES == 16
  if (has_avx512_bf16()) return run_gradient<bf16, true>(a);
#endif
  run_gradient<bf16, false>(a);
}

}  // namespace

KERNEL(conv3x3_weight, "f32|bf16 f32|bf16 -> f32|bf16 f32|bf16", run)

}  // namespace vqfast::VQFAST_ISA
