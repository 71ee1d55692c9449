// Computes: both gradients of `quantize`, with c_k = codebook[k] and the rows n of each code k:
//   grad_z[n] = grad_z_q[n] + 2·to_z·grad_loss / (N·D) · (z[n] - c_k)
//   grad_codes[k] = 2·to_codes·grad_loss / (N·D) · sum over n of (c_k - z[n])
// Contract: grad_z_q (None is zero), z, grad_z [N, D] of one type; codebook, grad_codes [K, D] of
//   one type; contiguous. order [N] is a permutation, sorted by code, and start [K + 1] says where
//   each code begins (std::out_of_range where following them would leave the arrays). A code
//   without rows gets zero. A row that is not finite shows in its own gradient and in its code's.
// Numerics: the sum is one of differences, not a difference of sums: each is taken in float64 and
//   added in ascending n; one rounding at the end. grad_z is three float32 operations. The bits
//   depend neither on threads nor on the instruction set.
// Shape of the code: code after code, so that c_k and its sum stay in L1 while its rows pass: z and
//   grad_z_q are read once, grad_z and grad_codes written once, and no N x D temporary. Work is
//   shared out by codes and rows, or by columns where one code has most rows.
// Ladder: 1. code_stats of saved differences, then five passes of torch. 2. this.
#include <vector>

#include "counting_sort.h"
#include "half.h"
#include "kernel.h"
#define VQFAST_THIS_FILE "cpu/quantize.cpp"
#include "foreach_isa.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {
namespace {

#include "row_doubles.h"

// total += c - z
VQFAST_INLINE void add_difference(const float* c, const float* z, int64_t n, double* total) {
  int64_t i = 0;
  for (; i + kHalfLanes <= n; i += kHalfLanes) {
    const VD d = to_double(load_h(c + i)) - to_double(load_h(z + i));
    store_d(total + i, load_d(total + i) + d);
  }
  for (; i < n; ++i) total[i] += static_cast<double>(c[i]) - static_cast<double>(z[i]);
}

// out = upstream + step (z - c)
template <class T>
VQFAST_INLINE void pass_through(const T* upstream, const float* z, const float* c, VF step,
                                int64_t n, T* out) {
  const auto at = [&](int64_t i, int lanes) {
    const VF d = load_n(z + i, lanes) - load_n(c + i, lanes);
    store_n(out + i, (upstream ? load_n(upstream + i, lanes) : VF{}) + d * step, lanes);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) at(i, kLanes);
  at(i, static_cast<int>(n - i));
}

// The rows of one code, columns left .. left + n: writes their gradients and adds up c - z.
template <class T>
struct Rows {
  const T *upstream, *z;  // upstream may be null
  T* grad_z;
  const int64_t* order;
  int64_t D, left, n;
  VF step;

  // total [n] += the differences of order[begin .. end); `stop` is where this thread's rows end
  void wide(const float* c, int64_t begin, int64_t end, int64_t stop, float* room,
            double* total) const {
    for (int64_t j = begin; j < end; ++j) {
      if (j + kAhead < stop) {
        const int64_t next = order[j + kAhead] * D + left;
        fetch_ahead(z + next, n);
        if (upstream) fetch_ahead(upstream + next, n);
        fetch_ahead<true>(grad_z + next, n);
      }
      const int64_t at = order[j] * D + left;
      const float* row = as_floats(z + at, n, room);
      add_difference(c, row, n, total);
      pass_through(upstream ? upstream + at : nullptr, row, c, step, n, grad_z + at);
    }
  }

  // the same for n <= kLanes: the sums stay in registers
  void narrow(const float* c, int64_t begin, int64_t end, double* total) const {
    const int lanes = static_cast<int>(n);
    const VF code = load_n(c, lanes);
    const VD code_low = to_double(low_half(code)), code_high = to_double(high_half(code));
    VD sum_low = load_d(total), sum_high = load_d(total + kHalfLanes);
    for (int64_t j = begin; j < end; ++j) {
      const int64_t at = order[j] * D + left;
      const VF row = load_n(z + at, lanes);
      const VF from_above = upstream ? load_n(upstream + at, lanes) : VF{};
      store_n(grad_z + at, from_above + (row - code) * step, lanes);
      sum_low += code_low - to_double(low_half(row));
      if (lanes > kHalfLanes) sum_high += code_high - to_double(high_half(row));
    }
    store_d(total, sum_low);
    store_d(total + kHalfLanes, sum_high);
  }
};

template <class C>
VQFAST_INLINE void scale_into(const double* total, double step, int64_t n, float* room, C* out) {
  int64_t i = 0;
  for (; i + kHalfLanes <= n; i += kHalfLanes)
    store_h(room + i, to_single(load_d(total + i) * step));
  for (; i < n; ++i) room[i] = static_cast<float>(total[i] * step);
  from_floats(room, n, out);
}

template <class T, class C>
void backward(const Args& a) {
  const int64_t N = a.t[2].shape[0], D = a.t[2].shape[1], K = a.t[3].shape[0];
  const T *upstream = a.t[0].as<T>(), *z = a.t[2].as<T>();
  const C* codebook = a.t[3].as<C>();
  const int64_t *order = a.t[4].as<int64_t>(), *start = a.t[5].as<int64_t>();
  T* grad_z = a.t[6].as<T>();
  C* grad_codes = a.t[7].as<C>();
  check_order(order, a.t[4].shape[0], start, K, N);
  const double mean = 2.0 * *a.t[1].as<float>() / (N > 0 ? static_cast<double>(N) * D : 1.0);
  const VF step = broadcast(static_cast<float>(mean * a.s[0].f));
  const double step_codes = mean * a.s[1].f;
  for_codes(a.threads, start, K, D, [&](int64_t first, int64_t last, int64_t left, int64_t right) {
    const int64_t n = right - left;
    const Rows<T> rows{upstream, z, grad_z, order, D, left, n, step};
    std::vector<double> total(std::max<int64_t>(n, kLanes));
    std::vector<float> room(3 * n);
    for (int64_t k = first; k < last; ++k) {
      C* out = grad_codes + k * D + left;
      if (start[k] == start[k + 1]) {
        std::fill(out, out + n, C{});
        continue;
      }
      const float* c = as_floats(codebook + k * D + left, n, room.data());
      // minus zero is what leaves every first term as it is
      std::fill(total.begin(), total.end(), -0.0);
      if (n <= kLanes) {
        rows.narrow(c, start[k], start[k + 1], total.data());
      } else {
        rows.wide(c, start[k], start[k + 1], start[last], room.data() + n, total.data());
      }
      scale_into(total.data(), step_codes, n, room.data() + 2 * n, out);
    }
  });
}

template <class T>
void run_codes(const Args& a) {
  if (a.t[3].dtype == DType::f32) backward<T, float>(a);
  if (a.t[3].dtype == DType::f16) backward<T, f16>(a);
  if (a.t[3].dtype == DType::bf16) backward<T, bf16>(a);
}

void run(const Args& a) {
  if (a.t[2].dtype == DType::f32) run_codes<float>(a);
  if (a.t[2].dtype == DType::f16) run_codes<f16>(a);
  if (a.t[2].dtype == DType::bf16) run_codes<bf16>(a);
}

}  // namespace

KERNEL(quantize_backward,
       "f32|f16|bf16? f32 f32|f16|bf16 f32|f16|bf16 i64 i64 -> f32|f16|bf16 f32|f16|bf16", run)

}  // namespace vqfast::VQFAST_ISA
