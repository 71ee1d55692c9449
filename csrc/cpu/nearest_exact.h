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
// max(|x|, 1e-12), up to the rounding of a sum in any order
inline double length64(const float* x, int64_t D) {
  VD s = {};
  int64_t i = 0;
  for (; i + kHalfLanes <= D; i += kHalfLanes) {
    VH v;
    __builtin_memcpy(&v, x + i, sizeof v);
    const VD d = __builtin_convertvector(v, VD);
    s += d * d;
  }
  double sum = 0.0;
  for (; i < D; ++i) sum += static_cast<double>(x[i]) * x[i];
  for (int j = 0; j < kHalfLanes; ++j) sum += s[j];
  return std::max(std::sqrt(sum), 1e-12);
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

// Collects candidate codes of one row and names the winner.
class Contest {
 public:
  // z [D]: the row, normalised for cosine; scratch [D]
  Contest(const float* codes, const double* z, double* scratch, int64_t D, int metric)
      : codes_(codes), z_(z), scratch_(scratch), D_(D), metric_(metric) {}

  void enter(int64_t k) {
    Bracket b;
    if (metric_ == kCosine) {
      load(k);
      b = bracket(z_, scratch_, D_, metric_);
    } else {
      b = bracket(z_, codes_ + k * D_, D_, metric_);
    }
    if (b.low > least_high_) return;
    if (b.high < least_high_) least_high_ = b.high;
    if (count_ == kRoom) make_room();
    code_[count_] = k;
    between_[count_] = b;
    exact_[count_++] = std::numeric_limits<double>::quiet_NaN();
  }

  // The least score64, and of equal ones the lowest code; -1 when no code entered. With `rounded`
  // the score need only be right once rounded to float32.
  int64_t winner(double* score, bool rounded) {
    if (count_ == 0) return -1;
    int open = 0, last = 0;
    for (int j = 0; j < count_; ++j) {
      if (between_[j].low <= least_high_) ++open, last = j;
    }
    const Bracket b = between_[last];
    if (rounded && open == 1 && static_cast<float>(b.low) == static_cast<float>(b.high)) {
      *score = b.low;
      return code_[last];
    }
    make_room();
    *score = exact_[0];
    return code_[0];
  }

 private:
  static constexpr int kRoom = 32;

  void load(int64_t k) {
    const float* c = codes_ + k * D_;
    load64(c, metric_ == kCosine ? norm64(c, D_) : 0.0, D_, scratch_);
  }

  // scores every code that may still win and keeps the best one
  void make_room() {
    int best = -1;
    for (int j = 0; j < count_; ++j) {
      if (between_[j].low > least_high_) continue;
      if (exact_[j] != exact_[j]) {
        load(code_[j]);
        exact_[j] = score64(z_, scratch_, D_, metric_);
      }
      if (best < 0 || exact_[j] < exact_[best] ||
          (exact_[j] == exact_[best] && code_[j] < code_[best])) {
        best = j;
      }
    }
    code_[0] = code_[best];
    exact_[0] = exact_[best];
    between_[0] = {exact_[0], exact_[0]};
    if (exact_[0] < least_high_) least_high_ = exact_[0];
    count_ = 1;
  }

  const float* codes_;
  const double* z_;
  double* scratch_;
  int64_t D_;
  int metric_;
  int count_ = 0;
  double least_high_ = std::numeric_limits<double>::infinity();
  int64_t code_[kRoom];
  Bracket between_[kRoom];
  double exact_[kRoom];  // score64 once known, else NaN
};
