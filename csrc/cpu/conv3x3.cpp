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
#include "winograd_tiles.h"
#include "winograd_conv.h"
// clang-format on

namespace vqfast::VQFAST_ISA {
namespace {

template <class T, bool kNative>
void run_tiles(const Args& a, Statistics* statistics) {
  if (few_channels(a.t[0], a.s[0])) return DirectConv<T, kNative>(a, statistics).run();
  using Factor = std::conditional_t<sizeof(T) == 4, T, int16_t>;
  if (large_tiles(a.t[0], a.t[1], a.s[0]))
    return WinogradConv<T, Factor, 4, false, kNative>(a, statistics).run();
  if (a.s[0].i == 2) return WinogradConv<T, T, 2, true, kNative>(a, nullptr).run();
  WinogradConv<T, T, 2, false, kNative>(a, nullptr).run();
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
