// Computes: indices, distances: the nearest code of each row of z (nearest.cpp); z_q, loss,
//   partial: the replacement of x by codes[indices] (straight_through.cpp); counts [K]: the rows of
//   each code.
// Contract: those of the two kernels; z and x have the same number of rows, codebook and codes of
//   codes. They are the same tensors but for cosine.
// Numerics: theirs; counts are integers.
// Shape of the code: one kernel after the other, as the search of a block of rows takes hundreds of
//   times as long as reading it again.
// Ladder: first step.
#include <algorithm>

#include "kernel.h"
#define VQFAST_THIS_FILE "cpu/nearest_quantize.cpp"
#include "foreach_isa.h"

namespace vqfast::VQFAST_ISA {
namespace {

void run(const Args& a) {
  const View search[] = {a.t[0], a.t[1], a.t[4], a.t[5]};
  run_kernel("nearest", {search, 4, a.s, 1, a.threads});
  const View lookup[] = {a.t[2], a.t[3], a.t[4], a.t[6], a.t[7], a.t[8]};
  run_kernel("straight_through", {lookup, 6, a.s + 1, 1, a.threads});
  const int64_t* code = a.t[4].as<int64_t>();
  int64_t* counts = a.t[9].as<int64_t>();
  std::fill(counts, counts + a.t[9].shape[0], int64_t{0});
  for (int64_t n = 0; n < a.t[4].shape[0]; ++n) ++counts[code[n]];
}

}  // namespace

KERNEL(nearest_quantize,
       "f32|f16|bf16 f32|f16|bf16 f32|f16|bf16 f32|f16|bf16 -> i64 f32 f32|f16|bf16 f32 f64 i64",
       run)

}  // namespace vqfast::VQFAST_ISA
