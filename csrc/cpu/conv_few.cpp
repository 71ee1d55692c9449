// Computes: y[b, i, j, o] = bias[o] + sum_{p, q, c} w[o, p, q, c] x[b, s i + p - d, s j + q - d,
//   c], x zero outside: a convolution of stride s = s[0] and padding d = s[1] on few positions of
//   y. x [B, H, W, C], w [O, side, side, C], bias [O] or none, y [B, h, w, O], all contiguous (NCHW
//   tensors in channels_last order). w and bias are of one type, that of x, or float32 with x and y
//   in bfloat16.
//
// Contract: any sizes; few output channels and many positions are refused, as others are faster.
//
// Numerics: each output is summed over (p, q, c) in blocks of kChain words, each one chain of
//   float32 multiply-adds, and the blocks one after the other. Bfloat16: a float32 weight is
//   rounded before it meets x, the result once. An output does not depend on the rest of the batch
//   or on the threads.
//
// Shape of the code: y = X W' (few_positions.h). A block of the columns of X stays in L2 while all
//   weights that meet it pass by once, as they lie in memory; kChain words of a panel of 2 kLanes
//   outputs stay in L1 from their transposition through all positions.
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
  const View &x = a.t[0], &w = a.t[1], &bias = a.t[2];
  const auto side = [&](int64_t n) { return (n + 2 * a.s[1].i - w.shape[1]) / a.s[0].i + 1; };
  if (w.dtype != x.dtype && w.dtype != DType::f32) return "x and weight differ in dtype";
  if (bias.data && bias.dtype != w.dtype) return "weight and bias differ in dtype";
  if (x.shape[0] * side(x.shape[1]) * side(x.shape[2]) > 1024) return "more than 1024 positions";
  if (w.shape[0] < 16) return "fewer than 16 output channels";
  return nullptr;
}
}  // namespace
REFUSES(conv_few, why_not_few)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/conv_few.cpp"
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

constexpr int64_t kBlockBytes = 256 << 10;

// T: of x and y; From: of the weight and the bias; kNative: vdpbf16ps and its rounding are there
template <class T, class From, bool kNative>
struct Conv : Few {
  static constexpr int64_t kPer = 4 / sizeof(T);

  const From *weight, *bias;
  T* y;

  explicit Conv(const Args& a)
      : Few(a.t[0], a.t[3], a.t[1], a.s),
        weight(a.t[1].as<From>()),
        bias(a.t[2].as<From>()),
        y(a.t[3].as<T>()) {}

  // kChain words from k on of a panel of weights, rounded -> staged [kChain / kLanes, kWide,
  // kLanes]; zeros where there are none
  void stage(int64_t panel, int64_t k, int32_t* staged) const {
    for (int64_t r = 0; r < kWide; ++r) {
      const int64_t row = panel * kWide + r;
      const From* of = weight + row * K;
      for (int64_t word = 0; word < kChain; word += kLanes) {
        T* at = reinterpret_cast<T*>(staged + word * kWide + r * kLanes);
#pragma GCC unroll 2
        for (int part = 0; part < kPer; ++part) {
          const int64_t first = (k + word) * kPer + part * kLanes;
          const int n = row < O ? static_cast<int>(std::clamp<int64_t>(K - first, 0, kLanes)) : 0;
          store_rounded<kNative>(at + part * kLanes, n ? load_n(of + first, n) : VF{}, kLanes);
        }
      }
    }
  }

  void run(const T* x, int threads) const {
    const Words v = neighbours(x, threads);
    // words of X that are kept in L2 while all weights that meet them pass by
    const int64_t block =
        std::max<int64_t>(1, kBlockBytes / (4 * kChain * std::max<int64_t>(P, 1))) * kChain;
    parallel_for(threads, (O + kWide - 1) / kWide, 1, [&](int64_t from, int64_t to) {
      const auto staged = scratch<int32_t>(kChain * kWide), u = scratch<int32_t>(kChain * kWide);
      const int64_t size = (P + kRows) * kWide;
      const auto m = scratch<float>((to - from) * size);
      Ahead ahead;
      for (int64_t begin = 0; begin < v.columns; begin += block)
        for (int64_t panel = from; panel < to; ++panel)
          for (int64_t k = begin; k < std::min(begin + block, v.columns); k += kChain) {
            const int64_t n = std::min(kChain, v.columns - k);
            stage(panel, k, staged.get());
            for (int64_t word = 0; word < n; word += kLanes)
              for (int half = 0; half < kWide; half += kLanes)
                transpose(staged.get() + word * kWide + half * kLanes,
                          std::min<int64_t>(kLanes, n - word), u.get() + word * kWide + half);
            // the weights of the next block of words, or of the next panel
            const int64_t end = std::min(begin + block, v.columns);
            const bool last = k + n == end;
            const int64_t next = last ? panel + 1 : panel, at = (last ? begin : k + n) * kPer;
            const int64_t count = std::min(kChain * kPer, (last ? end * kPer : K) - at);
            ahead.clear();
            if (next < to)
              ahead.add(weight + next * kWide * K + at, std::min<int64_t>(kWide, O - next * kWide),
                        K * static_cast<int64_t>(sizeof(From)),
                        count * static_cast<int64_t>(sizeof(From)));
            multiply_few<T, kNative>(v.row(0) + k, v.stride, P, u.get(), n, k > 0,
                                     m.get() + (panel - from) * size, ahead);
          }
      for (int64_t panel = from; panel < to; ++panel)
        for (int half = 0; half < kWide; half += kLanes) {
          const int64_t o = panel * kWide + half;
          if (o >= O) break;
          const int n = static_cast<int>(std::min<int64_t>(kLanes, O - o));
          const VF b = bias ? load_n(bias + o, n) : VF{};
          const float* sums = m.get() + (panel - from) * size + half;
          for (int64_t p = 0; p < P; ++p)
            store_rounded<kNative>(y + p * O + o, load(sums + p * kWide) + b, n);
        }
    });
  }
};

template <class T, bool kNative>
void run_conv(const Args& a) {
  if (a.t[1].dtype == DType::f32)
    Conv<T, float, kNative>(a).run(a.t[0].as<T>(), a.threads);
  else if constexpr (sizeof(T) == 2)
    Conv<T, T, kNative>(a).run(a.t[0].as<T>(), a.threads);
}

void run(const Args& a) {
  if (a.t[0].dtype == DType::f32) return run_conv<float, false>(a);
#if VQFAST_LANES == 16
  if (has_avx512_bf16()) return run_conv<bf16, true>(a);
#endif
  run_conv<bf16, false>(a);
}

}  // namespace

KERNEL(conv_few, "f32|bf16 f32|bf16 f32|bf16? -> f32|bf16", run)

}  // namespace vqfast::VQFAST_ISA
