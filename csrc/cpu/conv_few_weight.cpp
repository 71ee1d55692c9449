// Computes: dw[o, p, q, c] = sum_{b, i, j} g[b, i, j, o] x[b, s i + p - d, s j + q - d, c] and
//   db[o] = sum_{b, i, j} g[b, i, j, o]: the gradients of conv_few's weight and bias. x
//   [B, H, W, C], g [B, h, w, O], dw [O, side, side, C], db [O], all contiguous; dw and db of the
//   type of x and g, or float32.
//
// Contract: any sizes; few channels and many positions are refused, as others are faster.
//
// Numerics: sums over positions in blocks of kChain words, each one chain of float32 multiply-adds,
//   and the blocks one after the other, in an order that depends on the shape alone. A bfloat16
//   result is rounded once.
//
// Shape of the code: dW = g' X (few_positions.h). A panel of 2 kLanes of the K columns of X, two
//   positions side by side in bfloat16, stays in L1 while the outputs pass by; the result is
//   written once, in the type that its weight has.
//
// Ladder (1 thread of Zen 4, loaded, 2026-11-30), ms with weights in float32 and maps in bfloat16,
//   against lowering by copies, oneDNN's product and the casts of a weight in bfloat16: 512
//   channels at 4 x 4x4 positions y 2.1, dx 2.3, dw 2.0 (2.4, 2.1, 2.5; 1.3 would be the limit of
//   vdpbf16ps), 256 at 4 x 8x8 1.6 each (1.7, 1.8, 1.8). Float32: as oneDNN's product. No gain: to
//   ask for all of the next block of weights at once (the CPU has some 20 buffers and halts: as
//   slow as not at all), or at each register tile. dw past the caches: 2.9 -> 2.0.
#include <algorithm>
#include <vector>

#include "kernel.h"
#include "large_pages.h"
#include "parallel.h"

#ifndef VQFAST_ISA
namespace vqfast {
namespace {
const char* why_not_few(const Inputs& a) {
  const View &x = a.t[0], &g = a.t[1];
  if (x.dtype != g.dtype) return "inputs differ in dtype";
  if (g.shape[0] * g.shape[1] * g.shape[2] > 1024) return "more than 1024 positions";
  if (std::min(x.shape[3], g.shape[3]) < 16) return "fewer than 16 channels";
  return nullptr;
}
}  // namespace
REFUSES(conv_few_weight, why_not_few)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/conv_few_weight.cpp"
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

constexpr int64_t kSub = 8 * kRows;  // outputs whose products are held at a time

// T: of x and g; To: of dw and db; kNative: vdpbf16ps and its rounding are there
template <class T, class To, bool kNative>
struct Gradient : Few {
  static constexpr int64_t kPer = 4 / sizeof(T);

  To *dw, *db;

  explicit Gradient(const Args& a)
      : Few(a.t[0], a.t[1], a.t[2], a.s), dw(a.t[2].as<To>()), db(a.t[3].as<To>()) {}

  // g' [O, P], two positions to a word in bfloat16; and db
  Words turned(const T* g, int threads) const {
    Words out(O, (P + kPer - 1) / kPer);
    parallel_for(threads, O, kWide, [&](int64_t from, int64_t to) {
      std::vector<float> sums(static_cast<size_t>(to - from));
      for (int64_t p = 0; p < P; ++p)
        for (int64_t o = from; o < to; ++o) {
          reinterpret_cast<T*>(out.row(o))[p] = g[p * O + o];
          sums[o - from] += to_float(g[p * O + o]);
        }
      for (int64_t o = from; o < to; ++o) {
        if (P % kPer) reinterpret_cast<T*>(out.row(o))[P] = T{};
        db[o] = from_float<To>(sums[o - from]);
      }
    });
    return out;
  }

  // Whole lines of memory go past the caches: nobody reads them before the optimiser, and Linux or
  // the CPU would have to read them first.
  VQFAST_INLINE static void put(To* to, VF v, int n) {
#if VQFAST_LANES == 16
    if constexpr (sizeof(To) == 4)
      if (n == kLanes && reinterpret_cast<uintptr_t>(to) % 64 == 0)
        return _mm512_stream_ps(to, (__m512)v);
#endif
    store_rounded<kNative>(to, v, n);
  }

  void run(const T* x, const T* g, int threads) const {
    const Words columns = neighbours(x, threads), v = turned(g, threads);
    parallel_for(threads, (K + kWide - 1) / kWide, 1, [&](int64_t from, int64_t to) {
      const auto u = scratch<int32_t>(v.columns * kWide);
      const auto m = scratch<float>((kSub + kRows) * kWide);
      std::fill_n(m.get(), kSub * kWide, 0.0f);  // what is left where there are no positions
      for (int64_t panel = from; panel < to; ++panel) {
        const int64_t k = panel * kWide, count = std::min<int64_t>(kWide, K - k);
        for (int64_t word = 0; word < v.columns; ++word) {
          const int64_t p = word * kPer;
          const auto row = [&](int64_t r) {
            return reinterpret_cast<const T*>(columns.row(r)) + k;
          };
          interleave<T, kNative>(row(p), p + 1 < P ? row(p + 1) : nullptr, count,
                                 u.get() + word * kWide);
        }
        for (int64_t sub = 0; sub < O; sub += kSub) {
          const int64_t rows = std::min(kSub, O - sub);
          for (int64_t word = 0; word < v.columns; word += kChain)
            multiply_rows<T, kNative>(v.row(sub) + word, v.stride, rows, u.get() + word * kWide,
                                      std::min(kChain, v.columns - word), word > 0, m.get());
          for (int64_t o = 0; o < rows; ++o)
            for (int half = 0; half < kWide; half += kLanes) {
              const int n = static_cast<int>(std::clamp<int64_t>(count - half, 0, kLanes));
              if (n) put(dw + (sub + o) * K + k + half, load(m.get() + o * kWide + half), n);
            }
        }
      }
#if VQFAST_LANES == 16
      _mm_sfence();
#endif
    });
  }
};

template <class T, bool kNative>
void run_gradient(const Args& a) {
  const T *x = a.t[0].as<T>(), *g = a.t[1].as<T>();
  if (a.t[2].dtype == DType::f32)
    Gradient<T, float, kNative>(a).run(x, g, a.threads);
  else if constexpr (sizeof(T) == 2)
    Gradient<T, T, kNative>(a).run(x, g, a.threads);
}

void run(const Args& a) {
  if (a.t[0].dtype == DType::f32) return run_gradient<float, false>(a);
#if VQFAST_LANES == 16
  if (has_avx512_bf16()) return run_gradient<bf16, true>(a);
#endif
  run_gradient<bf16, false>(a);
}

}  // namespace

KERNEL(conv_few_weight, "f32|bf16 f32|bf16 -> f32|bf16 f32|bf16", run)

}  // namespace vqfast::VQFAST_ISA
