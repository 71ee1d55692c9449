// Computes: y = exp(x) by vexp, and y = x through each storage type, so that tests can hold simd.h and half.h against
//   float64 and torch on every instruction set. No op uses it.
// Contract: x [n] float32; out [n] float32 for simd_exp; float16 or bfloat16 and back for simd_round.
#include "kernel.h"
#include "parallel.h"

#define VQFAST_THIS_FILE "cpu/simd_probe.cpp"
#include "foreach_isa.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {
namespace {

void run_exp(const Args& a) {
  const float* x = a.t[0].as<float>();
  float* y = a.t[1].as<float>();
  parallel_for(a.threads, a.t[0].numel(), 1024, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(y + i, vexp(load(x + i)));
    const int rest = static_cast<int>(end - i);
    store_n(y + i, vexp(load_n(x + i, rest)), rest);
  });
}

template <class T>
void round_through(const float* x, T* stored, float* back, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(stored + i, load(x + i));
    store(back + i, load(stored + i));
  }
  const int rest = static_cast<int>(n - i);
  store_n(stored + i, load_n(x + i, rest), rest);
  store_n(back + i, load_n(stored + i, rest), rest);
}

void run_round(const Args& a) {
  const View &x = a.t[0], &stored = a.t[1], &back = a.t[2];
  if (stored.dtype == DType::f16)
    round_through(x.as<float>(), stored.as<f16>(), back.as<float>(), x.numel());
  else
    round_through(x.as<float>(), stored.as<bf16>(), back.as<float>(), x.numel());
}

}  // namespace

KERNEL(simd_exp, "f32 -> f32", run_exp)
KERNEL(simd_round, "f32 f16|bf16 -> f32", run_round)

}  // namespace vqfast::VQFAST_ISA
