// Computes: counts[k] = number of n with indices[n] = k;  sums[k, :] = sum of those rows z[n, :].
// Contract: indices [N] in 0..K-1 (std::out_of_range otherwise), z [N, D], both contiguous. Codes
//   without rows give 0.
// Numerics: float64 accumulators, rows added in ascending n, one rounding to float32 at the end:
//   the result does not depend on threads or instruction set, and repeats bit for bit.
// Shape of the code: a counting sort of row ids (histogram, scan, scatter), then one pass over the
//   runs; each code is summed by one thread in a scratch of D doubles and written once. Reads z
//   once, N row ids twice. Runs are shared out by rows, not by codes, so a skewed histogram stays
//   balanced up to its largest code.
// Ladder: first step.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "half.h"
#include "kernel.h"
#include "parallel.h"
#define VQFAST_THIS_FILE "cpu/code_stats.cpp"
#include "foreach_isa.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {
namespace {

constexpr int64_t kGrain = 1024;  // rows

template <class T>
void sum_runs(const T* z, int64_t D, const int64_t* start, const int64_t* order, int64_t K,
              int64_t begin, int64_t end, float* sums) {
  std::vector<double> total(D);
  // the codes whose run starts in [begin, end)
  const int64_t first = std::lower_bound(start, start + K, begin) - start;
  for (int64_t k = first; k < K && start[k] < end; ++k) {
    if (start[k] == start[k + 1]) continue;
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t j = start[k]; j < start[k + 1]; ++j) {
      const T* x = z + order[j] * D;
      for (int64_t i = 0; i < D; ++i) total[i] += to_float(x[i]);
    }
    for (int64_t i = 0; i < D; ++i) sums[k * D + i] = static_cast<float>(total[i]);
  }
}

void run(const Args& args) {
  const View &indices = args.t[0], &z = args.t[1];
  const int64_t N = z.shape[0], D = z.shape[1], K = args.s[0].i;
  const int64_t* code = indices.as<int64_t>();
  int64_t* counts = args.t[2].as<int64_t>();
  float* sums = args.t[3].as<float>();
  std::fill(counts, counts + K, int64_t{0});
  std::fill(sums, sums + K * D, 0.0f);
  for (int64_t n = 0; n < N; ++n) {
    if (code[n] < 0 || code[n] >= K) {
      throw std::out_of_range("indices must be in 0.." + std::to_string(K - 1) + ", got " +
                              std::to_string(code[n]));
    }
    ++counts[code[n]];
  }
  std::vector<int64_t> start(K + 1, 0), next(K), order(N);
  for (int64_t k = 0; k < K; ++k) start[k + 1] = start[k] + counts[k];
  std::copy(start.begin(), start.end() - 1, next.begin());
  for (int64_t n = 0; n < N; ++n) order[next[code[n]]++] = n;
  parallel_for(args.threads, N, kGrain, [&](int64_t begin, int64_t end) {
    if (z.dtype == DType::f32)
      sum_runs(z.as<float>(), D, start.data(), order.data(), K, begin, end, sums);
    if (z.dtype == DType::f16)
      sum_runs(z.as<f16>(), D, start.data(), order.data(), K, begin, end, sums);
    if (z.dtype == DType::bf16)
      sum_runs(z.as<bf16>(), D, start.data(), order.data(), K, begin, end, sums);
  });
}

}  // namespace

KERNEL(code_stats, "i64 f32|f16|bf16 -> i64 f32", run)

}  // namespace vqfast::VQFAST_ISA
