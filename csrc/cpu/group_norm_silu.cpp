// Computes: y = u * sigmoid(u), u = w_c * (x - mean_g) * rstd_g + b_c, over groups of C / G
//   channels and all positions of x [B, C, *S]; rstd = 1 / sqrt(var + eps), biased. Backward: dx,
//   dw, db from grad, x and the saved mean and rstd: du = grad * sigmoid(u) * (1 + u * (1 -
//   sigmoid(u))), dx = rstd * (w du - mean(w du) - xhat * mean(w du xhat)).
// Contract: x contiguous or channels-last (x[b][position][channel]); y, grad and dx lie as x does.
//   w and b may have another type than x. mean and rstd [B, G] float32. NaN and infinities spread
//   over their own group only.
// Numerics: moments are taken about the mean of a block, from float32 differences to an element of
//   the block, and blocks are merged in float64 (Chan): a large offset costs no digits. Sums of the
//   backward pass: float32 per block, float64 between blocks. Apart from that float32, rounded once
//   to the output type.
// Shape of the code: contiguous, a unit of work is a (sample, group): its values are read for the
//   moments, then again (from cache where a group fits) for y. Channels-last, a unit is a run of
//   positions of all channels, with one accumulator per channel in L1; the runs' moments are merged
//   in order between two parallel passes. What a unit is depends on the shape alone: equal bits for
//   any number of threads. With given moments (_apply) the first half is left out.
// Ladder (channels-last, 128 channels at 256px, 1 thread): Zen 5, 2026-11-25: sums in registers and
//   large pages for new outputs, float32 19.6 -> 7.6 ms, of which 12 were the clearing of small
//   pages; bfloat16 6.6 -> 4.9, and 4.3 with a reciprocal of 14 bits in place of a division. Zen 4,
//   2026-11-30: bfloat16 6.2 -> 4.3 ms with vcvtneps2bf16, an exponential that needs no clamping,
//   and the values of a channel in registers; 2.3 of them are the second half. Backward (Zen 4,
//   loaded, 2026-11-30), bfloat16 4 x 128 channels at 64px: sums and parameters in registers and no
//   division 3.16 -> 2.7 ms; 2^t by a cubic and a reciprocal of 14 bits (relative error 2^-12 of
//   the gate) 1.86.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "kernel.h"
#include "large_pages.h"
#include "parallel.h"

#ifndef VQFAST_ISA
namespace vqfast::group_norm {

// x as [B][C][S] or [B][S][C]
struct Shape {
  int64_t B, C, S, G;
  bool last;  // channels last
  int64_t per() const { return C / G; }
  int64_t count() const { return per() * S; }
};

inline bool lies_as(const View& x, bool last) {
  if (x.numel() == 0) return true;
  int64_t expected = 1;
  const auto dense = [&](int i) {
    const bool right = x.shape[i] == 1 || x.stride[i] == expected;
    expected *= x.shape[i];
    return right;
  };
  bool right = !last || dense(1);
  for (int i = x.ndim - 1; i >= 2; --i) right = dense(i) && right;
  if (!last) right = dense(1) && right;
  return dense(0) && right;
}

inline Shape shape_of(const View& x, int64_t groups) {
  int64_t positions = 1;
  for (int i = 2; i < x.ndim; ++i) positions *= x.shape[i];
  return {x.shape[0], x.shape[1], positions, groups, !lies_as(x, false)};
}

namespace {
const char* layout_refusal(const View& x) {
  return lies_as(x, false) || lies_as(x, true) ? nullptr : "neither contiguous nor channels-last";
}
const char* forward_refusal(const Args& a) { return layout_refusal(a.t[0]); }
const char* backward_refusal(const Args& a) {
  const View &grad = a.t[0], &x = a.t[1];
  if (grad.dtype != x.dtype) return "grad and x differ in dtype";
  if (const char* why = layout_refusal(x)) return why;
  return lies_as(grad, !lies_as(x, false)) ? nullptr : "grad does not lie as x does";
}
}  // namespace
REFUSES(group_norm_silu, forward_refusal)
REFUSES(group_norm_silu_apply, forward_refusal)
REFUSES(group_norm_silu_backward, backward_refusal)

}  // namespace vqfast::group_norm
#endif

#define VQFAST_THIS_FILE "cpu/group_norm_silu.cpp"
#include "foreach_isa.h"
// clang-format off: simd.h comes first
#include "simd.h"
#include "rounded_store.h"
#include "silu.h"
// clang-format on

namespace vqfast::VQFAST_ISA {
namespace {

using group_norm::Shape;

constexpr int64_t kBlock = 4096;         // values summed in float32 before float64 takes over
constexpr int64_t kRunValues = 1 << 16;  // values of a channels-last run

VQFAST_INLINE VI lanes_below(int n) {
  VI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < n;
}

// f(offset, width) for whole vectors and then the rest of [0, n)
template <class F>
VQFAST_INLINE void vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}

struct Moments {
  double n = 0, mean = 0, m2 = 0;
  void merge(double other_n, double other_mean, double other_m2) {
    const double total = n + other_n, gap = other_mean - mean;
    mean += gap * (other_n / total);
    m2 += other_m2 + gap * gap * (n * other_n / total);
    n = total;
  }
};

std::vector<float> widen(const View& v) {
  std::vector<float> out(v.numel());
  for (size_t i = 0; i < out.size(); ++i) {
    if (v.dtype == DType::f32) out[i] = v.as<float>()[i];
    if (v.dtype == DType::f16) out[i] = to_float(v.as<f16>()[i]);
    if (v.dtype == DType::bf16) out[i] = to_float(v.as<bf16>()[i]);
  }
  return out;
}

void narrow(const std::vector<double>& from, const View& v) {
  for (size_t i = 0; i < from.size(); ++i) {
    const float x = static_cast<float>(from[i]);
    if (v.dtype == DType::f32) v.as<float>()[i] = x;
    if (v.dtype == DType::f16) v.as<f16>()[i] = from_float<f16>(x);
    if (v.dtype == DType::bf16) v.as<bf16>()[i] = from_float<bf16>(x);
  }
}

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

template <class T>
void moments_contiguous(const T* x, const Shape& s, int64_t unit, double eps, float* mean,
                        float* rstd) {
  Moments m;
  for (int64_t i = 0; i < s.count(); i += kBlock)
    add_block(x + unit * s.count() + i, std::min(kBlock, s.count() - i), m);
  mean[unit] = static_cast<float>(m.mean);
  rstd[unit] = static_cast<float>(1.0 / std::sqrt(m.m2 / m.n + eps));
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

// ---- channels last ------------------------------------------------------------------------------

// Positions per run and runs per sample.
struct Runs {
  int64_t size, count;
  explicit Runs(const Shape& s)
      : size(std::max<int64_t>(1, kRunValues / s.C)), count((s.S + size - 1) / size) {}
};

// f(sample, run, first value, positions) for every run
template <class F>
void each_run(int threads, const Shape& s, const Runs& runs, F&& f) {
  parallel_for(threads, s.B * runs.count, 1, [&](int64_t from, int64_t to) {
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t sample = unit / runs.count, run = unit % runs.count;
      f(sample, run, (sample * s.S + run * runs.size) * s.C,
        std::min(runs.size, s.S - run * runs.size));
    }
  });
}

// f(channel, width, vectors) for all channels, kUnroll vectors at a time where there are so many
constexpr int kUnroll = 4;
template <class F>
VQFAST_INLINE void channel_blocks(int64_t C, F&& f) {
  int64_t c = 0;
  for (; c + kUnroll * kLanes <= C; c += kUnroll * kLanes)
    f(c, kLanes, std::integral_constant<int, kUnroll>());
  for (; c + kLanes <= C; c += kLanes) f(c, kLanes, std::integral_constant<int, 1>());
  if (c < C) f(c, static_cast<int>(C - c), std::integral_constant<int, 1>());
}

// moments [G] of one run of `rows` positions; the sums of a few channels stay in registers
template <class T>
void run_moments(const T* x, int64_t rows, const Shape& s, Moments* moments) {
  channel_blocks(s.C, [&](int64_t c, int width, auto n) __attribute__((always_inline)) {
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

// One value per channel of what the groups of a sample share.
std::vector<float> spread(const float* of_group, const Shape& s) {
  std::vector<float> out(s.C);
  for (int64_t c = 0; c < s.C; ++c) out[c] = of_group[c / s.per()];
  return out;
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
      channel_blocks(s.C, [&](int64_t c, int width, auto n) __attribute__((always_inline)) {
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

// f(channel, width, vectors) as channel_blocks, with fewer vectors: each has five parameters
constexpr int kFew = 2;
template <class F>
VQFAST_INLINE void few_channels(int64_t C, F&& f) {
  int64_t c = 0;
  for (; c + kFew * kLanes <= C; c += kFew * kLanes)
    f(c, kLanes, std::integral_constant<int, kFew>());
  for (; c + kLanes <= C; c += kLanes) f(c, kLanes, std::integral_constant<int, 1>());
  if (c < C) f(c, static_cast<int>(C - c), std::integral_constant<int, 1>());
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
      few_channels(s.C, [&](int64_t c, int width, auto n) __attribute__((always_inline)) {
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
      few_channels(s.C, [&](int64_t c, int width, auto n) __attribute__((always_inline)) {
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
  if (a.t[0].dtype == DType::f32) forward<float>(a);
  if (a.t[0].dtype == DType::f16) forward<f16>(a);
  if (a.t[0].dtype == DType::bf16) (has_avx512_bf16() ? forward<bf16, true> : forward<bf16>)(a);
}

void run_apply(const Args& a) {
  if (a.t[0].dtype == DType::f32) apply<float>(a);
  if (a.t[0].dtype == DType::f16) apply<f16>(a);
  if (a.t[0].dtype == DType::bf16) (has_avx512_bf16() ? apply<bf16, true> : apply<bf16>)(a);
}

void run_backward(const Args& a) {
  if (a.t[0].dtype == DType::f32) backward<float>(a);
  if (a.t[0].dtype == DType::f16) backward<f16>(a);
  if (a.t[0].dtype == DType::bf16) backward<bf16>(a);
}

}  // namespace

KERNEL(group_norm_silu, "f32|f16|bf16~ f32|f16|bf16 f32|f16|bf16 -> f32|f16|bf16 f32 f32", run)
KERNEL(group_norm_silu_apply, "f32|f16|bf16~ f32|f16|bf16 f32|f16|bf16 f32 f32 -> f32|f16|bf16",
       run_apply)
KERNEL(group_norm_silu_backward,
       "f32|f16|bf16~ f32|f16|bf16~ f32|f16|bf16 f32|f16|bf16 f32 f32 -> f32|f16|bf16 f32|f16|bf16 "
       "f32|f16|bf16",
       run_backward)

}  // namespace vqfast::VQFAST_ISA
