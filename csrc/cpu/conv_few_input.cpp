// Computes: dx[b, s i + p - d, s j + q - d, c] = sum over all (i, j), (p, q), o of
//     g[b, i, j, o] w[o, p, q, c]
//   that fall on it: the gradient of conv_few's x. g [B, h, w, O], w [O, side, side, C], dx
//   [B, H, W, C], all contiguous; g and dx of one type, w of theirs, or float32 with them in
//   bfloat16.
//
// Contract: any sizes; few input channels and many positions are refused, as others are faster.
//
// Numerics: for each pair of positions the sum over o in blocks of kChain words, each one chain of
//   float32 multiply-adds; these are added up in float32, in the order of the taps and the
//   positions of y. Bfloat16: a float32 weight is rounded before it meets g, the result once. A
//   result does not depend on the rest of the batch or on the threads.
//
// Shape of the code: dX = g W (few_positions.h), a panel of 2 kLanes channels of dx at a time: for
//   each tap the weights as they lie in memory, two outputs side by side in bfloat16, and the
//   products of all positions, which are added to those of dx while all of that is in L1 and L2.
//
// Ladder: in the header of conv_few_weight.cpp.
#include <algorithm>
#include <vector>

#include "kernel.h"
#include "large_pages.h"
#include "parallel.h"

#ifndef VQFAST_ISA
namespace vqfast {
namespace {
const char* why_not_few(const Inputs& a) {
  const View &g = a.t[0], &w = a.t[1];
  if (w.dtype != g.dtype && w.dtype != DType::f32) return "gradient and weight differ in dtype";
  if (g.shape[0] * g.shape[1] * g.shape[2] > 1024) return "more than 1024 positions";
  if (w.shape[3] < 16) return "fewer than 16 input channels";
  return nullptr;
}
}  // namespace
REFUSES(conv_few_input, why_not_few)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/conv_few_input.cpp"
#include "foreach_isa.h"
// clang-format off: simd.h comes first
#include "simd.h"
#include "dot.h"
#include "rounded_store.h"
#include "panel_products.h"
#include "few_positions.h"
// clang-format on

namespace vqfast::VQFAST_ISA {
namespace {

constexpr int64_t kMostPanels = 4;

// T: of g and dx; From: of the weight; kNative: vdpbf16ps and its rounding are there
template <class T, class From, bool kNative>
struct Gradient : Few {
  static constexpr int64_t kPer = 4 / sizeof(T);

  const From* weight;
  T* dx;

  explicit Gradient(const Args& a)
      : Few(a.t[2], a.t[0], a.t[1], a.s), weight(a.t[1].as<From>()), dx(a.t[2].as<T>()) {}

  // what the words of outputs from k on give the channels [c, c + count) under one tap -> m [panel,
  // P + kRows, kWide], or += from the second block on
  void multiply(const Words& v, int64_t tap, int64_t k, int64_t c, int64_t count, int32_t* u,
                float* m, Ahead& ahead) const {
    const int64_t n = std::min(kChain, v.columns - k);
    for (int64_t word = 0; word < n; ++word) {
      const int64_t o = (k + word) * kPer;
      const From* low = weight + o * K + tap * C + c;
      const From* high = o + 1 < O ? low + K : nullptr;
      for (int64_t first = 0; first < count; first += kWide)
        interleave<T, kNative>(low + first, high ? high + first : nullptr, count - first,
                               u + first * kChain + word * kWide);
    }
    // the next block of weights, of this tap or the next
    const bool last = k + n == v.columns;
    const From* next = weight + (last ? (tap + 1) * C : (k + n) * kPer * K + tap * C) + c;
    const int64_t rows = last ? (tap + 1 < side * side ? O : 0) : O - (k + n) * kPer;
    ahead.clear();
    ahead.add(next, std::min(kChain * kPer, rows), K * static_cast<int64_t>(sizeof(From)),
              count * static_cast<int64_t>(sizeof(From)));
    for (int64_t s = 0; s < (count + kWide - 1) / kWide; ++s)
      multiply_few<T, kNative>(v.row(0) + k, v.stride, P, u + s * kChain * kWide, n, k > 0,
                               m + s * (P + kRows) * kWide, ahead);
  }

  void run(const T* g, int threads) const {
    const int64_t words = (O + kPer - 1) / kPer, positions = B * H * W;
    const Words v(P, words);
    for (int64_t p = 0; p < P; ++p) {
      T* row = reinterpret_cast<T*>(v.row(p));
      std::copy_n(g + p * O, O, row);
      if (O % kPer) row[O] = T{};
    }
    // panels of a unit: the more, the longer the pieces of memory that are read
    const int64_t panels = (C + kWide - 1) / kWide;
    const int64_t most = std::clamp<int64_t>(panels / threads, 1, kMostPanels);
    parallel_for(threads, (panels + most - 1) / most, 1, [&](int64_t from, int64_t to) {
      const auto u = scratch<int32_t>(most * kChain * kWide);
      const auto m = scratch<float>(most * (P + kRows) * kWide);
      const auto sums = scratch<float>(most * positions * kWide);
      Ahead ahead;
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t c = unit * most * kWide, count = std::min(most * kWide, C - c);
        std::fill_n(sums.get(), most * positions * kWide, 0.0f);
        for (int64_t tap = 0; tap < side * side; ++tap) {
          for (int64_t k = 0; k < words; k += kChain)
            multiply(v, tap, k, c, count, u.get(), m.get(), ahead);
          for (int64_t p = 0; p < P; ++p) {
            const int64_t at = neighbour(p, tap / side, tap % side);
            if (at < 0) continue;
            for (int64_t first = 0; first < count; first += kWide) {
              float* sum = sums.get() + first * positions + at * kWide;
              const float* product = m.get() + first * (P + kRows) + p * kWide;
              store(sum, load(sum) + load(product));
              store(sum + kLanes, load(sum + kLanes) + load(product + kLanes));
            }
          }
        }
        for (int64_t at = 0; at < positions; ++at)
          for (int64_t first = 0; first < count; first += kLanes) {
            const int n = static_cast<int>(std::min<int64_t>(kLanes, count - first));
            const int64_t half = first % kWide;
            const float* sum = sums.get() + (first - half) * positions + at * kWide + half;
            store_rounded<kNative>(dx + at * C + c + first, load(sum), n);
          }
      }
    });
  }
};

template <class T, bool kNative>
void run_gradient(const Args& a) {
  if (a.t[1].dtype == DType::f32)
    Gradient<T, float, kNative>(a).run(a.t[0].as<T>(), a.threads);
  else if constexpr (sizeof(T) == 2)
    Gradient<T, T, kNative>(a).run(a.t[0].as<T>(), a.threads);
}

void run(const Args& a) {
  if (a.t[0].dtype == DType::f32) return run_gradient<float, false>(a);
#if VQFAST_LANES == 16
  if (has_avx512_bf16()) return run_gradient<bf16, true>(a);
#endif
  run_gradient<bf16, false>(a);
}

}  // namespace

KERNEL(conv_few_input, "f32|bf16 f32|bf16 -> f32|bf16", run)

}  // namespace vqfast::VQFAST_ISA
