// Computes: dx, dw and db of group_norm_silu from grad, x and the saved mean and rstd [B, G]. With
//   xhat = (x - mean_g) * rstd_g and u = w_c * xhat + b_c: du = grad * sigmoid(u) * (1 + u * (1 -
//   sigmoid(u))), db = sum(du), dw = sum(du xhat), dx = rstd * (w du - mean(w du) - xhat * mean(w
//   du xhat)), the means over a group.
// Contract: x contiguous or channels-last (x[b][position][channel]); grad and dx lie as x does. w
//   and b may have another type than x. NaN and infinities spread over their own group only, and
//   dw and db of its channels.
// Numerics: sums are float32 per block, float64 between blocks. Apart from that float32, rounded
//   once to the output type.
// Shape of the code: units of work as in group_runs.h; grad and x are read once for the sums and
//   once for dx, and the slope is computed twice rather than stored.
// Ladder (Zen 4, loaded, 2026-11-30), channels-last, bfloat16 4 x 128 channels at 64px: sums and
//   parameters in registers and no division 3.16 -> 2.7 ms; 2^t by a cubic and a reciprocal of 14
//   bits (relative error 2^-12 of the gate) 1.86.
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
const char* why_not(const Inputs& a) {
  const View &grad = a.t[0], &x = a.t[1];
  if (grad.dtype != x.dtype) return "grad and x differ in dtype";
  if (const char* why = group_norm::layout_refusal(x)) return why;
  const bool last = !group_norm::lies_as(x, false);
  return group_norm::lies_as(grad, last) ? nullptr : "grad does not lie as x does";
}
}  // namespace
REFUSES(group_norm_silu_backward, why_not)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/group_norm_silu_backward.cpp"
#include "foreach_isa.h"
// clang-format off: simd.h comes first
#include "simd.h"
#include "silu.h"
#include "group_runs.h"
// clang-format on

namespace vqfast::VQFAST_ISA {
namespace {

constexpr int kVecs = 2;  // of channels whose sums and parameters, six each, stay in registers

// What one value needs; vectors of equal entries (contiguous) or one entry per channel (channels
// last).
struct Affine {
  VF mean, rstd, w, b;
};

struct Slope {
  VF x_hat, du;
};

template <bool kCoarse>
VQFAST_INLINE Slope slope(VF x, VF grad, const Affine& p) {
  const VF x_hat = (x - p.mean) * p.rstd, u = fma(x_hat, p.w, p.b), gate = sigmoid<kCoarse>(u);
  return {x_hat, grad * gate * fma(u, 1.0f - gate, broadcast(1.0f))};
}

// sums of du and du * xhat of each (sample, channel) into db and dw; then dx
template <class T>
void backward_contiguous(const Args& a, const Shape& s, const std::vector<float>& w,
                         const std::vector<float>& b, double* dw, double* db) {
  const float *mean = a.t[4].as<float>(), *rstd = a.t[5].as<float>();
  parallel_for(a.threads, s.B * s.G, 1, [&](int64_t from, int64_t to) {
    for (int64_t unit = from; unit < to; ++unit) {
      double plain = 0, along = 0;
      for (int pass = 0; pass < 2; ++pass) {
        const VF c1 = broadcast(static_cast<float>(plain / s.count()));
        const VF c2 = broadcast(static_cast<float>(along / s.count()));
        for (int64_t j = 0; j < s.per(); ++j) {
          const int64_t c = unit % s.G * s.per() + j, at = unit * s.per() + j;  // at = b * C + c
          const T *grad = a.t[0].as<T>() + at * s.S, *x = a.t[1].as<T>() + at * s.S;
          T* dx = a.t[6].as<T>() + at * s.S;
          const Affine p{broadcast(mean[unit]), broadcast(rstd[unit]), broadcast(w[c]),
                         broadcast(b[c])};
          if (pass == 1) {
            vectors(s.S, [&](int64_t i, int width) {
              const Slope g =
                  slope<std::is_same_v<T, bf16>>(load_n(x + i, width), load_n(grad + i, width), p);
              store_n(dx + i, p.rstd * (p.w * g.du - c1 - g.x_hat * c2), width);
            });
            continue;
          }
          for (int64_t begin = 0; begin < s.S; begin += kBlock) {
            VF du{}, du_x{};
            vectors(std::min(kBlock, s.S - begin), [&](int64_t i, int width) {
              // lanes past the end have grad = 0
              const Slope g = slope<std::is_same_v<T, bf16>>(
                  load_n(x + begin + i, width, mean[unit]), load_n(grad + begin + i, width), p);
              du += g.du;
              du_x = fma(g.du, g.x_hat, du_x);
            });
            db[at] += reduce_add(du);
            dw[at] += reduce_add(du_x);
          }
          plain += w[c] * db[at];
          along += w[c] * dw[at];
        }
      }
    }
  });
}

// Of the channels-last backward pass: what all runs read, and the positions that a few channels
// take together so that their cache lines are read once.
template <class T>
struct Backward {
  static constexpr int64_t kRows = 16;
  const Shape& s;
  const T *grad, *x;
  const float *mean, *rstd, *w, *b;  // mean and rstd [C] of the sample

  VQFAST_INLINE Affine affine(int64_t c, int width) const {
    return {load_n(mean + c, width), load_n(rstd + c, width), load_n(w + c, width),
            load_n(b + c, width)};
  }

  // sums [C] over `rows` positions from value `at` on
  void add(int64_t at, int64_t rows, float* du, float* du_x) const {
    for (int64_t begin = 0; begin < rows; begin += kRows) {
      const int64_t end = std::min(rows, begin + kRows);
      channel_blocks<kVecs>(s.C, [&](int64_t c, int width, auto n) __attribute__((always_inline)) {
        constexpr int kN = n;
        Affine p[kN];
        VF plain[kN], along[kN];
#pragma GCC unroll 2
        for (int i = 0; i < kN; ++i) {
          p[i] = affine(c + i * kLanes, width);
          plain[i] = load_n(du + c + i * kLanes, width);
          along[i] = load_n(du_x + c + i * kLanes, width);
        }
        for (int64_t r = begin; r < end; ++r)
#pragma GCC unroll 2
          for (int i = 0; i < kN; ++i) {
            const int64_t v = at + r * s.C + c + i * kLanes;
            const Slope g =
                slope<std::is_same_v<T, bf16>>(load_n(x + v, width), load_n(grad + v, width), p[i]);
            plain[i] += g.du;
            along[i] = fma(g.du, g.x_hat, along[i]);
          }
#pragma GCC unroll 2
        for (int i = 0; i < kN; ++i) {
          store_n(du + c + i * kLanes, plain[i], width);
          store_n(du_x + c + i * kLanes, along[i], width);
        }
      });
    }
  }

  // dx of `rows` positions from value `at` on; k1 and k2 [C]: the means of w du and w du xhat
  void write(int64_t at, int64_t rows, const float* k1, const float* k2, T* dx) const {
    for (int64_t begin = 0; begin < rows; begin += kRows) {
      const int64_t end = std::min(rows, begin + kRows);
      channel_blocks<kVecs>(s.C, [&](int64_t c, int width, auto n) __attribute__((always_inline)) {
        constexpr int kN = n;
        Affine p[kN];
        VF m1[kN], m2[kN];
#pragma GCC unroll 2
        for (int i = 0; i < kN; ++i) {
          p[i] = affine(c + i * kLanes, width);
          m1[i] = load_n(k1 + c + i * kLanes, width);
          m2[i] = load_n(k2 + c + i * kLanes, width);
        }
        for (int64_t r = begin; r < end; ++r)
#pragma GCC unroll 2
          for (int i = 0; i < kN; ++i) {
            const int64_t v = at + r * s.C + c + i * kLanes;
            const Slope g =
                slope<std::is_same_v<T, bf16>>(load_n(x + v, width), load_n(grad + v, width), p[i]);
            store_n(dx + v, p[i].rstd * (p[i].w * g.du - m1[i] - g.x_hat * m2[i]), width);
          }
      });
    }
  }
};

template <class T>
void backward_last(const Args& a, const Shape& s, const std::vector<float>& w,
                   const std::vector<float>& b, double* dw, double* db) {
  T* dx = a.t[6].as<T>();
  prefer_large_pages(dx, static_cast<size_t>(s.B * s.S * s.C) * sizeof(T));
  const Runs runs(s);
  const auto each = [&](auto&& f) {
    each_run(a.threads, s, runs, [&](int64_t sample, int64_t run, int64_t at, int64_t rows) {
      const auto mean = spread(a.t[4].as<float>() + sample * s.G, s);
      const auto rstd = spread(a.t[5].as<float>() + sample * s.G, s);
      const Backward<T> pass{s,           a.t[0].as<T>(), a.t[1].as<T>(), mean.data(),
                             rstd.data(), w.data(),       b.data()};
      f(pass, sample, run, at, rows);
    });
  };
  std::vector<float> parts(s.B * runs.count * 2 * s.C);  // sums of du, then of du * xhat
  each([&](const auto& pass, int64_t sample, int64_t run, int64_t at, int64_t rows) {
    float* du = &parts[(sample * runs.count + run) * 2 * s.C];
    pass.add(at, rows, du, du + s.C);
  });
  std::vector<double> plain(s.B * s.G), along(s.B * s.G);
  for (int64_t i = 0; i < s.B * s.C; ++i) {
    const int64_t sample = i / s.C, c = i % s.C, g = sample * s.G + c / s.per();
    for (int64_t run = 0; run < runs.count; ++run) {
      const float* part = &parts[(sample * runs.count + run) * 2 * s.C];
      db[i] += part[c];
      dw[i] += part[s.C + c];
    }
    plain[g] += w[c] * db[i] / s.count();
    along[g] += w[c] * dw[i] / s.count();
  }
  const std::vector<float> c1(plain.begin(), plain.end()), c2(along.begin(), along.end());
  each([&](const auto& pass, int64_t sample, int64_t, int64_t at, int64_t rows) {
    const auto k1 = spread(&c1[sample * s.G], s), k2 = spread(&c2[sample * s.G], s);
    pass.write(at, rows, k1.data(), k2.data(), dx);
  });
}

// the sums of a channel -> dw or db, in its type
void narrow(const std::vector<double>& from, const View& v) {
  for (size_t i = 0; i < from.size(); ++i) {
    const float x = static_cast<float>(from[i]);
    if (v.dtype == DType::f32) v.as<float>()[i] = x;
    if (v.dtype == DType::f16) v.as<f16>()[i] = from_float<f16>(x);
    if (v.dtype == DType::bf16) v.as<bf16>()[i] = from_float<bf16>(x);
  }
}

template <class T>
void backward(const Args& a) {
  const Shape s = group_norm::shape_of(a.t[1], a.s[0].i);
  const auto w = widen(a.t[2]), b = widen(a.t[3]);
  std::vector<double> dw(s.B * s.C), db(s.B * s.C);
  (s.last ? backward_last<T> : backward_contiguous<T>)(a, s, w, b, dw.data(), db.data());
  for (int64_t i = s.C; i < s.B * s.C; ++i) {
    dw[i % s.C] += dw[i];
    db[i % s.C] += db[i];
  }
  dw.resize(s.C);
  db.resize(s.C);
  narrow(dw, a.t[7]);
  narrow(db, a.t[8]);
}

void run(const Args& a) {
  if (a.t[0].dtype == DType::f32) backward<float>(a);
  if (a.t[0].dtype == DType::f16) backward<f16>(a);
  if (a.t[0].dtype == DType::bf16) backward<bf16>(a);
}

}  // namespace

KERNEL(group_norm_silu_backward,
       "f32|f16|bf16~ f32|f16|bf16~ f32|f16|bf16 f32|f16|bf16 f32 f32 -> f32|f16|bf16 f32|f16|bf16 "
       "f32|f16|bf16",
       run)

}  // namespace vqfast::VQFAST_ISA
