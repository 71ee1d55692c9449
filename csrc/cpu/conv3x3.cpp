// Computes: y[b, i, j, o] = bias[o] + r[b, i, j, o]
//                         + sum_{p, q, c} x'[b, i + p - 1, j + q - 1, c] w[o, p, q, c],
//   x' = x, or x with each pixel doubled to 2x2 (s[0] = 2), zero outside: a 3x3 convolution of
//   stride 1 and padding 1. x [B, H, W, C], w [O, 3, 3, C], bias [O], r (or none) and y
//   [B, s H, s W, O], all contiguous (NCHW tensors in channels_last order) and of one type.
//   conv3x3_stats: also mean and rstd = 1 / sqrt(var + eps) [B, G] of the O / G channels of a group
//   of y, as it is after rounding; groups and eps are s[1] and s[2].
//
// Contract: any H, W, C, O; small problems are refused, as transforming the weights would not pay. Up
//   to 16 channels go to a direct sum (direct_conv.h), the rest of this page is about more.
//
// Numerics: Winograd F(2x2, 3x3), or F(4x4, 3x3) for many positions and (float32) channels: y =
//   A'[(G w G') . (B' x B)]A, each of the 16 or 36 products summed over c in blocks of kChain words
//   of channels, one after the other in float32. Float32: a block is a chain of multiply-adds; the
//   error is 0.1 to 0.4 times that of oneDNN's direct sum, by F(4x4, 3x3) 0.5 to 1.0 times
//   (winograd.h). Bfloat16: transforms are computed in float32, and both factors rounded before they
//   meet; bias and r are added in float32 and the result rounded once. F(2x2, 3x3) rounds factors to
//   bfloat16, which costs 2.4 times the rounding of the result on random data (root mean square),
//   1.1 to 1.3 times in the maximum norm; a residual connection here has one rounding less than two
//   ops. F(4x4, 3x3) would cost 10 times: it rounds them to int16 about a scale per output and per
//   tile and block of channels, sums those exactly, and costs 0.6 times (fixed_point.h). A NaN or
//   infinity spreads over the outputs of its tiles. An output does not depend on B, its place in the
//   batch, or the threads.
//
// Shape of the code: 16 C O / 4 or 36 C O / 16 multiply-adds per output in place of 9 C O: 2.25 or 4
//   times fewer. On doubled pixels the third row and column of B' x B vanish, so that 9 of the 16
//   products are left: 4 times fewer too. A thread takes blocks of output tiles: their transformed
//   inputs V [F, tiles, C] stay in L2 while panels of 2 kLanes outputs pass by; a register tile is
//   kRows tiles x 2 vectors. Transformed weights are packed [panel, F, C, 2 kLanes] first, two
//   channels to a word in bfloat16 and int16. Few tiles: V of all of them first, then the weights
//   panel by panel, used while they are in cache.
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
//   Bfloat16 by F(4x4, 3x3) in int16, 128 at 256px 46.4 -> 31.3 ms, of which 20 are at the limit of
//   vpdpwssd. Asking for the residual ahead gains 1 %: it waits for memory, not for its latency.
//   Statistics from registers cost 0.8 ms there (float32 1.2), a pass of their own 2.1 (4.0); from
//   tiles of 2x2 outputs 2.9 (3.3), so that they are refused there.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "kernel.h"
#include "large_pages.h"
#include "parallel.h"

#ifndef VQFAST_ISA
namespace vqfast {
// a direct sum, from the fewest channels on that a register tile of outputs is worth
inline bool few_channels(const View& x, const Scalar& scale) {
  return x.shape[3] <= 16 && scale.i == 1;
}
// Tiles of 4x4 outputs are faster and accurate enough. In float32 with fewer than 128 channels a
// direct sum has less than half their error. The weights cost what some 64 tiles cost, while they
// fit L3 (2026-11-30, AMD Zen 4).
inline bool large_tiles(const View& x, const View& w, const Scalar& scale) {
  if (scale.i == 2) return false;
  const int64_t C = x.shape[3], O = w.shape[0], least = x.dtype == DType::f32 ? 128 : 0;
  const auto tiles = [&](int64_t side) {
    return (x.shape[1] + side - 1) / side * ((x.shape[2] + side - 1) / side);
  };
  const bool fits = 36 * C * O * int64_t{sizeof(float)} <= int64_t{24} << 20;
  return C >= least && fits && 36 * (tiles(4) + 64) < 16 * (tiles(2) + 64);
}
namespace {
const char* why_not(const Inputs& a) {
  const View &x = a.t[0], &w = a.t[1];
  if (x.dtype != w.dtype || x.dtype != a.t[2].dtype) return "inputs differ in dtype";
  if (a.t[3].data && a.t[3].dtype != x.dtype) return "inputs differ in dtype";
  const int64_t positions = x.shape[1] * x.shape[2] * a.s[0].i * a.s[0].i;
  const bool few = few_channels(x, a.s[0]);
  const int64_t channels = few ? w.shape[0] : std::min(x.shape[3], w.shape[0]);
  if (channels < 32) return "fewer than 32 channels";
  if (positions < 64) return "fewer than 64 positions of the result";
  if (positions * channels < 8192) return "too few positions for so few channels";
  return nullptr;
}
const char* why_no_stats(const Inputs& a) {
  if (const char* why = why_not(a)) return why;
  if (few_channels(a.t[0], a.s[0]) || large_tiles(a.t[0], a.t[1], a.s[0])) return nullptr;
  return "tiles of 2x2 outputs, of which statistics cost more than to read y again";
}
}  // namespace
REFUSES(conv3x3, why_not)
REFUSES(conv3x3_stats, why_no_stats)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/conv3x3.cpp"
#include "foreach_isa.h"
// clang-format off: simd.h comes first
#include "simd.h"
#include "dot.h"
#include "rounded_store.h"
#include "winograd.h"
#include "fixed_point.h"
#include "panel_products.h"
#include "transformed_panel.h"
#include "channel_moments.h"
#include "direct_conv.h"
// clang-format on

namespace vqfast::VQFAST_ISA {
namespace {

constexpr int64_t kBlockBytes = 512 << 10;  // of V; the rest of L2 holds weights and products
constexpr int64_t kFewBytes = 2 << 20;      // V of all tiles: packing all weights does not pay

// kOut x kOut outputs of a tile. F: what the factors are rounded to, T or int16_t. kDoubled: the
// pixels of x are doubled. kNative: vdpbf16ps and its rounding are there.
template <class T, class F, int kOut, bool kDoubled, bool kNative>
struct Conv {
  using Line = Winograd<kOut, kDoubled>;
  static constexpr bool kLarge = kOut == 4;  // with statistics
  static constexpr bool kFixed = std::is_same_v<F, int16_t>;
  static constexpr int kPer = 4 / sizeof(F);  // channels to a word
  static constexpr int kTaps = Line::kTaps;   // rows and columns of a transformed tile
  static constexpr int kF = kTaps * kTaps;
  static constexpr int kScale = kDoubled ? 2 : 1;
  static constexpr int64_t kSub = kOut == 4 ? 24 : 48;       // tiles whose products are held
  static constexpr int64_t kProducts = kSub * kWide + 16;    // from frequency to frequency of them
  static constexpr int64_t kStage = kChain * kPer + kLanes;  // likewise of a tile before rounding

  int64_t B, H, W, C, O, words, down, across, tiles, panels;
  int threads;
  const T *x, *w, *bias, *residual;
  T* y;
  Statistics* statistics;  // of y, or null
  int64_t runs, run_tiles, block;
  Balance balance;  // of int16 factors

  Conv(const Args& a, Statistics* statistics)
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
        y(a.t[4].as<T>()),
        statistics(statistics),
        // no block has tiles of two images where there are statistics, which are of one image
        runs(statistics ? B : 1),
        run_tiles(statistics ? tiles : B * tiles) {
    // equal blocks, so that the threads have equal work
    const int64_t most = std::max<int64_t>(kRows, kBlockBytes / (4 * kF * words) / kRows * kRows);
    const int64_t n = std::max<int64_t>(1, (run_tiles + most - 1) / most);
    block = ((run_tiles + n - 1) / n + kRows - 1) / kRows * kRows;
  }

  VQFAST_INLINE static void put(F* p, VF v, int n) {
    if constexpr (kFixed)
      store_int16(p, v, n);
    else
      store_rounded<kNative>(p, v, n);
  }

  // take(f, u) for G g G' of n channels of one output
  template <class Take>
  VQFAST_INLINE void each_weight(const T* from, int n, Take&& take) const {
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
      for (int j = 0; j < kTaps; ++j) take(i * kTaps + j, u[j]);
    }
  }

  // G g G' of n channels of one output -> to[f * kTile words]
  VQFAST_INLINE void transform_weight(int64_t o, int64_t c, int n, F* to) const {
    const T* from = w + o * 9 * C + c;
    VF factor{};
    if constexpr (kFixed)
      if (n) factor = load(balance.inverse.get() + c) * balance.output[o];
    const auto store_each = [&](int f, VF u) __attribute__((always_inline)) {
      put(to + f * kTile * kPer, kFixed ? u * factor : u, kLanes);
    };
    if (n == kLanes)
      each_weight(from, kLanes, store_each);
    else
      each_weight(from, n, store_each);
  }

  // G g G' of the weights of one panel -> packed [kF, words, kWide]
  void pack(int64_t panel, int32_t* tile, int32_t* packed) const {
    const auto transform = [&](int64_t o, int64_t c, int n, F* to)
                               __attribute__((always_inline)) { transform_weight(o, c, n, to); };
    pack_panel<kF, F>(panel, O, C, tile, packed, transform);
  }

  using Window = const T* [kTaps][kTaps];

  // where the inputs of one tile are; zeros: a pixel of zeros
  void find_inputs(int64_t tile, const T* zeros, Window& from) const {
    const T* image = x + tile / tiles * H * W * C;
    const int64_t top = tile % tiles / across * Line::kStep - 1,
                  left = tile % across * Line::kStep - 1;
    for (int i = 0; i < kTaps; ++i)
      for (int j = 0; j < kTaps; ++j) {
        const int64_t row = top + i, column = left + j;
        const bool inside = row >= 0 && row < H && column >= 0 && column < W;
        from[i][j] = inside ? image + (row * W + column) * C : zeros;
      }
  }

  // take(f, v) for B' d B of channels [c, c + n)
  template <class Take>
  VQFAST_INLINE void each_input(const Window& from, int64_t c, int n, Take&& take) const {
    VF t[kTaps][kTaps];  // [column][row]
    VF factor{};
    if constexpr (kFixed) factor = load(balance.channel.get() + c);
#pragma GCC unroll 6
    for (int j = 0; j < kTaps; ++j) {
      VF d[kTaps];
#pragma GCC unroll 6
      for (int i = 0; i < kTaps; ++i) {
        d[i] = load_n(from[i][j] + c, n);
        if constexpr (kFixed) d[i] *= factor;
      }
      Line::inputs(d, t[j]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kTaps; ++i) {
      VF d[kTaps], to[kTaps];
#pragma GCC unroll 6
      for (int j = 0; j < kTaps; ++j) d[j] = t[j][i];
      Line::inputs(d, to);
#pragma GCC unroll 6
      for (int j = 0; j < kTaps; ++j) take(i * kTaps + j, to[j]);
    }
  }

  // take(channel, width) for channels [from, to) a vector at a time
  template <class Take>
  VQFAST_INLINE void each_vector(int64_t from, int64_t to, Take&& take) const {
    int64_t c = from;
    for (; c + kLanes <= to; c += kLanes) take(c, kLanes);
    if (c < to) take(c, static_cast<int>(to - c));
  }

  // B' d B of one tile -> v[f * stride + c]; scale: see transform_fixed
  void transform_input(int64_t tile, const T* zeros, F* v, int64_t stride, float* scale,
                       int64_t scales) const {
    Window from;
    find_inputs(tile, zeros, from);
    if constexpr (kFixed) return transform_fixed(from, v, stride, scale, scales);
    each_vector(0, C, [&](int64_t c, int n) __attribute__((always_inline)) {
      // a word's second channel that does not exist is zero
      const int written = n == kLanes ? kLanes : static_cast<int>(words * kPer - c);
      each_input(from, c, n, [&](int f, VF to) __attribute__((always_inline)) {
        put(v + f * stride + c, to, written);
      });
    });
  }

  // The same in int16, each chain of channels by a factor that bounds its sums of squares; its
  // reciprocal -> scale[chain * scales].
  void transform_fixed(const Window& from, F* v, int64_t stride, float* scale,
                       int64_t scales) const {
    alignas(64) float stage[kF * kStage];
    for (int64_t first = 0; first < C; first += kChain * kPer, scale += scales) {
      const int64_t end = std::min(C, first + kChain * kPer);
      const int64_t width = (end - first + kLanes - 1) / kLanes * kLanes;
      each_vector(first, end, [&](int64_t c, int n) __attribute__((always_inline)) {
        each_input(from, c, n, [&](int f, VF to) __attribute__((always_inline)) {
          store(stage + f * kStage + (c - first), to);
        });
      });
      const float factor = bounding_factor<kF>(stage, kStage, width, kInputNorm);
      *scale = 1.0f / factor;
      // a word's second channel that does not exist is zero
      const int64_t filled = std::min(first + width, words * kPer);
      for (int f = 0; f < kF; ++f)
        each_vector(first, filled, [&](int64_t c, int n) __attribute__((always_inline)) {
          put(v + f * stride + c, load(stage + f * kStage + (c - first)) * factor, n);
        });
    }
  }

  // Channels by the norm of their weights, outputs by a factor that bounds the sums of squares of
  // each chain of a frequency.
  void balance_factors() {
    balance.channels<T>(w, O * 9, C);
    balance.output = scratch<float>(O);
    parallel_for(threads, O, 1, [&](int64_t from, int64_t to) {
      alignas(64) float stage[kF * kStage];
      for (int64_t o = from; o < to; ++o) {
        float least = kLargestFactor;
        for (int64_t first = 0; first < C; first += kChain * kPer) {
          const int64_t end = std::min(C, first + kChain * kPer);
          each_vector(first, end, [&](int64_t c, int n) __attribute__((always_inline)) {
            const VF inverse = load(balance.inverse.get() + c);
            each_weight(w + o * 9 * C + c, n, [&](int f, VF u) __attribute__((always_inline)) {
              store(stage + f * kStage + (c - first), u * inverse);
            });
          });
          const int64_t width = (end - first + kLanes - 1) / kLanes * kLanes;
          const float factor = bounding_factor<kF>(stage, kStage, width, kWeightNorm);
          least = factor < least || factor != factor ? factor : least;
        }
        balance.output[o] = least;
      }
    });
  }

  // A' m A of one tile, from channel o on, plus bias and residual `added` (or null) -> its rows x
  // columns outputs in y from `corner` on and, if kStats, their moments. kWhole: kOut x kOut.
  template <bool kStats, bool kWhole>
  VQFAST_INLINE void write_tile(const float* m, int64_t o, T* corner, const T* added, int rows,
                                int columns, ChannelMoments* moments) const {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, O - o));
    VF t[kTaps][kOut];
#pragma GCC unroll 6
    for (int j = 0; j < kTaps; ++j) {
      VF d[kTaps];
#pragma GCC unroll 6
      for (int i = 0; i < kTaps; ++i) d[i] = load(m + (i * kTaps + j) * kProducts);
      Line::outputs(d, t[j]);
    }
    const VF b = load_n(bias + o, n);
    VF scale{}, written[kOut * kOut];
    if constexpr (kFixed) scale = 1.0f / load_n(balance.output.get() + o, n, 1.0f);
#pragma GCC unroll 4
    for (int i = 0; i < kOut; ++i) {
      if (!kWhole && i >= rows) break;
      VF d[kTaps], out[kOut];
#pragma GCC unroll 6
      for (int j = 0; j < kTaps; ++j) d[j] = t[j][i];
      Line::outputs(d, out);
#pragma GCC unroll 4
      for (int j = 0; j < kOut; ++j) {
        if (!kWhole && j >= columns) break;
        const int64_t at = (i * W * kScale + j) * O + o;
        VF v = kFixed ? fma(out[j], scale, b) : out[j] + b;
        if (added) v += load_n(added + at, n);
        store_rounded<kNative>(corner + at, v, n);
        if constexpr (kStats) written[i * (kWhole ? kOut : columns) + j] = rounded<kNative, T>(v);
      }
    }
    if constexpr (kStats) moments->merge(o % kWide, written, kWhole ? kOut * kOut : rows * columns);
  }

  // The outputs of one tile and panel; m [kF, kWide], kProducts apart.
  template <bool kStats>
  void transform_output(const float* m, int64_t tile, int64_t panel,
                        ChannelMoments* moments) const {
    const int64_t top = tile % tiles / across * kOut, left = tile % across * kOut;
    const int rows = static_cast<int>(std::min<int64_t>(kOut, H * kScale - top)),
              columns = static_cast<int>(std::min<int64_t>(kOut, W * kScale - left));
    T* corner = y + ((tile / tiles * H * kScale + top) * W * kScale + left) * O;
    const T* added = residual ? residual + (corner - y) : nullptr;
    for (int64_t o = panel * kWide; o < std::min(O, (panel + 1) * kWide); o += kLanes, m += kLanes)
      if (rows == kOut && columns == kOut)
        write_tile<kStats, true>(m, o, corner, added, rows, columns, moments);
      else
        write_tile<kStats, false>(m, o, corner, added, rows, columns, moments);
    if constexpr (kStats) moments->counted(rows * columns);
  }

  // Transformed inputs of some tiles.
  struct Inputs {
    int64_t stride, scales;  // from frequency to frequency, from chain to chain
    Scratch<int32_t> v;      // [kF, tiles, words]
    Scratch<float> scale;    // [chains, tiles], of int16
  };

  Inputs room(int64_t count) const {
    const int64_t padded = (count + kRows - 1) / kRows * kRows;
    // a vector more, padded likewise
    const int64_t stride = padded * words + 16;
    const int64_t scales = kFixed ? (words + kChain - 1) / kChain * padded : 0;
    return {stride, padded, scratch<int32_t>(kF * stride), scratch<float>(scales)};
  }

  // tile number `from` of x is number `to` of these
  void transform_input(int64_t from, const T* zeros, const Inputs& in, int64_t to) const {
    transform_input(from, zeros, reinterpret_cast<F*>(in.v.get() + to * words), in.stride * kPer,
                    in.scale.get() + to, in.scales);
  }

  // Tiles [begin, begin + count) of one panel, from their transformed inputs, `at` and on; u [kF,
  // words, kWide].
  void run_panel(int64_t begin, int64_t count, int64_t panel, const int32_t* u, const Inputs& in,
                 int64_t at, float* m) const {
    for (int64_t sub = 0; sub < count; sub += kSub) {
      const int64_t n = std::min(kSub, count - sub), tile = begin + sub, from = at + sub;
      for (int f = 0; f < kF; ++f)
        for (int64_t k = 0; k < words; k += kChain)
          multiply_rows<F, kNative>(in.v.get() + f * in.stride + from * words + k, words, n,
                                    u + (f * words + k) * kWide, std::min(kChain, words - k), k > 0,
                                    m + f * kProducts,
                                    in.scale.get() + k / kChain * in.scales + from);
      if (!kLarge || !statistics) {
        for (int64_t t = 0; t < n; ++t)
          transform_output<false>(m + t * kWide, tile + t, panel, nullptr);
        continue;
      }
      const int64_t of_image = tile % tiles, parts = (block + kSub - 1) / kSub;
      ChannelMoments* moments =
          statistics->at(tile / tiles, of_image / block * parts + of_image % block / kSub, panel);
      for (int64_t t = 0; t < n; ++t)
        transform_output<kLarge>(m + t * kWide, tile + t, panel, moments);
    }
  }

  // few tiles: V of all of them, then panel by panel the weights, which are used while in cache
  void run_few() const {
    const int64_t count = B * tiles;
    const Inputs in = room(count);
    const auto zeros = scratch<T>(C);
    std::fill_n(zeros.get(), C, T{});
    parallel_for(threads, count, 1, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) transform_input(t, zeros.get(), in, t);
    });
    parallel_for(threads, panels, 1, [&](int64_t from, int64_t to) {
      const auto tile = scratch<int32_t>(kF * kTile);
      const auto packed = scratch<int32_t>(kF * words * kWide);
      const auto m = scratch<float>(kF * kProducts);
      for (int64_t p = from; p < to; ++p) {
        pack(p, tile.get(), packed.get());
        for (int64_t i = 0; i < blocks(); ++i) {
          const auto [begin, n] = tiles_of(i);
          run_panel(begin, n, p, packed.get(), in, begin, m.get());
        }
      }
    });
  }

  void run() {
    if (B == 0) return;
    if constexpr (kFixed) balance_factors();
    const bool few = kF * words * 4 * B * tiles <= kFewBytes;
    if (few && !statistics) block = run_tiles;
    if (statistics) statistics->make_room(blocks() / B * ((block + kSub - 1) / kSub));
    few ? run_few() : run_many();
    if (statistics) statistics->write();
  }

  int64_t blocks() const { return runs * ((run_tiles + block - 1) / block); }
  // the first tile of a block, and their number
  std::pair<int64_t, int64_t> tiles_of(int64_t i) const {
    const int64_t each = blocks() / runs, first = i % each * block;
    return {i / each * run_tiles + first, std::min(block, run_tiles - first)};
  }

  void run_many() const {
    const int64_t panel_size = kF * words * kWide, units = blocks();
    prefer_large_pages(y, static_cast<size_t>(B * H * W * kScale * kScale * O) * sizeof(T));
    const auto packed = scratch<int32_t>(panels * panel_size);
    parallel_for(threads, panels, 1, [&](int64_t from, int64_t to) {
      const auto tile = scratch<int32_t>(kF * kTile);
      for (int64_t p = from; p < to; ++p) pack(p, tile.get(), packed.get() + p * panel_size);
    });
    // few blocks: their panels are shared out too, and each share transforms the input again
    const int64_t shares = units >= 8 * threads ? 1 : std::min<int64_t>(panels, 4);
    parallel_for(threads, units * shares, 1, [&](int64_t from, int64_t to) {
      const Inputs in = room(block);
      const auto m = scratch<float>(kF * kProducts);
      const auto zeros = scratch<T>(C);
      std::fill_n(zeros.get(), C, T{});
      for (int64_t unit = from; unit < to; ++unit) {
        const auto [begin, count] = tiles_of(unit / shares);
        const int64_t share = unit % shares;
        for (int64_t t = 0; t < count; ++t) transform_input(begin + t, zeros.get(), in, t);
        for (int64_t p = panels * share / shares; p < panels * (share + 1) / shares; ++p)
          run_panel(begin, count, p, packed.get() + p * panel_size, in, 0, m.get());
      }
    });
  }
};

template <class T, bool kNative>
void run_tiles(const Args& a, Statistics* statistics) {
  if (few_channels(a.t[0], a.s[0])) return Direct<T, kNative>(a, statistics).run();
  using Factor = std::conditional_t<sizeof(T) == 4, T, int16_t>;
  if (large_tiles(a.t[0], a.t[1], a.s[0]))
    return Conv<T, Factor, 4, false, kNative>(a, statistics).run();
  if (a.s[0].i == 2) return Conv<T, T, 2, true, kNative>(a, nullptr).run();
  Conv<T, T, 2, false, kNative>(a, nullptr).run();
}

void run_typed(const Args& a, Statistics* statistics) {
  if (a.t[0].dtype == DType::f32) return run_tiles<float, false>(a, statistics);
#if VQFAST_LANES == 16
  if (has_avx512_bf16()) return run_tiles<bf16, true>(a, statistics);
#endif
  run_tiles<bf16, false>(a, statistics);
}

void run(const Args& a) { run_typed(a, nullptr); }

void run_stats(const Args& a) {
  Statistics statistics(a.t[4], a.t + 5, a.s + 1);
  run_typed(a, &statistics);
}

}  // namespace

KERNEL(conv3x3, "f32|bf16 f32|bf16 f32|bf16 f32|bf16? -> f32|bf16", run)
KERNEL(conv3x3_stats, "f32|bf16 f32|bf16 f32|bf16 f32|bf16? -> f32|bf16 f32 f32", run_stats)

}  // namespace vqfast::VQFAST_ISA
