// A team of threads that go through the phases of one kernel together: one parallel region for a
// step of many short phases, instead of one per phase.
//
//   run_team(threads, [&](Team& team) {
//     team.share(n, grain, [&](int64_t begin, int64_t end) { ... });   // ends with a barrier
//   });
//
// The barrier spins, as phases last microseconds; where cores are shared it yields. Results must
// not depend on the partition, as in parallel.h; f must not throw.
#pragma once

#include <sched.h>

#include <atomic>

#include "parallel.h"

namespace vqfast {

class Barrier {
 public:
  void set_count(int count) { count_ = count; }  // before the first wait

  void wait() {
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins)
        pause();
      else
        sched_yield();
    }
  }

 private:
  static constexpr int kSpins = 4000;  // some 50 us

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  int count_ = 1;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

class Team {
 public:
  Team(int id, int count, Barrier& barrier) : id_(id), count_(count), barrier_(barrier) {}

  // f(begin, end) on this thread's part of [0, n), a multiple of grain but for the last; then waits
  // for the others
  template <class F>
  void share(int64_t n, int64_t grain, F&& f) {
    const Range mine = part(n, grain);
    if (mine.begin < mine.end) f(mine.begin, mine.end);
    if (count_ > 1) barrier_.wait();
  }

  struct Range {
    int64_t begin, end;
  };

  Range part(int64_t n, int64_t grain) const {
    const int64_t blocks = (n + grain - 1) / grain;
    return {blocks * id_ / count_ * grain, std::min(n, blocks * (id_ + 1) / count_ * grain)};
  }

 private:
  const int id_, count_;
  Barrier& barrier_;
};

// Calls f(team) on each of at most `threads` threads; one in a forked child, see parallel.h.
template <class F>
void run_team(int threads, F&& f) {
  Barrier barrier;
#ifdef _OPENMP
  if (threads > 1 && !in_forked_child()) {
#pragma omp parallel num_threads(threads)
    {
      // the region may get fewer threads than it asked for
#pragma omp single
      barrier.set_count(omp_get_num_threads());  // ends with a barrier of OpenMP
      Team team(omp_get_thread_num(), omp_get_num_threads(), barrier);
      f(team);
    }
    return;
  }
#endif
  Team team(0, 1, barrier);
  f(team);
}

}  // namespace vqfast
