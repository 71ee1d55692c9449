// Computes: out[b, h] = sum_t softmax_t(<q[b, h], k[b, h, t]> / sqrt(d)) v[b, h, t], t < length.
//   q [B, H, d] float32, float16 or bfloat16; k, v [B, H, S, d] of one such dtype -> out like q.
// Contract: slots from `length` on are never read. A head of a row is one thread's work, in one
//   order: no batch size or thread count changes a bit. length 0 gives zeros.
// Numerics: float32 accumulators, see attend.h; rounded once to the dtype of q.
// Shape of the code: one task per (b, h); k and v are streamed once, 64 slots at a time.
// Ladder: first version. Next: scores of 16 slots at a time from a transposed k, without the
//   horizontal sum of each dot product.
#include <cmath>
#include <vector>

#include "half.h"
#include "kernel.h"
#include "parallel.h"

#define VQFAST_THIS_FILE "cpu/decode_attention.cpp"
// clang-format off
#include "foreach_isa.h"
#include "simd.h"
#include "attend.h"
// clang-format on

namespace vqfast::VQFAST_ISA {
namespace {

template <class Q, class T>
void run_typed(const Args& a) {
  const int64_t B = a.t[1].shape[0], H = a.t[1].shape[1], S = a.t[1].shape[2], d = a.t[1].shape[3];
  const int64_t length = a.s[0].i;
  const Q* q = a.t[0].as<Q>();
  const T *k = a.t[1].as<T>(), *v = a.t[2].as<T>();
  Q* out = a.t[3].as<Q>();
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  parallel_for(a.threads, B * H, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(2 * d);
    float *scaled = row.data(), *sum = scaled + d;
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < d; ++c) scaled[c] = to_float(q[i * d + c]) * scale;
      attend(scaled, k + i * S * d, v + i * S * d, length, d, sum);
      for (int64_t c = 0; c < d; ++c) out[i * d + c] = from_float<Q>(sum[c]);
    }
  });
}

template <class Q>
void run_cache(const Args& a) {
  switch (a.t[1].dtype) {
    case DType::f32:
      return run_typed<Q, float>(a);
    case DType::f16:
      return run_typed<Q, f16>(a);
    default:
      return run_typed<Q, bf16>(a);
  }
}

void run(const Args& a) {
  switch (a.t[0].dtype) {
    case DType::f32:
      return run_cache<float>(a);
    case DType::f16:
      return run_cache<f16>(a);
    default:
      return run_cache<bf16>(a);
  }
}

}  // namespace

KERNEL(decode_attention, "f32|f16|bf16 f32|f16|bf16 f32|f16|bf16 -> f32|f16|bf16", run)

}  // namespace vqfast::VQFAST_ISA
