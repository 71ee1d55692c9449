// Computes: order [N], start [K + 1]: the rows n of code k, ascending, are order[start[k] ..
//   start[k + 1]).
// Contract: indices [N] in 0..K-1 (std::out_of_range otherwise).
// Numerics: integers.
// Shape of the code: histogram, scan, scatter, by one thread; the histogram is kept in `start`
//   itself, so no memory is allocated. Reads N indices twice; K + N writes.
// Ladder: first step.
#include "counting_sort.h"
#include "kernel.h"
#define VQFAST_THIS_FILE "cpu/code_order.cpp"
#include "foreach_isa.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {
namespace {

void run(const Args& a) {
  counting_sort(a.t[0].as<int64_t>(), a.t[0].shape[0], a.s[0].i, a.t[1].as<int64_t>(),
                a.t[2].as<int64_t>());
}

}  // namespace

KERNEL(code_order, "i64 -> i64 i64", run)

}  // namespace vqfast::VQFAST_ISA
