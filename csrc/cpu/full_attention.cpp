// Attention of each position to all, d <= 512: see tiled_forward.h.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernel.h"
#include "parallel.h"

#ifndef VQFAST_ISA
namespace vqfast {
namespace {
const char* why_not(const Inputs& a) {
  return a.t[0].shape[3] > 512 ? "head dimension above 512" : nullptr;
}
}  // namespace
REFUSES(full_attention, why_not)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/full_attention.cpp"
#include "foreach_isa.h"
#include "tiled_forward.h"

namespace vqfast::VQFAST_ISA {
namespace {

void run(const Args& a) { run_attention(a, false); }

}  // namespace

KERNEL(full_attention, "f32|f16|bf16~ f32|f16|bf16~ f32|f16|bf16~ -> f32|f16|bf16 f32", run)

}  // namespace vqfast::VQFAST_ISA
