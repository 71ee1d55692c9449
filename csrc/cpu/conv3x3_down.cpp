// Computes: y[b, i, j, o] = bias[o] + sum_{p, q, c} x[b, 2 i + p, 2 j + q, c] w[o, p, q, c], p and
//   q in 0..2, x zero below and to the right of it: a 3x3 convolution of stride 2. x [B, H, W, C],
//   w [O, 3, 3, C], bias [O], y [B, H / 2, W / 2, O], all contiguous (NCHW tensors in channels_last
//   order) and of one type.
//
// Contract: any H and W from 2 on, any C, O; small problems are refused, as transforming the
//   weights would not pay.
//
// Numerics: along one axis, two outputs from five pixels x0 .. x4:
//     a0 = w0 (x0 - x2) + w1 x1,   a1 = (w0 + w2) x2,   a2 = w2 (x4 - x2) + w1 x3,
//     y0 = a0 + a1,   y1 = a1 + a2,
//   which is Winograd's F(2, 2) for w0 and w2 and a plain product for w1. Each product is summed
//   over c in blocks of kChain words of channels, each one chain of float32 multiply-adds, and the
//   blocks one after the other. Bfloat16: transforms are computed in float32, both factors rounded
//   before they meet, and the result once. A NaN or infinity spreads over the 2x2 outputs of its
//   tile. An output does not depend on B, its place in the batch, or the threads.
//
// Shape of the code: 25 C O / 4 multiply-adds per output in place of 9 C O: 1.44 times fewer. The
//   25 products of a tile meet 16 different weights and end in 9 sums, of which the outputs are
//   made. A thread takes blocks of tiles: their transformed inputs V [25, tiles, C] stay in L2
//   while panels of 2 kLanes outputs pass by, packed [panel, 16, C, 2 kLanes].
//
// Ladder: 1 thread of Zen 4, 2026-11-30, against a padded copy and oneDNN: 128 channels at 256px
//   bfloat16 18.5 ms (25.3), float32 36 (66); 256 at 32px 1.2 (1.6) and 2.8 (3.4). With 512
//   channels at 16px packing the weights takes longer than all of oneDNN's work.
#include <algorithm>
#include <type_traits>

#include "kernel.h"
#include "large_pages.h"
#include "parallel.h"

#ifndef VQFAST_ISA
namespace vqfast {
namespace {
const char* why_not_down(const Inputs& a) {
  const View &x = a.t[0], &w = a.t[1];
  if (x.dtype != w.dtype || x.dtype != a.t[2].dtype) return "inputs differ in dtype";
  const int64_t positions = (x.shape[1] / 2) * (x.shape[2] / 2);
  const int64_t channels = std::min(x.shape[3], w.shape[0]);
  if (channels < 32) return "fewer than 32 channels";
  if (positions < 64) return "fewer than 64 positions of the result";
  if (positions * channels < 8192) return "too few positions for so few channels";
  if (4 * positions < std::max(x.shape[3], w.shape[0])) return "too few positions";
  return nullptr;
}
}  // namespace
REFUSES(conv3x3_down, why_not_down)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/conv3x3_down.cpp"
#include "foreach_isa.h"
// clang-format off: simd.h comes first
#include "simd.h"
#include "dot.h"
#include "rounded_store.h"
#include "panel_products.h"
#include "transformed_panel.h"
// clang-format on

namespace vqfast::VQFAST_ISA {
namespace {

constexpr int64_t kBlockBytes = 512 << 10;  // of V; the rest of L2 holds weights and products
constexpr int64_t kSub = 48;                // tiles of a block whose products are held at a time
// Sum to sum of the products; a vector of padding: a power of two apart they would share cache
// sets.
constexpr int64_t kProducts = kSub * kWide + 16;

constexpr int kInputs = 5, kWeights = 4, kSums = 3;  // along one axis
// of each transformed input its weight and its sum; the inputs of a sum stand side by side
constexpr int kWeightOf[kInputs] = {0, 1, 2, 1, 3}, kSumOf[kInputs] = {0, 0, 1, 2, 2};
constexpr bool kFirst[kInputs] = {true, false, true, true, false};  // of its sum

// kNative: vdpbf16ps and its rounding are there
template <class T, bool kNative>
struct Down {
  static constexpr int kPer = 4 / sizeof(T);  // channels to a word

  int64_t B, H, W, C, O, rows, columns, words, down, across, tiles, panels, block, plane;
  int threads;
  const T *x, *w, *bias;
  T* y;

  explicit Down(const Args& a)
      : B(a.t[0].shape[0]),
        H(a.t[0].shape[1]),
        W(a.t[0].shape[2]),
        C(a.t[0].shape[3]),
        O(a.t[1].shape[0]),
        rows(H / 2),
        columns(W / 2),
        words((C + kPer - 1) / kPer),
        down((rows + 1) / 2),
        across((columns + 1) / 2),
        tiles(down * across),
        panels((O + kWide - 1) / kWide),
        threads(a.threads),
        x(a.t[0].as<T>()),
        w(a.t[1].as<T>()),
        bias(a.t[2].as<T>()),
        y(a.t[3].as<T>()) {
    // equal blocks, so that the threads have equal work
    const int64_t most = std::max<int64_t>(kRows, kBlockBytes / (100 * words) / kRows * kRows);
    const int64_t n = std::max<int64_t>(1, (B * tiles + most - 1) / most);
    block = ((B * tiles + n - 1) / n + kRows - 1) / kRows * kRows;
    plane = block * words + 16;  // padded likewise
  }

  VQFAST_INLINE static void put(T* p, VF v, int n) { store_rounded<kNative>(p, v, n); }

  // the weights of n channels of one output -> to[(i * kWeights + j) * kTile words]
  VQFAST_INLINE void transform_weight(int64_t o, int64_t c, int n, T* to) const {
    const T* from = w + o * 9 * C + c;
    VF g[3][kWeights];
#pragma GCC unroll 3
    for (int p = 0; p < 3; ++p) {
      VF each[3];
#pragma GCC unroll 3
      for (int q = 0; q < 3; ++q) each[q] = n ? load_n(from + (p * 3 + q) * C, n) : VF{};
      g[p][0] = each[0];
      g[p][1] = each[1];
      g[p][2] = each[0] + each[2];
      g[p][3] = each[2];
    }
#pragma GCC unroll 4
    for (int j = 0; j < kWeights; ++j) {
      const VF u[kWeights] = {g[0][j], g[1][j], g[0][j] + g[2][j], g[2][j]};
#pragma GCC unroll 4
      for (int i = 0; i < kWeights; ++i) put(to + (i * kWeights + j) * kTile * kPer, u[i], kLanes);
    }
  }

  // transformed weights of one panel -> packed [16, words, kWide]
  void pack(int64_t panel, int32_t* tile, int32_t* packed) const {
    const auto transform = [&](int64_t o, int64_t c, int n, T* to)
                               __attribute__((always_inline)) { transform_weight(o, c, n, to); };
    pack_panel<kWeights * kWeights, T>(panel, O, C, tile, packed, transform);
  }

  VQFAST_INLINE static void combine(VF* t, const VF* d) {
    t[0] = d[0] - d[2];
    t[1] = d[1];
    t[2] = d[2];
    t[3] = d[3];
    t[4] = d[4] - d[2];
  }

  // the transformed inputs of one tile -> v[f * plane words + c]; zeros: a pixel of zeros
  void transform_input(int64_t tile, const T* zeros, T* v) const {
    const T* image = x + tile / tiles * H * W * C;
    const int64_t top = tile % tiles / across * 4, left = tile % across * 4;
    const T* from[kInputs][kInputs];
    for (int i = 0; i < kInputs; ++i)
      for (int j = 0; j < kInputs; ++j) {
        const bool inside = top + i < H && left + j < W;
        from[i][j] = inside ? image + ((top + i) * W + left + j) * C : zeros;
      }
    const auto channels = [&](int64_t c, int n, int written) __attribute__((always_inline)) {
      VF t[kInputs][kInputs];  // [column][row]
#pragma GCC unroll 5
      for (int j = 0; j < kInputs; ++j) {
        VF d[kInputs];
#pragma GCC unroll 5
        for (int i = 0; i < kInputs; ++i) d[i] = load_n(from[i][j] + c, n);
        combine(t[j], d);
      }
#pragma GCC unroll 5
      for (int i = 0; i < kInputs; ++i) {
        const VF d[kInputs] = {t[0][i], t[1][i], t[2][i], t[3][i], t[4][i]};
        VF to[kInputs];
        combine(to, d);
#pragma GCC unroll 5
        for (int j = 0; j < kInputs; ++j)
          put(v + (i * kInputs + j) * plane * kPer + c, to[j], written);
      }
    };
    int64_t c = 0;
    for (; c + kLanes <= C; c += kLanes) channels(c, kLanes, kLanes);
    // a word's second channel that does not exist is zero
    if (c < C) channels(c, static_cast<int>(C - c), static_cast<int>(words * kPer - c));
  }

  // the four outputs of one tile from its sums m[f * kProducts + o]
  void transform_output(const float* m, int64_t tile, int64_t panel) const {
    const int64_t top = tile % tiles / across * 2, left = tile % across * 2;
    const int64_t start = tile / tiles * rows * columns * O;
    for (int half = 0; half < kWide; half += kLanes) {
      const int64_t o = panel * kWide + half;
      if (o >= O) return;
      const int n = static_cast<int>(std::min<int64_t>(kLanes, O - o));
      const VF b = load_n(bias + o, n);
      VF t[2][kSums];  // [row of y][column of sums]
#pragma GCC unroll 3
      for (int j = 0; j < kSums; ++j) {
        VF d[kSums];
#pragma GCC unroll 3
        for (int i = 0; i < kSums; ++i) d[i] = load(m + (i * kSums + j) * kProducts + half);
        t[0][j] = d[0] + d[1];
        t[1][j] = d[1] + d[2];
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j)
          if (top + i < rows && left + j < columns)
            put(y + start + ((top + i) * columns + left + j) * O + o, t[i][j] + t[i][j + 1] + b, n);
    }
  }

  // tiles [begin, begin + count) of one panel, from their v
  void run_panel(int64_t begin, int64_t count, int64_t panel, const int32_t* packed,
                 const int32_t* v, float* m) const {
    for (int64_t sub = 0; sub < count; sub += kSub) {
      const int64_t n = std::min(kSub, count - sub);
      for (int i = 0; i < kInputs; ++i)
        for (int j = 0; j < kInputs; ++j) {
          const bool adds = !kFirst[i] || !kFirst[j];
          const int32_t* u = packed + (kWeightOf[i] * kWeights + kWeightOf[j]) * words * kWide;
          for (int64_t k = 0; k < words; k += kChain)
            multiply_rows<T, kNative>(v + (i * kInputs + j) * plane + sub * words + k, words, n,
                                      u + k * kWide, std::min(kChain, words - k), adds || k > 0,
                                      m + (kSumOf[i] * kSums + kSumOf[j]) * kProducts);
        }
      for (int64_t t = 0; t < n; ++t) transform_output(m + t * kWide, begin + sub + t, panel);
    }
  }

  void run() const {
    if (B == 0) return;
    const int64_t panel_size = kWeights * kWeights * words * kWide;
    const int64_t blocks = (B * tiles + block - 1) / block;
    prefer_large_pages(y, static_cast<size_t>(B * rows * columns * O) * sizeof(T));
    const auto packed = scratch<int32_t>(panels * panel_size);
    parallel_for(threads, panels, 1, [&](int64_t from, int64_t to) {
      const auto tile = scratch<int32_t>(kWeights * kWeights * kTile);
      for (int64_t p = from; p < to; ++p) pack(p, tile.get(), packed.get() + p * panel_size);
    });
    // few blocks: their panels are shared out too, and each share transforms the input again
    const int64_t shares = blocks >= 8 * threads ? 1 : std::min<int64_t>(panels, threads);
    parallel_for(threads, blocks * shares, 1, [&](int64_t from, int64_t to) {
      const auto v = scratch<int32_t>(kInputs * kInputs * plane);
      const auto m = scratch<float>(kSums * kSums * kProducts);
      const auto zeros = scratch<T>(C);
      std::fill_n(zeros.get(), C, T{});
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t begin = unit / shares * block, share = unit % shares;
        const int64_t count = std::min(block, B * tiles - begin);
        for (int64_t t = 0; t < count; ++t)
          transform_input(begin + t, zeros.get(), reinterpret_cast<T*>(v.get() + t * words));
        for (int64_t p = panels * share / shares; p < panels * (share + 1) / shares; ++p)
          run_panel(begin, count, p, packed.get() + p * panel_size, v.get(), m.get());
      }
    });
  }
};

void run(const Args& a) {
  if (a.t[0].dtype == DType::f32) return Down<float, false>(a).run();
#if VQFAST_LANES == 16
  if (has_avx512_bf16()) return Down<bf16, true>(a).run();
#endif
  Down<bf16, false>(a).run();
}

}  // namespace

KERNEL(conv3x3_down, "f32|bf16 f32|bf16 f32|bf16 -> f32|bf16", run)

}  // namespace vqfast::VQFAST_ISA
