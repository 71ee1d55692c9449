// What crosses from Python into a kernel: tensors as pointer, dtype, shape and strides; scalars as
// integer and double. Plain data, shared by the C++ and the CUDA library; vqfast/_native.py mirrors
// it.
#pragma once

#include <cstdint>

namespace vqfast {

enum class DType : int32_t { f32, f16, bf16, f64, i64, i32, i8, u8, boolean };

struct View {
  void* data;  // null: the tensor is None
  int32_t ndim;
  DType dtype;
  int64_t shape[8];
  int64_t stride[8];  // in elements

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
};

struct Scalar {
  int64_t i;  // integers (two's complement of up to 64 bits), booleans
  double f;   // every number
};

}  // namespace vqfast
