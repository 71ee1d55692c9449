// Computes: y[b, i, j, o] = bias[o] + sum_{p, q, c} x[b, i + p - 1, j + q - 1, c] w[o, p, q, c],
//   zero outside of x: a 3x3 convolution of stride 1 and padding 1. x [B, H, W, C], w [O, 3, 3, C],
//   bias [O], y [B, H, W, O], all contiguous (NCHW tensors in channels_last order).
//
// Contract: any H, W, C, O; small problems are refused, as transforming the weights would not pay.
//
// Numerics: Winograd F(2x2, 3x3): y = A'[(G w G') . (B' x B)]A, each of the 16 products summed over
//   c in blocks of kChain channels, each one chain of float32 multiply-adds. The error is about
//   that of a direct sum; a NaN or infinity spreads over the 2x2 outputs of its tiles. An output
//   does not depend on B, its place in the batch, or the threads.
//
// Shape of the code: 16 C O / 4 multiply-adds per output in place of 9 C O: 2.25 times fewer. A
//   thread takes blocks of 2x2 output tiles: their transformed inputs V [16, tiles, C] stay in L2
//   while panels of 2 kLanes outputs pass by; a register tile is kRows tiles x 2 vectors.
//   Transformed weights are packed [panel, 16, C, 2 kLanes] first.
//
// Ladder: one chain over all of C had 2.3 times the error of torch's NCHW convolution at C = 512;
//   chains of 64 channels, whose weights stay in L1, have 0.7 times (2026-11-23).
#include <algorithm>
#include <vector>

#include "kernel.h"
#include "parallel.h"

#ifndef VQFAST_ISA
namespace vqfast {
namespace {
const char* too_small(const Args& a) {
  const View &x = a.t[0], &w = a.t[1];
  if (x.shape[1] * x.shape[2] < 1024) return "fewer than 1024 positions";
  if (x.shape[3] < 32 || w.shape[0] < 32) return "fewer than 32 channels";
  return nullptr;
}
}  // namespace
REFUSES(conv3x3, too_small)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/conv3x3.cpp"
#include "foreach_isa.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {
namespace {

constexpr int kPanel = 2 * kLanes;            // outputs of a register tile
constexpr int kRows = kLanes == 16 ? 12 : 6;  // tiles of a register tile
constexpr int64_t kChain = 64;                // channels of one chain; its weights fit L1
constexpr int64_t kBlockBytes = 768 << 10;    // of V; the rest of L2 holds a panel of weights

struct Shape {
  int64_t B, H, W, C, O, across, tiles;  // tiles: 2x2 outputs, of one image row by row
  Shape(const Args& a)
      : B(a.t[0].shape[0]),
        H(a.t[0].shape[1]),
        W(a.t[0].shape[2]),
        C(a.t[0].shape[3]),
        O(a.t[1].shape[0]),
        across((W + 1) / 2),
        tiles((H + 1) / 2 * across) {}
  int64_t panels() const { return (O + kPanel - 1) / kPanel; }
  int64_t block() const {  // tiles at a time, a multiple of kRows
    return std::max<int64_t>(kRows, kBlockBytes / (64 * C) / kRows * kRows);
  }
};

// G g G' of the weights of one panel -> packed [16, C, kPanel]
void transform_weights(const float* w, const Shape& s, int64_t panel, float* packed) {
  const int n = static_cast<int>(std::min<int64_t>(kPanel, s.O - panel * kPanel));
  float g[9][kPanel] = {};
  for (int64_t c = 0; c < s.C; ++c) {
    for (int o = 0; o < n; ++o)
      for (int k = 0; k < 9; ++k) g[k][o] = w[((panel * kPanel + o) * 9 + k) * s.C + c];
    for (int half = 0; half < kPanel; half += kLanes) {
      VF rows[4][3];
      for (int q = 0; q < 3; ++q) {
        const VF a = load(g[q] + half), b = load(g[3 + q] + half), d = load(g[6 + q] + half);
        rows[0][q] = a;
        rows[1][q] = (a + b + d) * 0.5f;
        rows[2][q] = (a - b + d) * 0.5f;
        rows[3][q] = d;
      }
      for (int i = 0; i < 4; ++i) {
        const VF a = rows[i][0], b = rows[i][1], d = rows[i][2];
        const VF u[4] = {a, (a + b + d) * 0.5f, (a - b + d) * 0.5f, d};
        for (int j = 0; j < 4; ++j) store(packed + ((i * 4 + j) * s.C + c) * kPanel + half, u[j]);
      }
    }
  }
}

// B' d B of the 4x4 inputs of one tile -> v[f * stride + c]
void transform_input(const float* x, const Shape& s, int64_t tile, float* v, int64_t stride) {
  const float* image = x + tile / s.tiles * s.H * s.W * s.C;
  const int64_t top = tile % s.tiles / s.across * 2 - 1, left = tile % s.across * 2 - 1;
  const float* at[4][4];  // null outside
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const int64_t row = top + i, column = left + j;
      const bool inside = row >= 0 && row < s.H && column >= 0 && column < s.W;
      at[i][j] = inside ? image + (row * s.W + column) * s.C : nullptr;
    }
  for (int64_t c = 0; c < s.C; c += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, s.C - c));
    VF t[4][4];
    for (int j = 0; j < 4; ++j) {
      VF d[4];
      for (int i = 0; i < 4; ++i) d[i] = at[i][j] ? load_n(at[i][j] + c, n) : VF{};
      t[0][j] = d[0] - d[2];
      t[1][j] = d[1] + d[2];
      t[2][j] = d[2] - d[1];
      t[3][j] = d[1] - d[3];
    }
    for (int i = 0; i < 4; ++i) {
      float* to = v + i * 4 * stride + c;
      store_n(to, t[i][0] - t[i][2], n);
      store_n(to + stride, t[i][1] + t[i][2], n);
      store_n(to + 2 * stride, t[i][2] - t[i][1], n);
      store_n(to + 3 * stride, t[i][1] - t[i][3], n);
    }
  }
}

// m [kRows, kPanel] = v [kRows, n of C] u [n, kPanel], or += if add
VQFAST_INLINE void multiply(const float* v, const float* u, int64_t C, int64_t n, bool add,
                            float* m) {
  VF low[kRows] = {}, high[kRows] = {};
  for (int64_t c = 0; c < n; ++c) {
    const VF u0 = load(u + c * kPanel), u1 = load(u + c * kPanel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const VF x = broadcast(v[r * C + c]);
      low[r] = fma(x, u0, low[r]);
      high[r] = fma(x, u1, high[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* to = m + r * kPanel;
    store(to, add ? load(to) + low[r] : low[r]);
    store(to + kLanes, add ? load(to + kLanes) + high[r] : high[r]);
  }
}

// A' m A of one tile and panel, plus bias -> y; m[f * stride + o]
void transform_output(const float* m, int64_t stride, const Shape& s, int64_t tile, int64_t panel,
                      const float* bias, float* y) {
  const int64_t top = tile % s.tiles / s.across * 2, left = tile % s.across * 2;
  float* image = y + tile / s.tiles * s.H * s.W * s.O;
  for (int half = 0; half < kPanel; half += kLanes) {
    const int64_t o = panel * kPanel + half;
    if (o >= s.O) return;
    const int n = static_cast<int>(std::min<int64_t>(kLanes, s.O - o));
    VF t[2][4];
    for (int j = 0; j < 4; ++j) {
      VF d[4];
      for (int i = 0; i < 4; ++i) d[i] = load(m + (i * 4 + j) * stride + half);
      t[0][j] = d[0] + d[1] + d[2];
      t[1][j] = d[1] - d[2] - d[3];
    }
    const VF b = load_n(bias + o, n);
    for (int i = 0; i < 2; ++i) {
      if (top + i >= s.H) break;
      float* to = image + ((top + i) * s.W + left) * s.O + o;
      store_n(to, t[i][0] + t[i][1] + t[i][2] + b, n);
      if (left + 1 < s.W) store_n(to + s.O, t[i][1] - t[i][2] - t[i][3] + b, n);
    }
  }
}

void run(const Args& a) {
  const Shape s(a);
  const float *x = a.t[0].as<float>(), *w = a.t[1].as<float>(), *bias = a.t[2].as<float>();
  float* y = a.t[3].as<float>();
  const int64_t panel_size = 16 * s.C * kPanel, block = s.block();
  std::vector<float> packed(static_cast<size_t>(s.panels() * panel_size));
  parallel_for(a.threads, s.panels(), 1, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p) transform_weights(w, s, p, packed.data() + p * panel_size);
  });
  parallel_for(a.threads, s.B * s.tiles, block, [&](int64_t from, int64_t to) {
    std::vector<float> v(static_cast<size_t>(16 * block * s.C));
    std::vector<float> m(static_cast<size_t>(16 * block * kPanel));
    for (int64_t begin = from; begin < to; begin += block) {
      const int64_t count = std::min(block, to - begin);
      for (int64_t t = 0; t < count; ++t)
        transform_input(x, s, begin + t, v.data() + t * s.C, block * s.C);
      for (int64_t p = 0; p < s.panels(); ++p) {
        for (int f = 0; f < 16; ++f) {
          const float* u = packed.data() + p * panel_size + f * s.C * kPanel;
          float* mf = m.data() + f * block * kPanel;
          for (int64_t c = 0; c < s.C; c += kChain)
            // rows past count hold what an earlier block left: computed, never stored
            for (int64_t t = 0; t < count; t += kRows)
              multiply(v.data() + (f * block + t) * s.C + c, u + c * kPanel, s.C,
                       std::min(kChain, s.C - c), c > 0, mf + t * kPanel);
        }
        for (int64_t t = 0; t < count; ++t)
          transform_output(m.data() + t * kPanel, block * kPanel, s, begin + t, p, bias, y);
      }
    }
  });
}

}  // namespace

KERNEL(conv3x3, "f32 f32 f32 -> f32", run)

}  // namespace vqfast::VQFAST_ISA
