// Compiles the file that includes this header once per instruction set, each copy in its own
// namespace.
//
//   #include <cmath>                          // 1. system headers and kernel.h, before any target
//   #include "kernel.h"                       //    pragma
//   #include "parallel.h"
//   #define VQFAST_THIS_FILE "cpu/my_op.cpp"  // 2. this very file, relative to csrc
//   #include "foreach_isa.h"                  // 3. re-includes it for avx512_vnni, avx512 and avx2
//   #include "simd.h"                         // 4. vectors of VQFAST_LANES floats
//   namespace vqfast::VQFAST_ISA {            // 5. the code; the last copy is `base`, plain C++
//   void run(const Args& a) { ... }           //    for the target
//   KERNEL(my_op, "f32 -> f32", run)
//   }
//
// Put what must exist once (constants, plain structs, REFUSES) between 2 and 3 inside `#ifndef
// VQFAST_ISA`. Not per-file -m flags: two copies of one inline function would break the
// one-definition rule. Not target_clones: a clone cannot be forced, so it cannot be tested.
#ifndef VQFAST_FOREACH_ISA_ACTIVE
#define VQFAST_FOREACH_ISA_ACTIVE

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define VQFAST_X86 1

#define VQFAST_ISA avx512_vnni
#define VQFAST_ISA_ID ::vqfast::kAvx512Vnni
#define VQFAST_LANES 16
#define VQFAST_VNNI 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx512vnni,avx2,fma,f16c,bmi2")
#include VQFAST_THIS_FILE
#pragma GCC pop_options
#undef VQFAST_ISA
#undef VQFAST_ISA_ID
#undef VQFAST_VNNI

#define VQFAST_ISA avx512
#define VQFAST_ISA_ID ::vqfast::kAvx512
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,f16c,bmi2")
#include VQFAST_THIS_FILE
#pragma GCC pop_options
#undef VQFAST_ISA
#undef VQFAST_ISA_ID
#undef VQFAST_LANES

#define VQFAST_ISA avx2
#define VQFAST_ISA_ID ::vqfast::kAvx2
#define VQFAST_LANES 8
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#include VQFAST_THIS_FILE
#pragma GCC pop_options
#undef VQFAST_ISA
#undef VQFAST_ISA_ID
#undef VQFAST_LANES
#endif

// the rest of the including file is the last copy
#define VQFAST_ISA base
#define VQFAST_ISA_ID ::vqfast::kBase
#define VQFAST_LANES 4
#endif
