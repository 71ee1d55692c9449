// The tiles of the gradient of a 3x3 convolution's weight: where they are, the transforms of inputs
// and gradients a block of tiles at a time, and the scales of factors in int16. No include guard: a
// kernel file includes it once per instruction set, after winograd.h and fixed_point.h. What it
// computes, and the error: cpu/conv3x3_weight.cpp.

namespace vqfast::VQFAST_ISA {
namespace {

// T: of x and g; kOut: rows and columns of a tile
template <class T, int kOut>
struct GradientTiles {
  static constexpr bool kFixed = sizeof(T) == 2;  // factors in int16
  static constexpr int kPer = kFixed ? 2 : 1;     // tiles to a word
  using Line = Winograd<kOut, false>;
  static constexpr int kTaps = Line::kTaps, kF = kTaps * kTaps;
  static constexpr int64_t kWords = kFixed ? 32 : 64;  // of a block
  static constexpr int64_t kTiles = kWords * kPer;
  // of values before rounding; without the odd vector all of them would fall into the same sets of
  // L1
  static constexpr int64_t kStage = kTiles * kLanes + kLanes;

  int64_t B, H, W, C, O, across, tiles, blocks;  // tiles: of one image; blocks: of all
  const T *x, *g;
  Scratch<float> input_scale, gradient_scale;  // [B tiles], to whole blocks

  explicit GradientTiles(const Args& a)
      : B(a.t[0].shape[0]),
        H(a.t[0].shape[1]),
        W(a.t[0].shape[2]),
        C(a.t[0].shape[3]),
        O(a.t[1].shape[3]),
        across((W + kOut - 1) / kOut),
        tiles((H + kOut - 1) / kOut * across),
        blocks(std::max<int64_t>(1, (B * tiles + kTiles - 1) / kTiles)),
        x(a.t[0].as<T>()),
        g(a.t[1].as<T>()),
        input_scale(scratch<float>(kFixed ? blocks * kTiles : 0)),
        gradient_scale(scratch<float>(kFixed ? blocks * kTiles : 0)) {}

  Scratch<T> no_pixel() const {
    auto zeros = scratch<T>(std::max(C, O));
    std::fill_n(zeros.get(), std::max(C, O), T{});
    return zeros;
  }

  // where the tiles of a block are; what lies outside, and tiles past the last, are at zeros
  struct Places {
    const T* input[kTiles][kF];
    const T* gradient[kTiles][kOut * kOut];
    const float *input_scale, *gradient_scale;  // of int16: see balance
  };

  // of the block that begins at a tile
  void find(int64_t begin, const T* zeros, Places& at) const {
    const int64_t end = std::min(B * tiles, begin + kTiles);
    at.input_scale = input_scale.get() + begin;
    at.gradient_scale = gradient_scale.get() + begin;
    for (int64_t n = 0; n < kTiles; ++n) {
      const int64_t tile = begin + n, image = tile / tiles;
      const int64_t top = tile % tiles / across * kOut, left = tile % across * kOut;
      const auto place = [&](const T* of, int64_t row, int64_t column, int64_t width) {
        const bool inside = tile < end && row >= 0 && row < H && column >= 0 && column < W;
        return inside ? of + ((image * H + row) * W + column) * width : zeros;
      };
      for (int i = 0; i < kTaps; ++i)
        for (int j = 0; j < kTaps; ++j)
          at.input[n][i * kTaps + j] = place(x, top + i - 1, left + j - 1, C);
      for (int i = 0; i < kOut; ++i)
        for (int j = 0; j < kOut; ++j)
          at.gradient[n][i * kOut + j] = place(g, top + i, left + j, O);
    }
  }

  // A tile's inputs and gradients by powers of two, one the reciprocal of the other, that make both
  // about as large: large inputs with small gradients do not push the other tiles out.
  void balance(int64_t begin, const Places& at) const {
    for (int64_t n = 0; n < kTiles; ++n) {
      const int input = largest_bits(at.input[n], kF, C);
      const int gradient = largest_bits(at.gradient[n], kOut * kOut, O);
      const bool finite = input < kInfinity && gradient < kInfinity;
      const int power = finite ? std::clamp(((gradient >> 7) - (input >> 7)) / 2, -120, 120) : 0;
      const bool zero = input == 0 || gradient == 0;
      input_scale[begin + n] = zero ? 0.0f : std::ldexp(1.0f, power);
      gradient_scale[begin + n] = zero ? 0.0f : std::ldexp(1.0f, -power);
    }
  }

  // A thread that has a span to itself balances a block as it comes to it instead, and finds it in
  // cache then.
  void balance_all(int threads) const {
    parallel_for(threads, blocks, 1, [&](int64_t from, int64_t to) {
      const auto zeros = no_pixel();
      const auto at = scratch<Places>(1);
      for (int64_t block = from; block < to; ++block) {
        find(block * kTiles, zeros.get(), *at.get());
        balance(block * kTiles, *at.get());
      }
    });
  }

  // take(f, B' d B) of channels [c, c + n) of a tile
  template <class Take>
  VQFAST_INLINE void transform_input(const Places& at, int64_t tile, int64_t c, int n,
                                     Take&& take) const {
    along_both<Line::inputs, kTaps, kTaps>(
        [&](int i, int j) __attribute__((always_inline)) {
          const VF d = load_n(at.input[tile][i * kTaps + j] + c, n);
          return kFixed ? d * at.input_scale[tile] : d;
        },
        [&](int i, int j, VF v) __attribute__((always_inline)) { take(i * kTaps + j, v); });
  }

  // take(f, A g A') of outputs [o, o + n) of a tile; returns the sum of its gradients
  template <class Take>
  VQFAST_INLINE VF transform_gradient(const Places& at, int64_t tile, int64_t o, int n,
                                      Take&& take) const {
    VF sums[kOut] = {};  // of columns
    along_both<Line::output_gradients, kOut, kTaps>(
        [&](int i, int j) __attribute__((always_inline)) {
          const VF d = load_n(at.gradient[tile][i * kOut + j] + o, n);
          sums[j] += d;
          return kFixed ? d * at.gradient_scale[tile] : d;
        },
        [&](int i, int j, VF v) __attribute__((always_inline)) { take(i * kTaps + j, v); });
    VF total{};
    for (int j = 0; j < kOut; ++j) total += sums[j];
    return total;
  }

  // Where one vector of transformed values goes: word t of frequency f to to[f * stride + t *
  // step]; what undoes the factors of int16 to inverse[f * apart].
  struct Column {
    int32_t* to;
    int64_t stride, step;
    float* inverse;
    int64_t apart;
  };

  // transform(tile, take) for all tiles of n words, rounded
  template <class Transform>
  VQFAST_INLINE static void fill(const Column& of, int64_t words, float* stage,
                                 Transform&& transform) {
    if constexpr (!kFixed) {
      for (int64_t t = 0; t < words; ++t)
        transform(t, [&](int f, VF v) __attribute__((always_inline)) {
          store(reinterpret_cast<float*>(of.to) + f * of.stride + t * of.step, v);
        });
    } else {
      const int64_t count = (words + 1) / 2 * 4;
      for (int64_t t = 0; t < count; ++t)
        transform(t, [&](int f, VF v) __attribute__((always_inline)) {
          store(stage + f * kStage + t * kLanes, v);
        });
      for (int f = 0; f < kF; ++f) {
        const float* two = stage + f * kStage;
        const VF factor = bounding_factors(two, count);
        store(of.inverse + f * of.apart, 1.0f / factor);
        int32_t* to = of.to + f * of.stride;
        for (int64_t t = 0, step = of.step; t < words; ++t, to += step, two += 2 * kLanes) {
          const VI word = int16_pair(load(two) * factor, load(two + kLanes) * factor);
          __builtin_memcpy(to, &word, sizeof word);
        }
      }
    }
  }

  __attribute__((noinline)) void fill_inputs(const Column& of, int64_t words, float* stage,
                                             const Places& at, int64_t c) const {
    const auto some = [&](int n) __attribute__((always_inline)) {
      fill(of, words, stage, [&](int64_t tile, auto&& take) __attribute__((always_inline)) {
        transform_input(at, tile, c, n, take);
      });
    };
    if (C - c >= kLanes)
      some(kLanes);
    else
      some(static_cast<int>(C - c));
  }

  __attribute__((noinline)) VF fill_gradients(const Column& of, int64_t words, float* stage,
                                              const Places& at, int64_t o) const {
    VF total{};
    const auto some = [&](int n) __attribute__((always_inline)) {
      fill(of, words, stage, [&](int64_t tile, auto&& take) __attribute__((always_inline)) {
        total += transform_gradient(at, tile, o, n, take);
      });
    };
    if (O - o >= kLanes)
      some(kLanes);
    else
      some(static_cast<int>(O - o));
    return total;
  }
};

}  // namespace
}  // namespace vqfast::VQFAST_ISA
