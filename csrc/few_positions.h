// Convolutions on few positions as products of matrices, where the weight is most of what is read:
//     y [P, O] = X [P, K] W',  dX = g W,  dW = g' X,   K = side * side * C,
// row p of X holds the neighbours of position p of y beside each other, in the order of the weight
// W [O, side, side, C]. No include guard: a kernel file includes it once per instruction set, after
// panel_products.h, whose words and panels these are.

namespace vqfast::VQFAST_ISA {
namespace {

// A matrix of words that can be read past its last row, as multiply_rows does; between rows a
// vector of padding, as rows a power of two apart would share cache sets.
struct Words {
  int64_t rows, columns, stride;
  Scratch<int32_t> data;

  Words(int64_t rows, int64_t columns)
      : rows(rows),
        columns(columns),
        stride((columns + kLanes - 1) / kLanes * kLanes + kLanes),
        data(scratch<int32_t>((rows + kRows) * stride)) {}
  int32_t* row(int64_t r) const { return data.get() + r * stride; }
};

struct Few {
  int64_t B, H, W, C, h, w, O, side, stride, padding, P, K;  // h, w: of y

  Few(const View& x, const View& y, const View& weight, const Scalar* s)
      : B(x.shape[0]),
        H(x.shape[1]),
        W(x.shape[2]),
        C(x.shape[3]),
        h(y.shape[1]),
        w(y.shape[2]),
        O(y.shape[3]),
        side(weight.shape[1]),
        stride(s[0].i),
        padding(s[1].i),
        P(B * h * w),
        K(side * side * C) {}

  // the position of x [B, H, W] under tap (i, j) of position p of y; -1 outside
  int64_t neighbour(int64_t p, int64_t i, int64_t j) const {
    const int64_t row = p / w % h * stride + i - padding, column = p % w * stride + j - padding;
    const bool inside = row >= 0 && row < H && column >= 0 && column < W;
    return inside ? (p / (h * w) * H + row) * W + column : -1;
  }

  // X, two values to a word in bfloat16
  template <class T>
  Words neighbours(const T* x, int threads) const {
    constexpr int64_t kPer = 4 / sizeof(T);
    Words out(P, (K + kPer - 1) / kPer);
    parallel_for(threads, P, 4, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) {
        T* row = reinterpret_cast<T*>(out.row(p));
        for (int64_t i = 0; i < side; ++i)
          for (int64_t j = 0; j < side; ++j, row += C) {
            const int64_t at = neighbour(p, i, j);
            if (at < 0)
              std::fill_n(row, C, T{});
            else
              std::copy_n(x + at * C, C, row);
          }
        // a word's second value that does not exist is zero
        if (K % kPer) *row = T{};
      }
    });
    return out;
  }
};

// The lines of memory that are read after the next products, which ask for them word by word: rows
// of a weight lie too far apart for the prefetcher of the CPU, and more requests at a time than the
// CPU has buffers for would halt it.
struct Ahead {
  std::vector<const void*> lines;
  size_t asked = 0;

  // `rows` pieces of `bytes` from `first` on, `step` bytes apart
  void add(const void* first, int64_t rows, int64_t step, int64_t bytes) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < bytes; i += 64)
        lines.push_back(static_cast<const char*>(first) + r * step + i);
  }
  void clear() {
    lines.clear();
    asked = 0;
  }
};

// m [rows, kWide] = v u, or +=, as multiply_rows; asks for up to n lines with each register tile
template <class T, bool kNative>
void multiply_few(const int32_t* v, int64_t stride, int64_t rows, const int32_t* u, int64_t n,
                  bool add, float* m, Ahead& ahead) {
  for (int64_t t = 0; t < rows; t += kRows, v += kRows * stride, m += kRows * kWide) {
    if (ahead.asked + static_cast<size_t>(n) > ahead.lines.size() || rows - t < kRows) {
      multiply_rows<T, kNative>(v, stride, std::min<int64_t>(kRows, rows - t), u, n, add, m);
      continue;
    }
    multiply<T, kNative, kRows, true>(v, stride, u, n, add, m, ahead.lines.data() + ahead.asked);
    ahead.asked += static_cast<size_t>(n);
  }
}

// 2 kLanes values of one row, or of two rows side by side in bfloat16 words -> u; n of them exist,
// and `high` may not; the others are zeros
template <class T, bool kNative, class From>
VQFAST_INLINE void interleave(const From* low, const From* high, int64_t n, int32_t* u) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const int m = static_cast<int>(std::clamp<int64_t>(n - half * kLanes, 0, kLanes));
    const VF a = load_n(low + half * kLanes, m);
    if constexpr (sizeof(T) == 4) {
      store((float*)u + half * kLanes, a);
    } else {
      const VI word = pair<kNative>(a, high ? load_n(high + half * kLanes, m) : VF{});
      __builtin_memcpy(u + half * kLanes, &word, sizeof word);
    }
  }
}

}  // namespace
}  // namespace vqfast::VQFAST_ISA
