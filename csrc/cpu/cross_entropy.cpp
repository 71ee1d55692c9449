// Computes: for logits x [N, V] and targets t [N]: top_n = max_v x_nv, log_sum_n = log sum_v
//   exp(x_nv - top_n) and loss_n = log_sum_n - (x_nt - top_n). Backward: dx_nv = grad_n (exp(x_nv -
//   top_n - log_sum_n) - [v = t]).
// Contract: a target outside 0..V-1 is never read through: loss NaN, and no one-hot term in the
//   gradient. A row with NaN, or whose maximum is infinite, gives NaN. grad may be expanded.
// Numerics: float32 over pieces of kPiece logits, float64 between pieces; top and log_sum stay
//   apart, so a common offset of the logits costs no digits.
// Shape of the code: one thread per row, maximum then exponentials (the second pass finds the row
//   in L2); backward one pass. Bits do not depend on the number of threads.
// Ladder: none measured yet.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernel.h"
#include "parallel.h"

#define VQFAST_THIS_FILE "cpu/cross_entropy.cpp"
#include "foreach_isa.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {
namespace {

constexpr int64_t kPiece = 4096;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <class T>
float row_max(const T* x, int64_t V) {
  VF most = broadcast(-kInf);
  int64_t v = 0;
  for (; v + kLanes <= V; v += kLanes) most = vmax(load(x + v), most);  // NaN shows in the sum
  most = vmax(load_n(x + v, static_cast<int>(V - v), -kInf), most);
  return reduce_max(most);
}

template <class T>
double row_sum(const T* x, int64_t V, float top) {
  double total = 0;
  for (int64_t begin = 0; begin < V; begin += kPiece) {
    const int64_t end = std::min(V, begin + kPiece);
    VF sum{};
    int64_t v = begin;
    for (; v + kLanes <= end; v += kLanes) sum += vexp(load(x + v) - top);
    sum += vexp(load_n(x + v, static_cast<int>(end - v), -kInf) - top);
    total += reduce_add(sum);
  }
  return total;
}

template <class T>
void forward(const Args& a) {
  const int64_t N = a.t[0].shape[0], V = a.t[0].shape[1];
  const int64_t* target = a.t[1].as<int64_t>();
  float *loss = a.t[2].as<float>(), *top = a.t[3].as<float>(), *log_sum = a.t[4].as<float>();
  parallel_for(a.threads, N, 1, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      const T* x = a.t[0].as<T>() + n * V;
      top[n] = row_max(x, V);
      const double log_total = std::log(row_sum(x, V, top[n]));
      log_sum[n] = static_cast<float>(log_total);
      const int64_t t = target[n];
      loss[n] =
          t < 0 || t >= V
              ? kNan
              : static_cast<float>(log_total - (static_cast<double>(to_float(x[t])) - top[n]));
    }
  });
}

template <class T>
void backward(const Args& a) {
  const View& grad = a.t[0];
  const int64_t N = a.t[1].shape[0], V = a.t[1].shape[1];
  const int64_t* target = a.t[2].as<int64_t>();
  const float *top = a.t[3].as<float>(), *log_sum = a.t[4].as<float>();
  parallel_for(a.threads, N, 1, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      const T* x = a.t[1].as<T>() + n * V;
      T* dx = a.t[5].as<T>() + n * V;
      const float g = grad.as<float>()[n * grad.stride[0]];
      const auto probability = [&](VF logit) { return vexp(logit - top[n] - log_sum[n]); };
      int64_t v = 0;
      for (; v + kLanes <= V; v += kLanes) store(dx + v, probability(load(x + v)) * g);
      const int rest = static_cast<int>(V - v);
      store_n(dx + v, probability(load_n(x + v, rest)) * g, rest);
      const int64_t t = target[n];
      if (t < 0 || t >= V) continue;
      dx[t] = from_float<T>((probability(broadcast(to_float(x[t])))[0] - 1.0f) * g);
    }
  });
}

void run(const Args& a) {
  if (a.t[0].dtype == DType::f32) forward<float>(a);
  if (a.t[0].dtype == DType::f16) forward<f16>(a);
  if (a.t[0].dtype == DType::bf16) forward<bf16>(a);
}

void run_backward(const Args& a) {
  if (a.t[1].dtype == DType::f32) backward<float>(a);
  if (a.t[1].dtype == DType::f16) backward<f16>(a);
  if (a.t[1].dtype == DType::bf16) backward<bf16>(a);
}

}  // namespace

KERNEL(cross_entropy, "f32|f16|bf16 i64 -> f32 f32 f32", run)
KERNEL(cross_entropy_backward, "f32~ f32|f16|bf16 i64 f32 f32 -> f32|f16|bf16", run_backward)

}  // namespace vqfast::VQFAST_ISA
