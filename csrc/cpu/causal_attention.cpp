// Attention of each position to itself and the ones before it, d <= 256: see tiled_forward.h.
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
  return a.t[0].shape[3] > 256 ? "head dimension above 256" : nullptr;
}
}  // namespace
REFUSES(causal_attention, why_not)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/causal_attention.cpp"
#include "foreach_isa.h"
#include "tiled_forward.h"

namespace vqfast::VQFAST_ISA {
namespace {

void run(const Args& a) { run_attention(a, true); }

}  // namespace

KERNEL(causal_attention, "f32|f16|bf16~ f32|f16|bf16~ f32|f16|bf16~ -> f32|f16|bf16 f32", run)

}  // namespace vqfast::VQFAST_ISA
