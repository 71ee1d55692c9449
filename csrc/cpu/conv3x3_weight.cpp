// Computes: dw[o, p, q, c] = sum_{b, i, j} g[b, i, j, o] x[b, i + p - 1, j + q - 1, c] (x zero
//   outside) and db[o] = sum_{b, i, j} g[b, i, j, o]: the gradients of weight and bias of a 3x3
//   convolution of stride 1 and padding 1. x [B, H, W, C], g [B, H, W, O], dw [O, 3, 3, C], db [O],
//   all contiguous.
//
// Contract: any H, W, C, O; small problems are refused, as the transforms would not pay.
//
// Numerics: the transpose of Winograd's F(2x2, 3x3) in the weights: dw = G'[sum (A g A') . (B' d
//   B)]G over tiles of 2x2 gradients g and 4x4 inputs d. Each of the 16 sums is float32
//   multiply-adds over kTiles tiles, and these blocks are added one after the other: an order that
//   depends on the shape alone, not on the threads.
//
// Shape of the code: 16 C O / 4 multiply-adds per position in place of 9 C O: 2.25 times fewer. A
//   unit of work is a block of channels and a panel of 2 kLanes outputs, with its 16 sums; a thread
//   takes consecutive units and goes over all positions, so that transformed inputs serve all its
//   panels of that block. Blocks of kTiles tiles keep them in L2; a register tile is kRows channels
//   x 2 vectors.
#include <algorithm>
#include <vector>

#include "kernel.h"
#include "parallel.h"

#ifndef VQFAST_ISA
namespace vqfast {
namespace {
const char* too_small(const Args& a) {
  const View &x = a.t[0], &g = a.t[1];
  if (x.shape[0] * x.shape[1] * x.shape[2] < 1024) return "fewer than 1024 positions";
  if (x.shape[3] < 32 || g.shape[3] < 32) return "fewer than 32 channels";
  return nullptr;
}
}  // namespace
REFUSES(conv3x3_weight, too_small)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/conv3x3_weight.cpp"
#include "foreach_isa.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {
namespace {

constexpr int kPanel = 2 * kLanes;                   // outputs of a unit
constexpr int kRows = kLanes == 16 ? 8 : 4;          // channels of a register tile
constexpr int64_t kTiles = 64;                       // 2x2 tiles of one chain of multiply-adds
constexpr int64_t kMostChannels = 128, kLeast = 32;  // of a unit; multiples of kLanes
// floats of one of the 16 transformed gradients; without the odd vectors here and below all 16 would
// fall into the same sets of L1
constexpr int64_t kGradientSize = kTiles * kPanel + kLanes;

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
  int64_t input_size() const { return channels * kTiles + kLanes; }  // of the 16 inputs
  int64_t units() const { return (C + channels - 1) / channels * panels(); }
};

struct Corner {  // of a tile: its image, and the first row and column of its 2x2 positions
  int64_t image, row, column;
  Corner(const Shape& s, int64_t tile)
      : image(tile / s.tiles),
        row(tile % s.tiles / s.across * 2),
        column(tile % s.across * 2) {}
};

// B' d B of channels [first, first + s.channels) of one tile -> v[f * s.input_size() + g * kTiles *
// kLanes], where g counts vectors of channels; zeros past C
void transform_input(const float* x, const Shape& s, int64_t tile, int64_t first, float* v) {
  const Corner at(s, tile);
  const float* from[4][4];  // null outside
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const int64_t row = at.row + i - 1, column = at.column + j - 1;
      const bool inside = row >= 0 && row < s.H && column >= 0 && column < s.W;
      from[i][j] = inside ? x + ((at.image * s.H + row) * s.W + column) * s.C + first : nullptr;
    }
  const int64_t groups = s.channels / kLanes, stride = s.input_size();
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t left = s.C - first - g * kLanes;
    const int n = static_cast<int>(std::clamp<int64_t>(left, 0, kLanes));
    VF t[4][4];
    for (int j = 0; j < 4; ++j) {
      VF d[4];
      for (int i = 0; i < 4; ++i)
        d[i] = n > 0 && from[i][j] ? load_n(from[i][j] + g * kLanes, n) : VF{};
      t[0][j] = d[0] - d[2];
      t[1][j] = d[1] + d[2];
      t[2][j] = d[2] - d[1];
      t[3][j] = d[1] - d[3];
    }
    for (int i = 0; i < 4; ++i) {
      float* to = v + i * 4 * stride + g * kTiles * kLanes;
      store(to, t[i][0] - t[i][2]);
      store(to + stride, t[i][1] + t[i][2]);
      store(to + 2 * stride, t[i][2] - t[i][1]);
      store(to + 3 * stride, t[i][1] - t[i][3]);
    }
  }
}

// A g A' of one tile and panel -> u[f * kGradientSize]; zeros past O
void transform_gradient(const float* g, const Shape& s, int64_t tile, int64_t panel, float* u) {
  const Corner at(s, tile);
  for (int half = 0; half < kPanel; half += kLanes) {
    const int64_t o = panel * kPanel + half;
    const int n = static_cast<int>(std::clamp<int64_t>(s.O - o, 0, kLanes));
    VF t[4][2];
    for (int j = 0; j < 2; ++j) {
      VF d[2] = {};
      for (int i = 0; i < 2; ++i) {
        const int64_t row = at.row + i, column = at.column + j;
        if (n > 0 && row < s.H && column < s.W)
          d[i] = load_n(g + ((at.image * s.H + row) * s.W + column) * s.O + o, n);
      }
      t[0][j] = d[0];
      t[1][j] = d[0] + d[1];
      t[2][j] = d[0] - d[1];
      t[3][j] = -d[1];
    }
    for (int i = 0; i < 4; ++i) {
      const VF out[4] = {t[i][0], t[i][0] + t[i][1], t[i][0] - t[i][1], -t[i][1]};
      for (int j = 0; j < 4; ++j) store(u + (i * 4 + j) * kGradientSize + half, out[j]);
    }
  }
}

// sums [kRows, kPanel] += sum over n tiles of v [kRows of kLanes] u [kPanel]
VQFAST_INLINE void multiply(const float* v, const float* u, int64_t n, float* sums) {
  VF low[kRows] = {}, high[kRows] = {};
  for (int64_t t = 0; t < n; ++t) {
    const VF u0 = load(u + t * kPanel), u1 = load(u + t * kPanel + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const VF x = broadcast(v[t * kLanes + r]);
      low[r] = fma(x, u0, low[r]);
      high[r] = fma(x, u1, high[r]);
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
void transform_sums(const float* m, int64_t stride, const Shape& s, int64_t c, int64_t panel,
                    float* dw) {
  for (int half = 0; half < kPanel; half += kLanes) {
    VF t[3][4];
    for (int j = 0; j < 4; ++j) {
      VF d[4];
      for (int i = 0; i < 4; ++i) d[i] = load(m + (i * 4 + j) * stride + half);
      t[0][j] = d[0] + (d[1] + d[2]) * 0.5f;
      t[1][j] = (d[1] - d[2]) * 0.5f;
      t[2][j] = (d[1] + d[2]) * 0.5f + d[3];
    }
    float out[9][kLanes];
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
void run_block(const float* x, const float* g, const Shape& s, int64_t first, int64_t from,
               int64_t to, float* dw, float* db) {
  const int64_t size = s.channels * kPanel;
  std::vector<float> v(static_cast<size_t>(16 * s.input_size()));
  std::vector<float> u(static_cast<size_t>(16 * kGradientSize));
  std::vector<float> sums(static_cast<size_t>((to - from) * 16 * size));
  std::vector<float> bias(static_cast<size_t>((to - from) * kPanel));
  for (int64_t begin = 0; begin < s.B * s.tiles; begin += kTiles) {
    const int64_t count = std::min(kTiles, s.B * s.tiles - begin);
    for (int64_t t = 0; t < count; ++t)
      transform_input(x, s, begin + t, first, v.data() + t * kLanes);
    for (int64_t p = from; p < to; ++p) {
      for (int64_t t = 0; t < count; ++t)
        transform_gradient(g, s, begin + t, p, u.data() + t * kPanel);
      float* m = sums.data() + (p - from) * 16 * size;
      for (int64_t f = 0; f < 16; ++f)
        for (int64_t c = 0; c < s.channels; c += kRows)
          multiply(v.data() + f * s.input_size() + c / kLanes * kTiles * kLanes + c % kLanes,
                   u.data() + f * kGradientSize, count, m + f * size + c * kPanel);
      if (first > 0) continue;
      float* b = bias.data() + (p - from) * kPanel;
      for (int half = 0; half < kPanel; half += kLanes) {
        VF total = {};  // the sum of a tile's four gradients is u of f = 5
        for (int64_t t = 0; t < count; ++t)
          total = total + load(u.data() + 5 * kGradientSize + t * kPanel + half);
        store(b + half, load(b + half) + total);
      }
    }
  }
  for (int64_t p = from; p < to; ++p) {
    const float* m = sums.data() + (p - from) * 16 * size;
    for (int64_t c = first; c < std::min(s.C, first + s.channels); ++c)
      transform_sums(m + (c - first) * kPanel, size, s, c, p, dw);
    if (first > 0) continue;
    const float* b = bias.data() + (p - from) * kPanel;
    std::copy(b, b + std::min<int64_t>(kPanel, s.O - p * kPanel), db + p * kPanel);
  }
}

void run(const Args& a) {
  const Shape s(a);
  const float *x = a.t[0].as<float>(), *g = a.t[1].as<float>();
  float *dw = a.t[2].as<float>(), *db = a.t[3].as<float>();
  const int64_t panels = s.panels();
  parallel_for(a.threads, s.units(), 1, [&](int64_t from, int64_t to) {
    while (from < to) {
      const int64_t block = from / panels, end = std::min(to, (block + 1) * panels);
      run_block(x, g, s, block * s.channels, from - block * panels, end - block * panels, dw, db);
      from = end;
    }
  });
}

}  // namespace

KERNEL(conv3x3_weight, "f32 f32 -> f32 f32", run)

}  // namespace vqfast::VQFAST_ISA
