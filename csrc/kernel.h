// Self-registration of C++ kernels. A file in csrc/cpu registers itself; nobody edits a list.
//
//   KERNEL(nearest, "f32|f16|bf16 f32 -> i64 f32", run)  in namespace vqfast::VQFAST_ISA, see
//                                                        foreach_isa.h
//   REFUSES(nearest, why_not)                            optional, once: a reason that the
//                                                        signature cannot say, or null
//
// Signature: one token per tensor, inputs before "->", outputs after it. dtypes joined by "|";
// suffix "?" may be None, suffix "~" any strides; all other tensors are contiguous.
// vqfast/_native.py checks it before a kernel is called.
#pragma once

#include "view.h"

namespace vqfast {

struct Args {
  const View* t;  // inputs, then outputs
  int nt;
  const Scalar* s;
  int ns;
  int threads;  // >= 1
};

[[noreturn]] void no_such_input(int i, int size);  // throws std::out_of_range; bindings.cpp

// What a refusal may look at. There are no outputs yet: who reads past the inputs gets an
// exception, IndexError in Python.
struct Inputs {
  template <class T>
  struct Checked {
    const T* first;
    int size;

    const T& operator[](int i) const {
      if (i < 0 || i >= size) no_such_input(i, size);
      return first[i];
    }
  };
  Checked<View> t;
  Checked<Scalar> s;
};

// In the order of preference; `isa_names` in bindings.cpp and ISAS in vqfast/_native.py say the
// same.
enum Isa { kAvx512Vnni, kAvx512, kAvx2, kBase, kIsaCount };

using KernelFn = void (*)(const Args&);
using RefuseFn = const char* (*)(const Inputs&);

// Defined in bindings.cpp, which is compiled for the plain target: static initialisers must run on
// any CPU.
struct RegisterKernel {
  RegisterKernel(const char* name, const char* signature, Isa isa, KernelFn fn);
};
struct RegisterRefusal {
  RegisterRefusal(const char* name, RefuseFn fn);
};

// Runs another kernel, that of the instruction set in use: for a kernel that is made of others.
// Inputs and outputs are as its signature has them. Throws std::invalid_argument if there is none.
void run_kernel(const char* name, const Args& args);

// The CPU has vdpbf16ps (not implied by any Isa); false under a forced `avx2` or `base`.
bool has_avx512_bf16();

}  // namespace vqfast

#define KERNEL(name, signature, fn) \
  static const ::vqfast::RegisterKernel vqfast_register_##name(#name, signature, VQFAST_ISA_ID, fn);

#define REFUSES(name, fn) static const ::vqfast::RegisterRefusal vqfast_refuse_##name(#name, fn);
