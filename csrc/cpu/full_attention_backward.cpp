// Backward pass of full_attention, d <= 512: see tiled_backward.h.
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
  return a.t[1].shape[3] > 512 ? "head dimension above 512" : nullptr;
}
}  // namespace
REFUSES(full_attention_backward, why_not)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/full_attention_backward.cpp"
#include "foreach_isa.h"
#include "tiled_backward.h"

namespace vqfast::VQFAST_ISA {
namespace {

void run(const Args& a) { run_backward(a, false); }

}  // namespace

KERNEL(full_attention_backward,
       "f32|f16|bf16~ f32|f16|bf16~ f32|f16|bf16~ f32|f16|bf16~ f32|f16|bf16~ f32 -> "
       "f32|f16|bf16 f32|f16|bf16 f32|f16|bf16",
       run)

}  // namespace vqfast::VQFAST_ISA
