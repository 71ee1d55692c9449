// Computes: packed[k] = (sum of the finite rows z[n] of code k, their number), [K, D + 1].
// Contract: z [N, D] contiguous; order holds rows sorted by code and start [K + 1] says where each
//   code begins (std::out_of_range where following them would leave the arrays). A row that holds a
//   NaN or an infinity is left out. Codes without rows give 0.
// Numerics: float64 accumulators, rows added in ascending n, one rounding to float32: the result
//   does not depend on threads or instruction set. The number is exact up to 2^24.
// Shape of the code: a code's rows are added without a look at them; only if a sum comes out not
//   finite are they looked at and added again, as finite floats cannot overflow a double. Reads z
//   once, writes packed once, which is the buffer that ranks reduce: no N x D copy, no
//   concatenation.
// Ladder: 1. torch: isfinite, all, boolean gather, code_stats, cat. 2. this.
#include <cmath>
#include <vector>

#include "counting_sort.h"
#include "half.h"
#include "kernel.h"
#define VQFAST_THIS_FILE "cpu/ema_stats.cpp"
#include "foreach_isa.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {
namespace {

#include "row_doubles.h"

VQFAST_INLINE VD wide(const float* x) { return to_double(load_h(x)); }
VQFAST_INLINE VD wide(const double* x) { return load_d(x); }

template <class X>
inline bool all_finite(const X* x, int64_t n) {
  VD zeros = {};  // stay 0 unless a value is not finite
  int64_t i = 0;
  for (; i + kHalfLanes <= n; i += kHalfLanes) zeros += wide(x + i) * 0.0;
  double zero = 0.0;
  for (; i < n; ++i) zero += x[i] * 0.0;
  for (int lane = 0; lane < kHalfLanes; ++lane) zero += zeros[lane];
  return zero == 0.0;
}

// total = the sum of the rows order[begin .. end); those that are not finite are left out if
// `choose`. Returns how many were added. `stop` is where this thread's rows end.
template <class T>
int64_t add_rows(const T* z, const int64_t* order, int64_t begin, int64_t end, int64_t stop,
                 int64_t D, bool choose, float* room, double* total) {
  std::fill(total, total + D, 0.0);
  int64_t count = 0;
  for (int64_t j = begin; j < end; ++j) {
    if (j + kAhead < stop) fetch_ahead(z + order[j + kAhead] * D, D);
    const float* row = as_floats(z + order[j] * D, D, room);
    if (choose && !all_finite(row, D)) continue;
    add_row(row, D, total);
    ++count;
  }
  return count;
}

template <class T>
void sum_rows(const Args& a) {
  const T* z = a.t[0].as<T>();
  const int64_t *order = a.t[1].as<int64_t>(), *start = a.t[2].as<int64_t>();
  const int64_t D = a.t[0].shape[1], K = a.t[2].shape[0] - 1;
  float* packed = a.t[3].as<float>();
  check_order(order, a.t[1].shape[0], start, K, a.t[0].shape[0]);
  // a row is in or out as a whole, so never by columns: D is given as 1
  for_codes(a.threads, start, K, 1, [&](int64_t first, int64_t last, int64_t, int64_t) {
    std::vector<double> total(D);
    std::vector<float> room(D);
    for (int64_t k = first; k < last; ++k) {
      const auto add = [&](bool choose) {
        return add_rows(z, order, start[k], start[k + 1], start[last], D, choose, room.data(),
                        total.data());
      };
      int64_t count = add(false);
      if (!all_finite(total.data(), D)) count = add(true);
      float* out = packed + k * (D + 1);
      for (int64_t i = 0; i < D; ++i) out[i] = static_cast<float>(total[i]);
      out[D] = static_cast<float>(count);
    }
  });
}

void run(const Args& a) {
  if (a.t[0].dtype == DType::f32) sum_rows<float>(a);
  if (a.t[0].dtype == DType::f16) sum_rows<f16>(a);
  if (a.t[0].dtype == DType::bf16) sum_rows<bf16>(a);
}

}  // namespace

KERNEL(ema_stats, "f32|f16|bf16 i64 i64 -> f32", run)

}  // namespace vqfast::VQFAST_ISA
