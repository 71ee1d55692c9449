// The last word of the nearest-code search: float64, one formula and one order on every set.
//
// Included once per instruction set by nearest.cpp, inside namespace vqfast::VQFAST_ISA, so it has
// no include guard.
//
// score64 is the definition: the sequential float64 sum of squared differences (l2, cosine) or the
// negative sequential sum of products (dot), without fused multiply-add. A vector sum brackets it
// first (`bracket`), as the sequential chain costs D additions one after another; only codes whose
// bracket reaches the best one are scored by score64.

enum Metric { kL2, kCosine, kDot };

typedef double VD __attribute__((vector_size(VQFAST_LANES * 4)));
typedef float VH
    __attribute__((vector_size(VQFAST_LANES * 2)));  // as many floats as VD has doubles
constexpr int kHalfLanes = VQFAST_LANES / 2;

// float64 copy of a row; a cosine row is divided by its norm (norm 0: take it as it is)
VQFAST_INLINE void load64(const float* x, double norm, int64_t D, double* out) {
  if (norm == 0.0) {
    for (int64_t i = 0; i < D; ++i) out[i] = x[i];
  } else {
    for (int64_t i = 0; i < D; ++i) out[i] = x[i] / norm;
  }
}

// max(|x|, 1e-12) as torch.nn.functional.normalize takes it; sequential sum
inline double norm64(const float* x, int64_t D) {
  double s = 0.0;
  for (int64_t i = 0; i < D; ++i) s += static_cast<double>(x[i]) * x[i];
  s = std::sqrt(s);
  return s > 1e-12 ? s : 1e-12;
}

VQFAST_INLINE VD load_d(const double* p) {
  VD v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// plain vector sums and maxima, in an order that differs by instruction set: for bounds only
inline double sum_squares(const double* x, int64_t D) {
  VD s = {};
  int64_t i = 0;
  for (; i + kHalfLanes <= D; i += kHalfLanes) s += load_d(x + i) * load_d(x + i);
  double sum = 0.0;
  for (; i < D; ++i) sum += x[i] * x[i];
  for (int j = 0; j < kHalfLanes; ++j) sum += s[j];
  return sum;
}
inline double largest_magnitude(const double* x, int64_t D) {
  VD high = {}, low = {};
  int64_t i = 0;
  for (; i + kHalfLanes <= D; i += kHalfLanes) {
    const VD v = load_d(x + i);
    high = v > high ? v : high;
    low = v < low ? v : low;
  }
  double top = 0.0;
  for (; i < D; ++i) top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
  for (int j = 0; j < kHalfLanes; ++j) top = std::max(top, std::max(high[j], -low[j]));
  return top;
}

inline double score64(const double* z, const double* c, int64_t D, int metric) {
  double s = 0.0;
  if (metric == kDot) {
    for (int64_t i = 0; i < D; ++i) s += z[i] * c[i];
    return -s;
  }
  for (int64_t i = 0; i < D; ++i) {
    const double d = z[i] - c[i];
    s += d * d;
  }
  return s;
}

struct Bracket {
  double low, high;  // score64 lies between them
};

// Both this sum and score64 err by at most (D + 2) 2^-53 of the sum of the terms' magnitudes.
template <class T>
VQFAST_INLINE Bracket bracket(const double* z, const T* c, int64_t D, int metric) {
  VD sum[2] = {}, size[2] = {};
  double rest = 0.0, rest_size = 0.0;
  const auto term = [&](int j, VD a, VD b) {
    if (metric == kDot) {
      const VD p = a * b;
      sum[j] -= p;
      size[j] += p < 0.0 ? -p : p;
    } else {
      const VD d = a - b;
      sum[j] += d * d;
    }
  };
  const auto load_c = [&](int64_t i) {
    if constexpr (sizeof(T) == 4) {
      VH v;
      __builtin_memcpy(&v, c + i, sizeof v);
      return __builtin_convertvector(v, VD);
    } else {
      return load_d(c + i);
    }
  };
  int64_t i = 0;
  for (; i + 2 * kHalfLanes <= D; i += 2 * kHalfLanes) {
    term(0, load_d(z + i), load_c(i));
    term(1, load_d(z + i + kHalfLanes), load_c(i + kHalfLanes));
  }
  for (; i + kHalfLanes <= D; i += kHalfLanes) term(0, load_d(z + i), load_c(i));
  for (; i < D; ++i) {
    const double b = c[i];
    if (metric == kDot) {
      rest -= z[i] * b;
      rest_size += std::fabs(z[i] * b);
    } else {
      rest += (z[i] - b) * (z[i] - b);
    }
  }
  const VD s = sum[0] + sum[1], t = size[0] + size[1];
  for (int j = 0; j < kHalfLanes; ++j) {
    rest += s[j];
    rest_size += t[j];
  }
  const double slack = static_cast<double>(D + 8) * 0x1p-52 * (metric == kDot ? rest_size : rest);
  return {rest - slack, rest + slack};
}

// Collects candidate codes of one row, in ascending order, and names the winner.
struct Contest {
  static constexpr int kRoom = 32;
  const float* codes;
  const double* norms;  // of the codes, cosine only; else null
  const double* z;      // [D] the row, normalised for cosine
  double* scratch;      // [D]
  int64_t D;
  int metric;
  int count = 0;
  double least_high = std::numeric_limits<double>::infinity();
  int64_t code[kRoom];
  double low[kRoom];
  double exact[kRoom];  // score64 once known, else NaN

  Contest(const float* codes, const double* norms, const double* z, double* scratch, int64_t D,
          int metric)
      : codes(codes), norms(norms), z(z), scratch(scratch), D(D), metric(metric) {}

  double norm(int64_t k) const { return norms ? norms[k] : 0.0; }

  void enter(int64_t k) {
    Bracket b;
    if (norms) {
      load64(codes + k * D, norms[k], D, scratch);
      b = bracket(z, scratch, D, metric);
    } else {
      b = bracket(z, codes + k * D, D, metric);
    }
    if (b.low > least_high) return;
    if (b.high < least_high) least_high = b.high;
    if (count == kRoom) make_room();
    code[count] = k;
    low[count] = b.low;
    exact[count++] = std::numeric_limits<double>::quiet_NaN();
  }

  // the least score64, and of equal ones the first; -1 when no code entered
  int64_t winner(double* score) {
    if (count == 0) return -1;
    make_room();
    *score = exact[0];
    return code[0];
  }

  // scores every code that may still win and keeps the best one
  void make_room() {
    int best = -1;
    for (int j = 0; j < count; ++j) {
      if (low[j] > least_high) continue;
      if (exact[j] != exact[j]) {
        load64(codes + code[j] * D, norm(code[j]), D, scratch);
        exact[j] = score64(z, scratch, D, metric);
      }
      if (best < 0 || exact[j] < exact[best]) best = j;
    }
    code[0] = code[best];
    exact[0] = low[0] = exact[best];
    if (exact[0] < least_high) least_high = exact[0];
    count = 1;
  }
};
