// The tiles of a 3x3 convolution by Winograd: where they are, the transforms of weights, inputs and
// outputs, and the scales of factors in int16. No include guard: a kernel file includes it once per
// instruction set, after winograd.h, rounded_store.h, fixed_point.h, transformed_panel.h and
// channel_moments.h. What it computes, and the error: cpu/conv3x3.cpp.

namespace vqfast::VQFAST_ISA {
namespace {

// kOut x kOut outputs of a tile. F: what the factors are rounded to, T or int16_t. kDoubled: the
// pixels of x are doubled. kNative: vdpbf16ps and its rounding are there.
template <class T, class F, int kOut, bool kDoubled, bool kNative>
struct WinogradTiles {
  using Line = Winograd<kOut, kDoubled>;
  static constexpr bool kFixed = std::is_same_v<F, int16_t>;
  static constexpr int kPer = 4 / sizeof(F);  // channels to a word
  static constexpr int kTaps = Line::kTaps;   // rows and columns of a transformed tile
  static constexpr int kF = kTaps * kTaps;    // frequencies
  static constexpr int kScale = kDoubled ? 2 : 1;
  static constexpr int64_t kSub = kOut == 4 ? 24 : 48;       // tiles whose products are held
  static constexpr int64_t kProducts = kSub * kWide + 16;    // from frequency to frequency of them
  static constexpr int64_t kStage = kChain * kPer + kLanes;  // likewise of a tile before rounding

  int64_t B, H, W, C, O, words, down, across, tiles, panels;  // tiles: of one image
  int threads;
  const T *x, *w, *bias, *residual;
  T* y;
  Balance balance;  // of int16 factors

  explicit WinogradTiles(const Args& a)
      : B(a.t[0].shape[0]),
        H(a.t[0].shape[1]),
        W(a.t[0].shape[2]),
        C(a.t[0].shape[3]),
        O(a.t[1].shape[0]),
        words((C + kPer - 1) / kPer),
        down((H * kScale + kOut - 1) / kOut),
        across((W * kScale + kOut - 1) / kOut),
        tiles(down * across),
        panels((O + kWide - 1) / kWide),
        threads(a.threads),
        x(a.t[0].as<T>()),
        w(a.t[1].as<T>()),
        bias(a.t[2].as<T>()),
        residual(a.t[3].as<T>()),
        y(a.t[4].as<T>()) {}

  VQFAST_INLINE static void put(F* p, VF v, int n) {
    if constexpr (kFixed)
      store_int16(p, v, n);
    else
      store_rounded<kNative>(p, v, n);
  }

  // take(f, u) for G g G' of n channels of one output
  template <class Take>
  VQFAST_INLINE void each_weight(const T* from, int n, Take&& take) const {
    along_both<Line::weights, 3, kTaps>(
        [&](int p, int q)
            __attribute__((always_inline)) { return n ? load_n(from + (p * 3 + q) * C, n) : VF{}; },
        [&](int i, int j, VF u) __attribute__((always_inline)) { take(i * kTaps + j, u); });
  }

  // G g G' of n channels of one output -> to[f * kTile words]
  VQFAST_INLINE void transform_weight(int64_t o, int64_t c, int n, F* to) const {
    const T* from = w + o * 9 * C + c;
    VF factor{};
    if constexpr (kFixed)
      if (n) factor = load(balance.inverse.get() + c) * balance.output[o];
    const auto store_each = [&](int f, VF u) __attribute__((always_inline)) {
      put(to + f * kTile * kPer, kFixed ? u * factor : u, kLanes);
    };
    if (n == kLanes)
      each_weight(from, kLanes, store_each);
    else
      each_weight(from, n, store_each);
  }

  // G g G' of the weights of one panel -> packed [kF, words, kWide]
  void pack(int64_t panel, int32_t* tile, int32_t* packed) const {
    const auto transform = [&](int64_t o, int64_t c, int n, F* to)
                               __attribute__((always_inline)) { transform_weight(o, c, n, to); };
    pack_panel<kF, F>(panel, O, C, tile, packed, transform);
  }

  using Window = const T* [kTaps][kTaps];

  // where the inputs of one tile are; zeros: a pixel of zeros
  void find_inputs(int64_t tile, const T* zeros, Window& from) const {
    const T* image = x + tile / tiles * H * W * C;
    const int64_t top = tile % tiles / across * Line::kStep - 1,
                  left = tile % across * Line::kStep - 1;
    for (int i = 0; i < kTaps; ++i)
      for (int j = 0; j < kTaps; ++j) {
        const int64_t row = top + i, column = left + j;
        const bool inside = row >= 0 && row < H && column >= 0 && column < W;
        from[i][j] = inside ? image + (row * W + column) * C : zeros;
      }
  }

  // take(f, v) for B' d B of channels [c, c + n)
  template <class Take>
  VQFAST_INLINE void each_input(const Window& from, int64_t c, int n, Take&& take) const {
    VF factor{};
    if constexpr (kFixed) factor = load(balance.channel.get() + c);
    along_both<Line::inputs, kTaps, kTaps>(
        [&](int i, int j) __attribute__((always_inline)) {
          const VF d = load_n(from[i][j] + c, n);
          return kFixed ? d * factor : d;
        },
        [&](int i, int j, VF v) __attribute__((always_inline)) { take(i * kTaps + j, v); });
  }

  // take(channel, width) for channels [from, to) a vector at a time
  template <class Take>
  VQFAST_INLINE void each_vector(int64_t from, int64_t to, Take&& take) const {
    int64_t c = from;
    for (; c + kLanes <= to; c += kLanes) take(c, kLanes);
    if (c < to) take(c, static_cast<int>(to - c));
  }

  // B' d B of one tile -> v[f * stride + c]; scale: see transform_fixed
  void transform_input(int64_t tile, const T* zeros, F* v, int64_t stride, float* scale,
                       int64_t scales) const {
    Window from;
    find_inputs(tile, zeros, from);
    if constexpr (kFixed) return transform_fixed(from, v, stride, scale, scales);
    each_vector(0, C, [&](int64_t c, int n) __attribute__((always_inline)) {
      // a word's second channel that does not exist is zero
      const int written = n == kLanes ? kLanes : static_cast<int>(words * kPer - c);
      each_input(from, c, n, [&](int f, VF to) __attribute__((always_inline)) {
        put(v + f * stride + c, to, written);
      });
    });
  }

  // The same in int16, each chain of channels by a factor that bounds its sums of squares; its
  // reciprocal -> scale[chain * scales].
  void transform_fixed(const Window& from, F* v, int64_t stride, float* scale,
                       int64_t scales) const {
    alignas(64) float stage[kF * kStage];
    for (int64_t first = 0; first < C; first += kChain * kPer, scale += scales) {
      const int64_t end = std::min(C, first + kChain * kPer);
      const int64_t width = (end - first + kLanes - 1) / kLanes * kLanes;
      each_vector(first, end, [&](int64_t c, int n) __attribute__((always_inline)) {
        each_input(from, c, n, [&](int f, VF to) __attribute__((always_inline)) {
          store(stage + f * kStage + (c - first), to);
        });
      });
      const float factor = bounding_factor<kF>(stage, kStage, width, kInputNorm);
      *scale = 1.0f / factor;
      // a word's second channel that does not exist is zero
      const int64_t filled = std::min(first + width, words * kPer);
      for (int f = 0; f < kF; ++f)
        each_vector(first, filled, [&](int64_t c, int n) __attribute__((always_inline)) {
          put(v + f * stride + c, load(stage + f * kStage + (c - first)) * factor, n);
        });
    }
  }

  // Channels by the norm of their weights, outputs by a factor that bounds the sums of squares of
  // each chain of a frequency.
  void balance_factors() {
    balance.channels<T>(w, O * 9, C);
    balance.output = scratch<float>(O);
    parallel_for(threads, O, 1, [&](int64_t from, int64_t to) {
      alignas(64) float stage[kF * kStage];
      for (int64_t o = from; o < to; ++o) {
        float least = kLargestFactor;
        for (int64_t first = 0; first < C; first += kChain * kPer) {
          const int64_t end = std::min(C, first + kChain * kPer);
          each_vector(first, end, [&](int64_t c, int n) __attribute__((always_inline)) {
            const VF inverse = load(balance.inverse.get() + c);
            each_weight(w + o * 9 * C + c, n, [&](int f, VF u) __attribute__((always_inline)) {
              store(stage + f * kStage + (c - first), u * inverse);
            });
          });
          const int64_t width = (end - first + kLanes - 1) / kLanes * kLanes;
          const float factor = bounding_factor<kF>(stage, kStage, width, kWeightNorm);
          least = factor < least || factor != factor ? factor : least;
        }
        balance.output[o] = least;
      }
    });
  }

  // A' m A of one tile, from channel o on, plus bias and residual `added` (or null) -> its rows x
  // columns outputs in y from `corner` on and, if kStats, their moments. kWhole: kOut x kOut.
  template <bool kStats, bool kWhole>
  VQFAST_INLINE void write_tile(const float* m, int64_t o, T* corner, const T* added, int rows,
                                int columns, ChannelMoments* moments) const {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, O - o));
    const VF b = load_n(bias + o, n);
    VF scale{}, written[kOut * kOut];
    if constexpr (kFixed) scale = 1.0f / load_n(balance.output.get() + o, n, 1.0f);
    along_both<Line::outputs, kTaps, kOut>(
        [&](int i, int j)
            __attribute__((always_inline)) { return load(m + (i * kTaps + j) * kProducts); },
        [&](int i, int j, VF out) __attribute__((always_inline)) {
          if (!kWhole && (i >= rows || j >= columns)) return;
          const int64_t at = (i * W * kScale + j) * O + o;
          VF v = kFixed ? fma(out, scale, b) : out + b;
          if (added) v += load_n(added + at, n);
          store_rounded<kNative>(corner + at, v, n);
          if constexpr (kStats) written[i * (kWhole ? kOut : columns) + j] = rounded<kNative, T>(v);
        });
    if constexpr (kStats) moments->merge(o % kWide, written, kWhole ? kOut * kOut : rows * columns);
  }

  // The outputs of one tile and panel; m [kF, kWide], kProducts apart.
  template <bool kStats>
  void transform_output(const float* m, int64_t tile, int64_t panel,
                        ChannelMoments* moments) const {
    const int64_t top = tile % tiles / across * kOut, left = tile % across * kOut;
    const int rows = static_cast<int>(std::min<int64_t>(kOut, H * kScale - top)),
              columns = static_cast<int>(std::min<int64_t>(kOut, W * kScale - left));
    T* corner = y + ((tile / tiles * H * kScale + top) * W * kScale + left) * O;
    const T* added = residual ? residual + (corner - y) : nullptr;
    for (int64_t o = panel * kWide; o < std::min(O, (panel + 1) * kWide); o += kLanes, m += kLanes)
      if (rows == kOut && columns == kOut)
        write_tile<kStats, true>(m, o, corner, added, rows, columns, moments);
      else
        write_tile<kStats, false>(m, o, corner, added, rows, columns, moments);
    if constexpr (kStats) moments->counted(rows * columns);
  }
};

}  // namespace
}  // namespace vqfast::VQFAST_ISA
