// Between screen and last word: float32 scores of the codes that the screen left, each between two
// bounds, so that float64 sees only those whose bounds overlap.
//
// Included once per instruction set by nearest.cpp, inside namespace vqfast::VQFAST_ISA, so it has
// no include guard.
//
//     l2      s = sum (z - c)^2               |s - score64| <= (D+16) 2^-23 s
//     cosine  s = |z|^2 + |c|^2/n^2 - 2 z.c/n  with z normalised, n = max(|c|, 1e-12):
//                                             |s - score64| <= (D+16) 2^-21
//     dot     s = -z.c                        |s - score64| <= (D+16) 2^-23 |z||c|
// up to (D+16) 2^-120 for products that underflow. Of sums that pass 2^120 (or are NaN) it is known
// only that squares are above 2^119.

inline float sum_lanes(VF v) {
#if VQFAST_LANES == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  return reduce_add(v);
#endif
}

class Shortlist {
 public:
  // z [D]: the row, for cosine divided by its norm and rounded to float32
  void start(const Book& b, const float* z) {
    book_ = &b;
    z_ = z;
    entries_.clear();
    least_high_ = std::numeric_limits<float>::infinity();
    VF zz = {};
    for (int64_t i = 0; i < b.D; i += kLanes) {
      const VF v = load_n(z + i, static_cast<int>(std::min<int64_t>(kLanes, b.D - i)));
      zz = fma(v, v, zz);
    }
    square_ = sum_lanes(zz);
  }

  void enter(int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k += 4) {
      int64_t codes[4];
      const int n = static_cast<int>(std::min<int64_t>(4, end - k));
      for (int j = 0; j < 4; ++j) codes[j] = k + std::min(j, n - 1);
      score(codes, n);
    }
  }
  // the codes of a group; those below 0 are none
  void enter(const int32_t* group, int size) {
    int64_t codes[4];
    int n = 0;
    for (int j = 0; j < size; ++j) {
      if (group[j] >= 0) codes[n++] = group[j];
      if (n == 4 || (n > 0 && j + 1 == size)) {
        for (int i = n; i < 4; ++i) codes[i] = codes[n - 1];
        score(codes, n);
        n = 0;
      }
    }
  }

  // no less than the least score64 of the codes entered
  float high() const { return least_high_; }

  // calls f(k) for what may still win, in the order of entering
  template <class F>
  void survivors(F&& f) const {
    for (const Entry& e : entries_) {
      if (e.low <= least_high_) f(e.code);
    }
  }

 private:
  struct Entry {
    int64_t code;
    float low;
  };

  // the first n of four codes
  void score(const int64_t* codes, int n) {
    if (book_->metric == kL2) {
      score<true>(codes, n);
    } else {
      score<false>(codes, n);
    }
  }

  template <bool kDifferences>
  void score(const int64_t* codes, int n) {
    const int64_t D = book_->D;
    const float* c[4];
    for (int j = 0; j < 4; ++j) c[j] = book_->codes + codes[j] * D;
    VF s[4] = {}, q[4] = {};  // differences: s alone; else z.c and c.c
    const auto add = [&](int64_t i, auto&& part) {
      const VF z = part(z_ + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const VF x = part(c[j] + i);
        if (kDifferences) {
          const VF d = z - x;
          s[j] = fma(d, d, s[j]);
        } else {
          s[j] = fma(z, x, s[j]);
          q[j] = fma(x, x, q[j]);
        }
      }
    };
    int64_t i = 0;
    for (; i + kLanes <= D; i += kLanes) add(i, [](const float* p) { return load(p); });
    if (i < D) {
      const int rest = static_cast<int>(D - i);
      add(i, [&](const float* p) { return load_n(p, rest); });
    }
    for (int j = 0; j < n; ++j) {
      if (!book_->skip.empty() && book_->skip[codes[j]]) continue;
      judge(codes[j], sum_lanes(s[j]), kDifferences ? 0.0f : sum_lanes(q[j]));
    }
  }

  void judge(int64_t k, float s, float q) {
    const float infinity = std::numeric_limits<float>::infinity();
    const float d = static_cast<float>(book_->D + 16), tiny = d * 0x1p-120f;
    float value = s, slack = d * 0x1p-23f * s + tiny, least = -infinity;
    bool known = s < 0x1p120f;
    if (book_->metric == kCosine) {
      const float n = std::max(std::sqrt(q), 1e-12f);
      value = square_ + q / (n * n) - 2.0f * s / n;
      slack = d * 0x1p-21f;
      known = q < 0x1p120f;
    } else if (book_->metric == kDot) {
      const float product = std::sqrt(q) * std::sqrt(square_);
      value = -s;
      slack = d * 0x1p-23f * product + tiny;
      known = product < 0x1p120f;
    }
    if (book_->metric == kL2) least = 0x1p119f;
    const float low = known ? value - slack : least, high = known ? value + slack : infinity;
    if (!(low <= least_high_)) return;
    if (high < least_high_) least_high_ = high;
    entries_.push_back({k, low});
  }

  const Book* book_ = nullptr;
  const float* z_ = nullptr;
  float square_ = 0.0f, least_high_ = 0.0f;
  std::vector<Entry> entries_;
};
