// Computes: y = u * sigmoid(u), u = w_c * (x - mean_g) * rstd_g + b_c, over groups of C / G
//   channels and all positions of x [B, C, *S]; rstd = 1 / sqrt(var + eps), biased.
// Contract: x contiguous or channels-last (x[b][position][channel]); y lies as x does. w and b may
//   have another type than x. mean and rstd [B, G] float32. NaN and infinities spread over their
//   own group only.
// Numerics: moments are taken about the mean of a block, from float32 differences to an element of
//   the block, and blocks are merged in float64 (Chan): a large offset costs no digits. Apart from
//   that float32, rounded once to the output type.
// Shape of the code: units of work as in group_runs.h. Contiguous, the values of a group are read
//   for the moments, then again (from cache where the group fits) for y. With given moments
//   (_apply) the first half is left out.
// Ladder (channels-last, 128 channels at 256px, 1 thread): Zen 5, 2026-11-25: sums in registers and
//   large pages for new outputs, float32 19.6 -> 7.6 ms, of which 12 were the clearing of small
//   pages; bfloat16 6.6 -> 4.9, and 4.3 with a reciprocal of 14 bits in place of a division. Zen 4,
//   2026-11-30: bfloat16 6.2 -> 4.3 ms with vcvtneps2bf16, an exponential that needs no clamping,
//   and the values of a channel in registers; 2.3 of them are the second half.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "group_layout.h"
#include "kernel.h"
#include "large_pages.h"
#include "parallel.h"

#ifndef VQFAST_ISA
namespace vqfast {
namespace {
const char* why_not(const Inputs& a) { return group_norm::layout_refusal(a.t[0]); }
}  // namespace
REFUSES(group_norm_silu, why_not)
REFUSES(group_norm_silu_apply, why_not)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/group_norm_silu.cpp"
#include "foreach_isa.h"
// clang-format off: simd.h comes first
#include "simd.h"
#include "rounded_store.h"
#include "silu.h"
#include "group_runs.h"
// clang-format on

namespace vqfast::VQFAST_ISA {
namespace {

constexpr int kVecs = 4;  // of channels whose sums or parameters stay in registers

struct Moments {
  double n = 0, mean = 0, m2 = 0;
  void merge(double other_n, double other_mean, double other_m2) {
    const double total = n + other_n, gap = other_mean - mean;
    mean += gap * (other_n / total);
    m2 += other_m2 + gap * gap * (n * other_n / total);
    n = total;
  }
};

// What the second half of the forward pass reads, and y.
template <class T>
struct Given {
  const T* x;
  const std::vector<float>&w, &b;  // [C]
  const float *mean, *rstd;        // [B, G]
  T* y;
};

// y[i] = silu((x[i] - mean) * scale + shift)
template <bool kNative, class T>
VQFAST_INLINE void activate(const T* x, T* y, int n, VF mean, VF scale, VF shift) {
  const VF u = fma(load_n(x, n) - mean, scale, shift);
  store_rounded<kNative>(y, silu<std::is_same_v<T, bf16>>(u), n);
}

// ---- contiguous ---------------------------------------------------------------------------------

VQFAST_INLINE VI lanes_below(int n) {
  VI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < n;
}

template <class T>
void add_block(const T* x, int64_t n, Moments& into) {
  const float first = to_float(x[0]);
  VF sum{};
  vectors(n, [&](int64_t i, int width) { sum += load_n(x + i, width, first) - first; });
  const float mean = reduce_add(sum) / static_cast<float>(n);
  VF square{}, drift{};  // drift: what rounding left in the mean
  vectors(n, [&](int64_t i, int width) {
    VF gap = load_n(x + i, width) - first - mean;
    if (width < kLanes) gap = lanes_below(width) ? gap : VF{};
    square = fma(gap, gap, square);
    drift += gap;
  });
  into.merge(static_cast<double>(n), static_cast<double>(first) + mean + reduce_add(drift) / n,
             reduce_add(square));
}

template <class T>
void moments_contiguous(const T* x, const Shape& s, int64_t unit, double eps, float* mean,
                        float* rstd) {
  Moments m;
  for (int64_t i = 0; i < s.count(); i += kBlock)
    add_block(x + unit * s.count() + i, std::min(kBlock, s.count() - i), m);
  mean[unit] = static_cast<float>(m.mean);
  rstd[unit] = static_cast<float>(1.0 / std::sqrt(m.m2 / m.n + eps));
}

// a group of one sample: values [per, S]
template <class T, bool kNative>
void apply_contiguous(const Given<T>& g, const Shape& s, int64_t unit) {
  for (int64_t j = 0; j < s.per(); ++j) {
    const int64_t c = unit % s.G * s.per() + j, at = (unit * s.per() + j) * s.S;
    const VF mean = broadcast(g.mean[unit]), scale = broadcast(g.rstd[unit] * g.w[c]);
    vectors(s.S, [&](int64_t i, int width) {
      activate<kNative>(g.x + at + i, g.y + at + i, width, mean, scale, broadcast(g.b[c]));
    });
  }
}

// ---- channels last ------------------------------------------------------------------------------

// moments [G] of one run of `rows` positions; the sums of a few channels stay in registers
template <class T>
void run_moments(const T* x, int64_t rows, const Shape& s, Moments* moments) {
  channel_blocks<kVecs>(s.C, [&](int64_t c, int width, auto n) __attribute__((always_inline)) {
    constexpr int kN = n;
    VF shift[kN], mean[kN], square[kN], drift[kN];
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) {
      shift[i] = load_n(x + c + i * kLanes, width);
      mean[i] = square[i] = drift[i] = VF{};
    }
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kN; ++i)
        mean[i] += load_n(x + r * s.C + c + i * kLanes, width) - shift[i];
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) mean[i] = mean[i] / static_cast<float>(rows);
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kN; ++i) {
        const VF gap = load_n(x + r * s.C + c + i * kLanes, width) - shift[i] - mean[i];
        square[i] = fma(gap, gap, square[i]);
        drift[i] += gap;
      }
    for (int i = 0; i < kN; ++i)
      for (int lane = 0; lane < width; ++lane)
        moments[(c + i * kLanes + lane) / s.per()].merge(
            static_cast<double>(rows),
            static_cast<double>(shift[i][lane]) + mean[i][lane] + drift[i][lane] / rows,
            square[i][lane]);
  });
}

template <class T>
void moments_last(const T* x, const Shape& s, int threads, double eps, float* mean, float* rstd) {
  const Runs runs(s);
  std::vector<Moments> parts(s.B * runs.count * s.G);
  each_run(threads, s, runs, [&](int64_t sample, int64_t run, int64_t at, int64_t rows) {
    run_moments(x + at, rows, s, &parts[(sample * runs.count + run) * s.G]);
  });
  for (int64_t i = 0; i < s.B * s.G; ++i) {
    Moments m;
    for (int64_t run = 0; run < runs.count; ++run) {
      const Moments& part = parts[(i / s.G * runs.count + run) * s.G + i % s.G];
      m.merge(part.n, part.mean, part.m2);
    }
    mean[i] = static_cast<float>(m.mean);
    rstd[i] = static_cast<float>(1.0 / std::sqrt(m.m2 / m.n + eps));
  }
}

template <class T, bool kNative>
void apply_last(const Given<T>& g, const Shape& s, int threads) {
  constexpr int64_t kNear = 32;  // positions whose channels go block by block: they stay in L1
  prefer_large_pages(g.y, static_cast<size_t>(s.B * s.S * s.C) * sizeof(T));
  each_run(threads, s, Runs(s), [&](int64_t sample, int64_t, int64_t at, int64_t rows) {
    const auto mu = spread(g.mean + sample * s.G, s);
    auto scale = spread(g.rstd + sample * s.G, s);
    for (int64_t c = 0; c < s.C; ++c) scale[c] *= g.w[c];
    for (int64_t first = 0; first < rows; first += kNear) {
      const int64_t end = std::min(rows, first + kNear);
      channel_blocks<kVecs>(s.C, [&](int64_t c, int width, auto n) __attribute__((always_inline)) {
        constexpr int kN = n;
        VF m[kN], a[kN], b[kN];
#pragma GCC unroll 4
        for (int i = 0; i < kN; ++i) {
          m[i] = load_n(&mu[c + i * kLanes], width);
          a[i] = load_n(&scale[c + i * kLanes], width);
          b[i] = load_n(&g.b[c + i * kLanes], width);
        }
        for (int64_t r = first; r < end; ++r)
#pragma GCC unroll 4
          for (int i = 0; i < kN; ++i) {
            const int64_t to = at + r * s.C + c + i * kLanes;
            activate<kNative>(g.x + to, g.y + to, width, m[i], a[i], b[i]);
          }
      });
    }
  });
}

// ---- entry points -------------------------------------------------------------------------------

// x and the affine, at their places in a; the moments are found first unless they are given
template <class T, bool kNative>
void normalise(const Args& a, const Shape& s, const double* eps, float* mean, float* rstd, T* y) {
  const auto w = widen(a.t[1]), b = widen(a.t[2]);
  const Given<T> g{a.t[0].as<T>(), w, b, mean, rstd, y};
  if (s.last) {
    if (eps) moments_last(g.x, s, a.threads, *eps, mean, rstd);
    return apply_last<T, kNative>(g, s, a.threads);
  }
  parallel_for(a.threads, s.B * s.G, 1, [&](int64_t from, int64_t to) {
    for (int64_t unit = from; unit < to; ++unit) {
      if (eps) moments_contiguous(g.x, s, unit, *eps, mean, rstd);
      apply_contiguous<T, kNative>(g, s, unit);
    }
  });
}

template <class T, bool kNative = false>
void forward(const Args& a) {
  normalise<T, kNative>(a, group_norm::shape_of(a.t[0], a.s[0].i), &a.s[1].f, a.t[4].as<float>(),
                        a.t[5].as<float>(), a.t[3].as<T>());
}

template <class T, bool kNative = false>
void apply(const Args& a) {
  normalise<T, kNative>(a, group_norm::shape_of(a.t[0], a.t[3].shape[1]), nullptr,
                        a.t[3].as<float>(), a.t[4].as<float>(), a.t[5].as<T>());
}

void run(const Args& a) {
  if (a.t[0].dtype == DType::f32) forward<float>(a);
  if (a.t[0].dtype == DType::f16) forward<f16>(a);
  if (a.t[0].dtype == DType::bf16) (has_avx512_bf16() ? forward<bf16, true> : forward<bf16>)(a);
}

void run_apply(const Args& a) {
  if (a.t[0].dtype == DType::f32) apply<float>(a);
  if (a.t[0].dtype == DType::f16) apply<f16>(a);
  if (a.t[0].dtype == DType::bf16) (has_avx512_bf16() ? apply<bf16, true> : apply<bf16>)(a);
}

}  // namespace

KERNEL(group_norm_silu, "f32|f16|bf16~ f32|f16|bf16 f32|f16|bf16 -> f32|f16|bf16 f32 f32", run)
KERNEL(group_norm_silu_apply, "f32|f16|bf16~ f32|f16|bf16 f32|f16|bf16 f32 f32 -> f32|f16|bf16",
       run_apply)

}  // namespace vqfast::VQFAST_ISA
