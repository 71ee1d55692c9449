// The codebook as the search sees it: float32 codes, which of them take part, and a centre.
//
// Included once per instruction set by nearest.cpp, inside namespace vqfast::VQFAST_ISA, so it has
// no include guard.

// Memory whose vectors do not straddle cache lines.
template <class T>
struct AlignedDelete {
  void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
template <class T>
using Aligned = std::unique_ptr<T[], AlignedDelete<T>>;
template <class T>
Aligned<T> aligned(int64_t n) {
  return Aligned<T>(
      static_cast<T*>(::operator new[](std::max<int64_t>(1, n) * sizeof(T), std::align_val_t{64})));
}

struct Book {
  const float* codes;  // [K, D]
  int64_t K, D;
  int metric;
  std::unique_ptr<float[]> converted;
  std::vector<uint8_t> skip;    // [K] not finite, or equal to an earlier code
  std::vector<uint64_t> hash;   // [K], equal for equal codes
  std::vector<int32_t> table;   // codes by hash, -1 where none is
  std::vector<float> centre;    // [D] m, near the codes
  std::vector<int32_t> weight;  // [D, and zeros up to whole vectors] odd, for the hash

  double norm(int64_t k) const { return metric == kCosine ? norm64(codes + k * D, D) : 0.0; }
};

template <class T>
void widen(const T* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
  for (; i < n; ++i) out[i] = to_float(x[i]);
}
void widen(const View& v, int64_t first, int64_t n, float* out) {
  if (v.dtype == DType::f16) widen(v.as<f16>() + first, out, n);
  if (v.dtype == DType::bf16) widen(v.as<bf16>() + first, out, n);
  if (v.dtype == DType::f32) std::memcpy(out, v.as<float>() + first, n * sizeof(float));
}

inline bool all_finite(const float* x, int64_t D) {
  const VI exponent = broadcast_int(0x7F800000);
  VI bad = {};
  for (int64_t i = 0; i < D; i += kLanes) {
    const VI bits = (VI)load_n(x + i, static_cast<int>(std::min<int64_t>(kLanes, D - i)));
    bad |= (bits & exponent) == exponent;
  }
  int32_t any = 0;
  for (int l = 0; l < kLanes; ++l) any |= bad[l];
  return !any;
}

// One change of a coordinate always changes its lane's sum, as the weights are odd.
inline uint64_t hash_of(const float* x, const int32_t* weight, int64_t D) {
  VI sum = {};
  for (int64_t i = 0; i < D; i += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, D - i));
    // adding 0 makes one code of -0 and 0
    VI w;
    __builtin_memcpy(&w, weight + i, sizeof w);
    sum += (VI)(load_n(x + i, n) + 0.0f) * w;
  }
  uint64_t h = 0;
  for (int l = 0; l < kLanes; ++l) h = (h + static_cast<uint32_t>(sum[l])) * 0x9E3779B97F4A7C15u;
  return h ^ h >> 29;
}

// Marks those of the codes first .. first + count that equal an earlier one; runs come in order.
template <class F>
void skip_repeated(Book& b, int64_t first, int64_t count, F&& repeated) {
  const uint64_t last = b.table.size() - 1;
  for (int64_t k = first; k < first + count; ++k) {
    if (b.skip[k]) continue;
    uint64_t at = b.hash[k] & last;
    for (; b.table[at] >= 0; at = (at + 1) & last) {
      if (b.hash[b.table[at]] != b.hash[k]) continue;
      if (b.table[at] == k) break;  // packed before, for another screen
      const float *x = b.codes + b.table[at] * b.D, *y = b.codes + k * b.D;
      int64_t i = 0;
      while (i < b.D && x[i] == y[i]) ++i;
      if (i == b.D) {
        b.skip[k] = 1;
        repeated(k);
      }
      break;  // equal hashes of unequal codes: nothing is lost but a shortcut
    }
    if (b.table[at] < 0) b.table[at] = static_cast<int32_t>(k);
  }
}

// m: the median of each coordinate over a sample (a mean would follow a single huge code)
void place_centre(Book& b) {
  constexpr int64_t kSample = 33;
  std::vector<double> rows;
  b.centre.assign(b.D, 0.0f);
  if (b.metric == kDot) return;
  int64_t count = 0;
  for (int64_t j = 0; j < std::min(kSample, b.K); ++j) {
    const int64_t k = b.K <= kSample ? j : j * b.K / kSample;
    const float* c = b.codes + k * b.D;
    if (!all_finite(c, b.D)) continue;
    rows.resize((count + 1) * b.D);
    load64(c, b.norm(k), b.D, rows.data() + count++ * b.D);
  }
  std::vector<float> column(count);
  for (int64_t i = 0; i < b.D && count > 0; ++i) {
    for (int64_t j = 0; j < count; ++j) column[j] = static_cast<float>(rows[j * b.D + i]);
    std::nth_element(column.begin(), column.begin() + count / 2, column.end());
    b.centre[i] = column[count / 2];
  }
}

void open_book(const View& v, int metric, int threads, Book& b) {
  b.K = v.shape[0];
  b.D = v.shape[1];
  b.metric = metric;
  b.codes = v.as<float>();
  if (v.dtype != DType::f32) {
    b.converted.reset(new float[b.K * b.D]);
    b.codes = b.converted.get();
    parallel_for(threads, b.K, 64, [&](int64_t begin, int64_t end) {
      widen(v, begin * b.D, (end - begin) * b.D, b.converted.get() + begin * b.D);
    });
  }
}

// What a screen needs beyond the codes. It fills `skip` and `hash` itself, as it reads each code.
void prepare_book(Book& b) {
  place_centre(b);
  b.skip.resize(b.K);
  b.hash.resize(b.K);
  size_t room = 16;
  while (room < static_cast<size_t>(2 * b.K)) room *= 2;
  b.table.assign(room, -1);
  b.weight.assign((b.D + kLanes - 1) / kLanes * kLanes, 0);
  uint64_t state = 1;
  for (int64_t i = 0; i < b.D; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    b.weight[i] = static_cast<int32_t>(state >> 33 | 1);
  }
}

// S, the power of two that brings the largest coordinate of a finite code, about the centre, near 1
double frame_scale(const Book& b, int threads) {
  if (b.metric == kCosine) return 1.0;
  std::vector<float> reach(b.K, 0.0f);
  parallel_for(threads, b.K, 64, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const float* c = b.codes + k * b.D;
      if (!all_finite(c, b.D)) continue;
      for (int64_t i = 0; i < b.D; ++i) {
        reach[k] = std::max(reach[k], std::fabs(c[i] * 0.5f - b.centre[i] * 0.5f));
      }
    }
  });
  const float top = *std::max_element(reach.begin(), reach.end());  // half of it, for no overflow
  return top > 0.0f ? std::ldexp(0.5, -std::ilogb(top)) : 1.0;
}
