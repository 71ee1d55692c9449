// parallel_for over row blocks: a partition that depends on (threads, n, grain) alone, safe after
// fork.
//
// GNU OpenMP does not survive fork, so a forked child (a DataLoader worker) runs serially. Results
// must not depend on the partition: every kernel writes each output row from one thread, in one
// order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace vqfast {

bool in_forked_child();  // bindings.cpp

// Calls f(begin, end) with disjoint ranges that cover [0, n); each range but the last is a multiple
// of grain. The first exception thrown inside is thrown again here, outside the parallel region.
template <class F>
void parallel_for(int threads, int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
  const int64_t blocks = (n + grain - 1) / grain;
  const int team = in_forked_child() ? 1 : static_cast<int>(std::min<int64_t>(threads, blocks));
#ifdef _OPENMP
  if (team > 1) {
    std::exception_ptr error = nullptr;
#pragma omp parallel num_threads(team)
    {
      const int64_t id = omp_get_thread_num(), count = omp_get_num_threads();
      const int64_t begin = blocks * id / count * grain;
      const int64_t end = std::min(n, blocks * (id + 1) / count * grain);
      try {
        if (begin < end) f(begin, end);
      } catch (...) {
#pragma omp critical
        error = std::current_exception();
      }
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  (void)team;
  f(int64_t{0}, n);
}

}  // namespace vqfast
