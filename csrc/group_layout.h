// How the tensors of group_norm_silu, group_norm_silu_apply and their backward pass lie in memory.
#pragma once

#include "view.h"

namespace vqfast::group_norm {

// x as [B][C][S] or [B][S][C]
struct Shape {
  int64_t B, C, S, G;
  bool last;  // channels last
  int64_t per() const { return C / G; }
  int64_t count() const { return per() * S; }
};

// x is contiguous, or channels-last, whatever the strides of dimensions of one element are
inline bool lies_as(const View& x, bool last) {
  if (x.numel() == 0) return true;
  int64_t expected = 1;
  const auto dense = [&](int i) {
    const bool right = x.shape[i] == 1 || x.stride[i] == expected;
    expected *= x.shape[i];
    return right;
  };
  bool right = !last || dense(1);
  for (int i = x.ndim - 1; i >= 2; --i) right = dense(i) && right;
  if (!last) right = dense(1) && right;
  return dense(0) && right;
}

inline Shape shape_of(const View& x, int64_t groups) {
  int64_t positions = 1;
  for (int i = 2; i < x.ndim; ++i) positions *= x.shape[i];
  return {x.shape[0], x.shape[1], positions, groups, !lies_as(x, false)};
}

// why x cannot be read in place; null if it can
inline const char* layout_refusal(const View& x) {
  return lies_as(x, false) || lies_as(x, true) ? nullptr : "neither contiguous nor channels-last";
}

}  // namespace vqfast::group_norm
