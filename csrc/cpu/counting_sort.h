// Rows in the order of their codes, and how that work is shared out. The same for all sets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace vqfast {

// Stable counting sort: order[start[k] .. start[k + 1]) are the rows of code k, ascending.
// order [N], start [K + 1]; std::out_of_range for a code outside 0..K-1. No memory of its own.
inline void counting_sort(const int64_t* code, int64_t N, int64_t K, int64_t* order,
                          int64_t* start) {
  std::fill(start, start + K + 1, int64_t{0});
  for (int64_t n = 0; n < N; ++n) {
    if (code[n] < 0 || code[n] >= K) {
      throw std::out_of_range("indices must be in 0.." + std::to_string(K - 1) + ", got " +
                              std::to_string(code[n]));
    }
    ++start[code[n] + 1];
  }
  for (int64_t k = 0; k < K; ++k) start[k + 1] += start[k];
  // start[k] runs from the first row of code k to that of code k + 1, and is then moved back
  for (int64_t n = 0; n < N; ++n) order[start[code[n]]++] = n;
  for (int64_t k = K; k > 0; --k) start[k] = start[k - 1];
  start[0] = 0;
}

// std::out_of_range unless order [M] and start [K + 1] may be followed without leaving order or N
// rows.
inline void check_order(const int64_t* order, int64_t M, const int64_t* start, int64_t K,
                        int64_t N) {
  bool good = start[0] >= 0 && start[K] <= M;
  for (int64_t k = 0; k < K; ++k) good &= start[k] <= start[k + 1];
  if (!good) throw std::out_of_range("start must ascend within 0.." + std::to_string(M));
  for (int64_t j = start[0]; j < start[K]; ++j) good &= order[j] >= 0 && order[j] < N;
  if (!good) throw std::out_of_range("order must hold rows in 0.." + std::to_string(N - 1));
}

// Calls f(first code, last code, first column, last column): every code once, also empty ones.
// By rows and codes; where one code has more rows than a thread's share, by columns (never for
// D < 64). A column of a code is always summed by one thread in one order, so that the choice
// changes no bit.
template <class F>
void for_codes(int threads, const int64_t* start, int64_t K, int64_t D, F&& f) {
  constexpr int64_t kGrain = 256, kColumns = 32;
  const int64_t work = start[K] - start[0] + K;
  int64_t longest = 0;
  for (int64_t k = 0; k < K; ++k) longest = std::max(longest, start[k + 1] - start[k]);
  if (longest * threads > work && D >= 2 * kColumns) {
    parallel_for(threads, D, kColumns, [&](int64_t a, int64_t b) { f(int64_t{0}, K, a, b); });
    return;
  }
  parallel_for(threads, work, kGrain, [&](int64_t begin, int64_t end) {
    // the codes whose first unit of work, start[k] - start[0] + k, lies in [begin, end)
    const auto first = [&](int64_t unit) {
      int64_t low = 0, high = K;
      while (low < high) {
        const int64_t k = (low + high) / 2;
        if (start[k] - start[0] + k < unit) {
          low = k + 1;
        } else {
          high = k;
        }
      }
      return low;
    };
    const int64_t from = first(begin), to = first(end);
    if (from < to) f(from, to, int64_t{0}, D);
  });
}

}  // namespace vqfast
