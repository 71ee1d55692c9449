// Computes: forward   z_q[n] = c = codebook[indices[n]], in the type of z;
//                     partial[b] = sum of (c_i - z_ni)² over the kRows rows of block b;
//                     loss = weight · (sum of partial) / (N·D), 0 for N = 0.
//           backward  grad_z = grad_z_q + step·(z - codes), step = 2·to_z·grad_loss / (N·D).
// Contract: z, grad_z_q, grad_z, z_q [N, D] of one type, codebook [K, D], codes [N, D], contiguous;
//   indices in 0..K-1 (std::out_of_range otherwise). grad_z_q may be None, which is zero. A row
//   that is not finite makes its partial sum and the loss not finite, and no other row's gradient.
// Numerics: the differences are taken and squared in float64 (exact up to one rounding each) and
//   added in an order that depends on D and N alone: 16 sums, of the columns i mod 16, over the
//   rows of a block, added pairwise; then block after block. Equal bits on every set and thread
//   count. The gradient is three float32 operations.
// Shape of the code: one pass; a row of z and its code are read, and z_q written, while in L1.
//   N·D values of z, of codes and of z_q move, and no N x D temporary.
// Ladder: 1. torch: index_select, subtraction, square, sum, conversion: 7 passes over N·D values
//   and two temporaries. 2. this.
#include <stdexcept>
#include <string>
#include <vector>

#include "half.h"
#include "kernel.h"
#include "parallel.h"
#define VQFAST_THIS_FILE "cpu/straight_through.cpp"
#ifndef VQFAST_ISA
namespace vqfast {
constexpr int64_t kRows = 64;  // of a partial sum; BLOCK in vqfast/ops/straight_through.py
}
#endif
#include "foreach_isa.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {
namespace {

#include "row_doubles.h"

constexpr int kSums = 16;
constexpr int kVectors = kSums / kHalfLanes;

// Adds the squares of one row to sums[i mod 16].
VQFAST_INLINE void add_squares(const float* z, const float* c, int64_t D, VD* sums) {
  int64_t i = 0;
  const auto square = [&](int64_t at) {
    const VD d = to_double(load_h(c + at)) - to_double(load_h(z + at));
    return d * d;
  };
  for (; i + kSums <= D; i += kSums)
    for (int v = 0; v < kVectors; ++v) sums[v] += square(i + v * kHalfLanes);
  // the rest; every index of sums is a constant, so that they stay in registers
  for (int v = 0; v < kVectors; ++v) {
    if (i + kHalfLanes <= D) {
      sums[v] += square(i);
      i += kHalfLanes;
    } else if (i < D) {
      double tail[kHalfLanes] = {};
      for (int j = 0; i < D; ++i, ++j) {
        const double d = static_cast<double>(c[i]) - static_cast<double>(z[i]);
        tail[j] = d * d;
      }
      sums[v] += load_d(tail);
    }
  }
}

// A block of rows of D <= kLanes: the sums stay in registers, the lanes beyond D add zero.
template <class T, class C>
void narrow_rows(const T* z, const C* codebook, const int64_t* code, int64_t rows, int64_t D,
                 T* z_q, VD* sums) {
  const int lanes = static_cast<int>(D);
  VD sum_low = {}, sum_high = {};
  for (int64_t n = 0; n < rows; ++n) {
    const VF c = load_n(codebook + code[n] * D, lanes), x = load_n(z + n * D, lanes);
    const VD low = to_double(low_half(c)) - to_double(low_half(x));
    store_n(z_q + n * D, c, lanes);
    sum_low += low * low;
    if (lanes <= kHalfLanes) continue;
    const VD high = to_double(high_half(c)) - to_double(high_half(x));
    sum_high += high * high;
  }
  sums[0] = sum_low;
  sums[1] = sum_high;
}

inline double pairwise(const VD* sums) {
  double x[kSums];
  for (int v = 0; v < kVectors; ++v) store_d(x + v * kHalfLanes, sums[v]);
  for (int width = kSums / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

template <class T, class C>
void forward(const Args& a) {
  const int64_t N = a.t[0].shape[0], D = a.t[0].shape[1], K = a.t[1].shape[0];
  const T* z = a.t[0].as<T>();
  const C* codebook = a.t[1].as<C>();
  const int64_t* code = a.t[2].as<int64_t>();
  T* z_q = a.t[3].as<T>();
  double* partial = a.t[5].as<double>();
  for (int64_t n = 0; n < N; ++n) {
    if (code[n] < 0 || code[n] >= K) {
      throw std::out_of_range("indices must be in 0.." + std::to_string(K - 1) + ", got " +
                              std::to_string(code[n]));
    }
  }
  parallel_for(a.threads, N, kRows, [&](int64_t begin, int64_t end) {
    // rows of half precision are widened here
    std::vector<float> room(sizeof(T) + sizeof(C) < 8 ? 2 * D : 0);
    for (int64_t first = begin; first < end; first += kRows) {
      VD sums[kVectors] = {};
      const int64_t last = std::min(end, first + kRows);
      if (D <= kLanes)
        narrow_rows(z + first * D, codebook, code + first, last - first, D, z_q + first * D, sums);
      for (int64_t n = first; n < last && D > kLanes; ++n) {
        if (n + kAhead < end) fetch_ahead(codebook + code[n + kAhead] * D, D);
        const float* c = as_floats(codebook + code[n] * D, D, room.data());
        add_squares(as_floats(z + n * D, D, room.data() + D), c, D, sums);
        from_floats(c, D, z_q + n * D);
      }
      partial[first / kRows] = pairwise(sums);
    }
  });
  double total = 0.0;
  for (int64_t b = 0; b < (N + kRows - 1) / kRows; ++b) total += partial[b];
  const double count = N > 0 ? static_cast<double>(N) * D : 1.0;
  *a.t[4].as<float>() = static_cast<float>(a.s[0].f * (total / count));
}

template <class T, class C>
void backward(const Args& a) {
  const T* upstream = a.t[0].as<T>();
  const T* z = a.t[2].as<T>();
  const C* codes = a.t[3].as<C>();
  T* out = a.t[4].as<T>();
  const int64_t total = a.t[2].numel();
  const double scale = 2.0 * a.s[0].f / static_cast<double>(total > 0 ? total : 1);
  const VF step = broadcast(static_cast<float>(*a.t[1].as<float>() * scale));
  parallel_for(a.threads, total, 1 << 14, [&](int64_t begin, int64_t end) {
    const auto at = [&](int64_t i, int n) {
      const VF d = load_n(z + i, n) - load_n(codes + i, n);
      store_n(out + i, (upstream ? load_n(upstream + i, n) : VF{}) + d * step, n);
    };
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) at(i, kLanes);
    at(i, static_cast<int>(end - i));
  });
}

// calls f<T, C> for the types of two tensors
#define VQFAST_FOR_TYPES(f, args, first, second)                    \
  switch ((first).dtype) {                                          \
    case DType::f32:                                                \
      return (second).dtype == DType::f32   ? f<float, float>(args) \
             : (second).dtype == DType::f16 ? f<float, f16>(args)   \
                                            : f<float, bf16>(args); \
    case DType::f16:                                                \
      return (second).dtype == DType::f32   ? f<f16, float>(args)   \
             : (second).dtype == DType::f16 ? f<f16, f16>(args)     \
                                            : f<f16, bf16>(args);   \
    default:                                                        \
      return (second).dtype == DType::f32   ? f<bf16, float>(args)  \
             : (second).dtype == DType::f16 ? f<bf16, f16>(args)    \
                                            : f<bf16, bf16>(args);  \
  }

void run(const Args& a) { VQFAST_FOR_TYPES(forward, a, a.t[0], a.t[1]) }
void run_backward(const Args& a) { VQFAST_FOR_TYPES(backward, a, a.t[2], a.t[3]) }

}  // namespace

KERNEL(straight_through, "f32|f16|bf16 f32|f16|bf16 i64 -> f32|f16|bf16 f32 f64", run)
KERNEL(straight_through_backward, "f32|f16|bf16? f32 f32|f16|bf16 f32|f16|bf16 -> f32|f16|bf16",
       run_backward)

}  // namespace vqfast::VQFAST_ISA
