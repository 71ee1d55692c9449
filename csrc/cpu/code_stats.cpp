// Computes: counts[k] = number of n with indices[n] = k;  sums[k, :] = sum of those rows z[n, :].
// Contract: indices [N] in 0..K-1 (std::out_of_range otherwise), z [N, D], both contiguous. Codes
//   without rows give 0.
// Numerics: float64 accumulators, rows added in ascending n, one rounding to float32 at the end:
//   the result does not depend on threads or instruction set, and repeats bit for bit.
// Shape of the code: a counting sort of row ids, then one pass over the runs; a column of a code is
//   summed by one thread in a scratch of doubles and written once. Reads z once, N row ids twice.
//   Work is shared out by codes and rows, or by columns where one code has most rows.
// Ladder: 1. runs shared out by their first row, zeros written by one thread, half precision
//   widened value by value. 2. this.
#include <vector>

#include "counting_sort.h"
#include "half.h"
#include "kernel.h"
#define VQFAST_THIS_FILE "cpu/code_stats.cpp"
#include "foreach_isa.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {
namespace {

#include "row_doubles.h"

template <class T>
void sum_codes(const Args& a) {
  const int64_t N = a.t[1].shape[0], D = a.t[1].shape[1], K = a.s[0].i;
  const T* z = a.t[1].as<T>();
  int64_t* counts = a.t[2].as<int64_t>();
  float* sums = a.t[3].as<float>();
  std::vector<int64_t> order(N), start(K + 1);
  counting_sort(a.t[0].as<int64_t>(), N, K, order.data(), start.data());
  for (int64_t k = 0; k < K; ++k) counts[k] = start[k + 1] - start[k];
  for_codes(a.threads, start.data(), K, D,
            [&](int64_t first, int64_t last, int64_t left, int64_t right) {
              const int64_t n = right - left;
              std::vector<double> total(n);
              std::vector<float> room(n);
              for (int64_t k = first; k < last; ++k) {
                std::fill(total.begin(), total.end(), 0.0);
                for (int64_t j = start[k]; j < start[k + 1]; ++j) {
                  if (j + kAhead < start[last]) fetch_ahead(z + order[j + kAhead] * D + left, n);
                  add_row(as_floats(z + order[j] * D + left, n, room.data()), n, total.data());
                }
                for (int64_t i = 0; i < n; ++i)
                  sums[k * D + left + i] = static_cast<float>(total[i]);
              }
            });
}

void run(const Args& a) {
  if (a.t[1].dtype == DType::f32) sum_codes<float>(a);
  if (a.t[1].dtype == DType::f16) sum_codes<f16>(a);
  if (a.t[1].dtype == DType::bf16) sum_codes<bf16>(a);
}

}  // namespace

KERNEL(code_stats, "i64 f32|f16|bf16 -> i64 f32", run)

}  // namespace vqfast::VQFAST_ISA
