// Computes: with w = 1 - decay and packed[k] = (sum_k, count_k), [K, D + 1]:
//   cluster_size_k += w (count_k - cluster_size_k)     embed_avg_k += w (sum_k - embed_avg_k)
//   total = sum of cluster_size    smooth_k = (cluster_size_k + eps) / (total + K eps) · total
//   weight_k = embed_avg_k / smooth_k
//   totals = (total, sum of counts). Where all counts are zero only totals is written.
// Contract: all contiguous float32; cluster_size [K], embed_avg and weight [K, D] change in place.
// Numerics: the averages are moved in float32, as torch's lerp does; total and smooth are float64,
//   total in one order. Equal bits on every set and thread count.
// Shape of the code: the counts first, as `total` needs them all (K values); then one pass over
//   K·D: reads packed and embed_avg, writes embed_avg and weight.
// Ladder: 1. torch: two conversions, two lerp, a division into a temporary, a copy: 11·K·D values
//   move. 2. this: 4·K·D.
#include "half.h"
#include "kernel.h"
#include "parallel.h"
#define VQFAST_THIS_FILE "cpu/ema_update.cpp"
#include "foreach_isa.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {
namespace {

// from a to b by the part w; the form that is exact at the nearer end
template <class V>
VQFAST_INLINE V move_by(V a, V b, float w) {
  return w < 0.5f ? a + (b - a) * w : b - (b - a) * (1.0f - w);
}

inline double sum_in_order(const float* x, int64_t stride, int64_t n) {
  double part[8] = {};  // eight chains, as one addition waits for the other
  for (int64_t i = 0; i < n; ++i) part[i % 8] += x[i * stride];
  for (int width = 4; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

void run(const Args& a) {
  const int64_t K = a.t[1].shape[0], D = a.t[1].shape[1];
  float *size = a.t[0].as<float>(), *average = a.t[1].as<float>(), *weight = a.t[2].as<float>();
  const float* packed = a.t[3].as<float>();
  const float w = static_cast<float>(1.0 - a.s[0].f);
  const double eps = a.s[1].f;
  const double seen = sum_in_order(packed + D, D + 1, K);
  if (seen != 0.0)
    for (int64_t k = 0; k < K; ++k) size[k] = move_by(size[k], packed[k * (D + 1) + D], w);
  const double total = sum_in_order(size, 1, K);
  a.t[4].as<float>()[0] = static_cast<float>(total);
  a.t[4].as<float>()[1] = static_cast<float>(seen);
  if (seen == 0.0) return;
  const double share = total / (total + static_cast<double>(K) * eps);
  parallel_for(a.threads, K, 32, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const float* sum = packed + k * (D + 1);
      float *mean = average + k * D, *code = weight + k * D;
      const VF smooth = broadcast(static_cast<float>((size[k] + eps) * share));
      const auto at = [&](int64_t i, int n) {
        const VF moved = move_by(load_n(mean + i, n), load_n(sum + i, n), w);
        store_n(mean + i, moved, n);
        store_n(code + i, moved / smooth, n);
      };
      int64_t i = 0;
      for (; i + kLanes <= D; i += kLanes) at(i, kLanes);
      at(i, static_cast<int>(D - i));
    }
  });
}

}  // namespace

KERNEL(ema_update, "f32 f32 f32 f32 -> f32", run)

}  // namespace vqfast::VQFAST_ISA
