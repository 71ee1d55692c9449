// Computes: y[b, i, j, o] = bias[o] + r[b, i, j, o]
//                         + sum_{p, q, c} x'[b, i + p - 1, j + q - 1, c] w[o, p, q, c],
//   x' = x, or x with each pixel doubled to 2x2 (s[0] = 2), zero outside: a 3x3 convolution of
//   stride 1 and padding 1. x [B, H, W, C], w [O, 3, 3, C], bias [O], r (or none) and y
//   [B, s H, s W, O], all contiguous (NCHW tensors in channels_last order) and of one type.
//
// Contract: any H, W, C, O; small problems are refused, as transforming the weights would not pay.
//
// Numerics: Winograd F(2x2, 3x3), or F(4x4, 3x3) for many positions and channels in float32: y =
//   A'[(G w G') . (B' x B)]A, each of the 16 or 36 products summed over c in blocks of kChain words
//   of channels, each one chain of float32 multiply-adds. Float32: the error is 0.1 to 0.4 times
//   that of oneDNN's direct sum, by F(4x4, 3x3) 0.5 to 1.0 times (winograd.h). Bfloat16: transforms
//   are computed in float32, and both factors rounded before they meet; bias and r are added in
//   float32 and the result rounded once. The rounding of the factors costs 2.4 times the rounding
//   of the result on random data (root mean square), 1.1 to 1.3 times in the maximum norm, and a
//   residual connection here has one rounding less than two ops. A NaN or infinity spreads over the
//   outputs of its tiles. An output does not depend on B, its place in the batch, or the threads.
//
// Shape of the code: 16 C O / 4 or 36 C O / 16 multiply-adds per output in place of 9 C O: 2.25 or 4
//   times fewer. On doubled pixels the third row and column of B' x B vanish, so that 9 of the 16
//   products are left: 4 times fewer too. A thread takes blocks of output tiles: their transformed
//   inputs V [F, tiles, C] stay in L2 while panels of 2 kLanes outputs pass by; a register tile is
//   kRows tiles x 2 vectors. Transformed weights are packed [panel, F, C, 2 kLanes] first, two
//   channels to a word in bfloat16. Few tiles: V of all of them first, then the weights panel by
//   panel, used while they are in cache.
//
// Ladder: one chain over all of C had 2.3 times the error of torch's NCHW convolution at C = 512;
//   chains of 64 channels, whose weights stay in L1, have 0.7 times (2026-11-23). 128 channels at
//   256px, 1 thread of Zen 5 (2026-11-25): float32 57.9 -> 43.5 ms with large pages for y; bfloat16
//   55 with sums that gcc kept in memory, 23 in registers, 21.9 with products of 48 tiles at a
//   time, of which 17 are at the limit of vdpbf16ps; oneDNN's direct one takes 37. 512 channels at
//   16px, 1 thread of Zen 4 (2026-11-30), all weights packed first, then panel by panel: bfloat16
//   6.1 -> 4.0 ms (oneDNN 5.7), float32 13.1 -> 7.4 (12.0). There F(4x4, 3x3) is 1.5 times faster
//   than F(2x2, 3x3) from 64px on, 1.1 times at 32px; blocks of 256 KiB to 1 MiB and 12 to 48 tiles
//   at a time made no difference. 512 channels at 32px: 0.6 times, as 37 MB of weights pass L3.
#include <algorithm>

#include "kernel.h"
#include "large_pages.h"
#include "parallel.h"

#ifndef VQFAST_ISA
namespace vqfast {
namespace {
const char* why_not(const Args& a) {
  const View &x = a.t[0], &w = a.t[1];
  if (x.dtype != w.dtype || x.dtype != a.t[2].dtype) return "inputs differ in dtype";
  if (a.t[3].data && a.t[3].dtype != x.dtype) return "inputs differ in dtype";
  const int64_t positions = x.shape[1] * x.shape[2] * a.s[0].i * a.s[0].i;
  const int64_t channels = std::min(x.shape[3], w.shape[0]);
  if (channels < 32) return "fewer than 32 channels";
  if (positions < 64) return "fewer than 64 positions of the result";
  if (positions * channels < 8192) return "too few positions for so few channels";
  return nullptr;
}
}  // namespace
REFUSES(conv3x3, why_not)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/conv3x3.cpp"
#include "foreach_isa.h"
// clang-format off: simd.h comes first
#include "simd.h"
#include "dot.h"
#include "rounded_store.h"
#include "winograd.h"
#include "winograd_products.h"
// clang-format on

namespace vqfast::VQFAST_ISA {
namespace {

constexpr int64_t kBlockBytes = 512 << 10;  // of V; the rest of L2 holds weights and products
constexpr int64_t kFewBytes = 2 << 20;      // V of all tiles: packing all weights does not pay
// Frequency to frequency of a tile of weights; a vector of padding here and below: a power of two
// apart they would share cache sets.
constexpr int64_t kTile = kWide * kLanes + 16;

// kOut x kOut outputs of a tile. kDoubled: the pixels of x are doubled. kNative: vdpbf16ps and its
// rounding are there.
template <class T, int kOut, bool kDoubled, bool kNative>
struct Conv {
  using Line = Winograd<kOut, kDoubled>;
  static constexpr int kPer = 4 / sizeof(T);  // channels to a word
  static constexpr int kTaps = Line::kTaps;   // rows and columns of a transformed tile
  static constexpr int kF = kTaps * kTaps;
  static constexpr int kScale = kDoubled ? 2 : 1;
  static constexpr int64_t kSub = kOut == 4 ? 24 : 48;       // tiles whose products are held
  static constexpr int64_t kProducts = kSub * kWide + 16;  // from frequency to frequency of them

  int64_t B, H, W, C, O, words, down, across, tiles, panels, block;
  int threads;
  const T *x, *w, *bias, *residual;
  T* y;

  explicit Conv(const Args& a)
      : B(a.t[0].shape[0]),
        H(a.t[0].shape[1]),
        W(a.t[0].shape[2]),
        C(a.t[0].shape[3]),
        O(a.t[1].shape[0]),
        words((C + kPer - 1) / kPer),
        down((H * kScale + kOut - 1) / kOut),
        across((W * kScale + kOut - 1) / kOut),
        tiles(down * across),
        panels((O + kWide - 1) / kWide),
        threads(a.threads),
        x(a.t[0].as<T>()),
        w(a.t[1].as<T>()),
        bias(a.t[2].as<T>()),
        residual(a.t[3].as<T>()),
        y(a.t[4].as<T>()) {
    // equal blocks, so that the threads have equal work
    const int64_t most = std::max<int64_t>(kRows, kBlockBytes / (4 * kF * words) / kRows * kRows);
    const int64_t n = std::max<int64_t>(1, (B * tiles + most - 1) / most);
    block = ((B * tiles + n - 1) / n + kRows - 1) / kRows * kRows;
  }

  // from frequency to frequency of V, padded likewise
  int64_t plane(int64_t count) const { return (count + kRows - 1) / kRows * kRows * words + 16; }

  VQFAST_INLINE static void put(T* p, VF v, int n) { store_rounded<kNative>(p, v, n); }

  // G g G' of n channels of one output -> to[f * kTile words]
  VQFAST_INLINE void transform_weight(const T* from, int n, T* to) const {
    VF rows[3][kTaps];
#pragma GCC unroll 3
    for (int q = 0; q < 3; ++q) {
      VF g[3];
#pragma GCC unroll 3
      for (int p = 0; p < 3; ++p) g[p] = n ? load_n(from + (p * 3 + q) * C, n) : VF{};
      Line::weights(g, rows[q]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kTaps; ++i) {
      const VF g[3] = {rows[0][i], rows[1][i], rows[2][i]};
      VF u[kTaps];
      Line::weights(g, u);
#pragma GCC unroll 6
      for (int j = 0; j < kTaps; ++j)
        put(to + (i * kTaps + j) * kTile * kPer, u[j], kLanes);
    }
  }

  // words [from, from + kLanes) of the transformed weights of one panel -> tile [kF, kTile]
  void transform_weights(int64_t panel, int64_t from, int32_t* tile) const {
    for (int o = 0; o < kWide; ++o)
      for (int part = 0; part < kPer; ++part) {
        const int64_t c = from * kPer + part * kLanes, row = panel * kWide + o;
        const int n = row < O ? static_cast<int>(std::clamp<int64_t>(C - c, 0, kLanes)) : 0;
        T* to = reinterpret_cast<T*>(tile + o * kLanes) + part * kLanes;
        if (n == kLanes)
          transform_weight(w + row * 9 * C + c, kLanes, to);
        else
          transform_weight(w + row * 9 * C + c, n, to);
      }
  }

  // G g G' of the weights of one panel -> packed [kF, words, kWide]
  void pack(int64_t panel, int32_t* tile, int32_t* packed) const {
    for (int64_t from = 0; from < words; from += kLanes) {
      transform_weights(panel, from, tile);
      const int64_t n = std::min<int64_t>(kLanes, words - from);
      for (int f = 0; f < kF; ++f)
        for (int half = 0; half < kWide; half += kLanes)
          transpose(tile + f * kTile + half * kLanes, n,
                    packed + (f * words + from) * kWide + half);
    }
  }

  // B' d B of the inputs of one tile -> v[f * stride + c]; zeros: a pixel of zeros
  void transform_input(int64_t tile, const T* zeros, T* v, int64_t stride) const {
    const T* image = x + tile / tiles * H * W * C;
    const int64_t top = tile % tiles / across * Line::kStep - 1,
                  left = tile % across * Line::kStep - 1;
    const T* from[kTaps][kTaps];
    for (int i = 0; i < kTaps; ++i)
      for (int j = 0; j < kTaps; ++j) {
        const int64_t row = top + i, column = left + j;
        const bool inside = row >= 0 && row < H && column >= 0 && column < W;
        from[i][j] = inside ? image + (row * W + column) * C : zeros;
      }
    const auto channels = [&](int64_t c, int n, int written) __attribute__((always_inline)) {
      VF t[kTaps][kTaps];  // [column][row]
#pragma GCC unroll 6
      for (int j = 0; j < kTaps; ++j) {
        VF d[kTaps];
#pragma GCC unroll 6
        for (int i = 0; i < kTaps; ++i) d[i] = load_n(from[i][j] + c, n);
        Line::inputs(d, t[j]);
      }
#pragma GCC unroll 6
      for (int i = 0; i < kTaps; ++i) {
        VF d[kTaps], to[kTaps];
#pragma GCC unroll 6
        for (int j = 0; j < kTaps; ++j) d[j] = t[j][i];
        Line::inputs(d, to);
#pragma GCC unroll 6
        for (int j = 0; j < kTaps; ++j) put(v + (i * kTaps + j) * stride + c, to[j], written);
      }
    };
    int64_t c = 0;
    for (; c + kLanes <= C; c += kLanes) channels(c, kLanes, kLanes);
    // a word's second channel that does not exist is zero
    if (c < C) channels(c, static_cast<int>(C - c), static_cast<int>(words * kPer - c));
  }

  // A' m A of one tile and panel, plus bias and residual -> y; m[f * stride + o]
  void transform_output(const float* m, int64_t stride, int64_t tile, int64_t panel) const {
    const int64_t rows = H * kScale, columns = W * kScale;
    const int64_t top = tile % tiles / across * kOut, left = tile % across * kOut;
    const int64_t start = tile / tiles * rows * columns * O;
    for (int half = 0; half < kWide; half += kLanes) {
      const int64_t o = panel * kWide + half;
      if (o >= O) return;
      const int n = static_cast<int>(std::min<int64_t>(kLanes, O - o));
      VF t[kTaps][kOut];
#pragma GCC unroll 6
      for (int j = 0; j < kTaps; ++j) {
        VF d[kTaps];
#pragma GCC unroll 6
        for (int i = 0; i < kTaps; ++i) d[i] = load(m + (i * kTaps + j) * stride + half);
        Line::outputs(d, t[j]);
      }
      const VF b = load_n(bias + o, n);
#pragma GCC unroll 4
      for (int i = 0; i < kOut; ++i) {
        if (top + i >= rows) break;
        VF d[kTaps], out[kOut];
#pragma GCC unroll 6
        for (int j = 0; j < kTaps; ++j) d[j] = t[j][i];
        Line::outputs(d, out);
#pragma GCC unroll 4
        for (int j = 0; j < kOut; ++j) {
          if (left + j >= columns) break;
          const int64_t to = start + ((top + i) * columns + left + j) * O + o;
          const VF sum = out[j] + b;
          put(y + to, residual ? sum + load_n(residual + to, n) : sum, n);
        }
      }
    }
  }

  // tiles [begin, begin + count) of one panel, from their v; u [kF, words, kWide]
  void run_panel(int64_t begin, int64_t count, int64_t panel, const int32_t* u, const int32_t* v,
                 int64_t stride, float* m) const {
    for (int64_t sub = 0; sub < count; sub += kSub) {
      const int64_t n = std::min(kSub, count - sub);
      for (int f = 0; f < kF; ++f)
        for (int64_t k = 0; k < words; k += kChain)
          multiply_rows<T, kNative>(v + f * stride + sub * words + k, words, n,
                                    u + (f * words + k) * kWide, std::min(kChain, words - k), k > 0,
                                    m + f * kProducts);
      for (int64_t t = 0; t < n; ++t)
        transform_output(m + t * kWide, kProducts, begin + sub + t, panel);
    }
  }

  // few tiles: V of all of them, then panel by panel the weights, which are used while in cache
  void run_few() const {
    const int64_t count = B * tiles, stride = plane(count);
    const auto v = scratch<int32_t>(kF * stride);
    const auto zeros = scratch<T>(C);
    std::fill_n(zeros.get(), C, T{});
    parallel_for(threads, count, 1, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t)
        transform_input(t, zeros.get(), reinterpret_cast<T*>(v.get() + t * words), stride * kPer);
    });
    parallel_for(threads, panels, 1, [&](int64_t from, int64_t to) {
      const auto tile = scratch<int32_t>(kF * kTile);
      const auto packed = scratch<int32_t>(kF * words * kWide);
      const auto m = scratch<float>(kF * kProducts);
      for (int64_t p = from; p < to; ++p) {
        pack(p, tile.get(), packed.get());
        run_panel(0, count, p, packed.get(), v.get(), stride, m.get());
      }
    });
  }

  void run() const {
    if (B == 0) return;
    if (kF * words * 4 * B * tiles <= kFewBytes) return run_few();
    const int64_t panel_size = kF * words * kWide, blocks = (B * tiles + block - 1) / block;
    prefer_large_pages(y, static_cast<size_t>(B * H * W * kScale * kScale * O) * sizeof(T));
    const auto packed = scratch<int32_t>(panels * panel_size);
    parallel_for(threads, panels, 1, [&](int64_t from, int64_t to) {
      const auto tile = scratch<int32_t>(kF * kTile);
      for (int64_t p = from; p < to; ++p) pack(p, tile.get(), packed.get() + p * panel_size);
    });
    // few blocks: their panels are shared out too, and each share transforms the input again
    const int64_t shares = blocks >= 8 * threads ? 1 : std::min<int64_t>(panels, 4);
    parallel_for(threads, blocks * shares, 1, [&](int64_t from, int64_t to) {
      const int64_t stride = plane(block);
      const auto v = scratch<int32_t>(kF * stride);
      const auto m = scratch<float>(kF * kProducts);
      const auto zeros = scratch<T>(C);
      std::fill_n(zeros.get(), C, T{});
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t begin = unit / shares * block, share = unit % shares;
        const int64_t count = std::min(block, B * tiles - begin);
        for (int64_t t = 0; t < count; ++t)
          transform_input(begin + t, zeros.get(), reinterpret_cast<T*>(v.get() + t * words),
                          stride * kPer);
        for (int64_t p = panels * share / shares; p < panels * (share + 1) / shares; ++p)
          run_panel(begin, count, p, packed.get() + p * panel_size, v.get(), stride, m.get());
      }
    });
  }
};

// Tiles of 4x4 outputs are faster and accurate enough. With fewer than 128 channels a direct sum has
// less than half their error. The weights cost what some 64 tiles cost, while they fit L3
// (2026-11-30, AMD Zen 4).
bool large_tiles(const Args& a) {
  const View& x = a.t[0];
  const int64_t C = x.shape[3], O = a.t[1].shape[0];
  const auto tiles = [&](int64_t side) {
    return (x.shape[1] + side - 1) / side * ((x.shape[2] + side - 1) / side);
  };
  const bool fits = 36 * C * O * int64_t{sizeof(float)} <= int64_t{24} << 20;
  return C >= 128 && fits && 36 * (tiles(4) + 64) < 16 * (tiles(2) + 64);
}

template <class T, bool kNative>
void run_tiles(const Args& a) {
  if (a.s[0].i == 2) return Conv<T, 2, true, kNative>(a).run();
  if constexpr (sizeof(T) == 4)
    if (large_tiles(a)) return Conv<T, 4, false, kNative>(a).run();
  Conv<T, 2, false, kNative>(a).run();
}

void run(const Args& a) {
  if (a.t[0].dtype == DType::f32) return run_tiles<float, false>(a);
#if VQFAST_LANES == 16
  if (has_avx512_bf16()) return run_tiles<bf16, true>(a);
#endif
  run_tiles<bf16, false>(a);
}

}  // namespace

KERNEL(conv3x3, "f32|bf16 f32|bf16 f32|bf16 f32|bf16? -> f32|bf16", run)

}  // namespace vqfast::VQFAST_ISA
