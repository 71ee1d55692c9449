// A 3x3 convolution of so few channels that transforms would not pay: of 9 C values around each
// position the product with the weights. No include guard: a kernel file includes it once per
// instruction set, after channel_moments.h.
//
// Numerics: sums in float32, in blocks of kChain words of the 9 C values; bias and residual are
//   added in float32 and the result rounded once. An output does not depend on B, its place in the
//   batch, or the threads; what is not finite touches the outputs that read it.
//
// Shape of the code: the values of kPositions positions are copied side by side, [position, 9 C],
//   in the order of the weights [O, 3, 3, C]; they, the weights and the sums stay in L1.

namespace vqfast::VQFAST_ISA {
namespace {

template <class T, bool kNative>
struct DirectConv {
  static constexpr int kPer = 4 / sizeof(T);  // values to a word
  static constexpr int64_t kPositions = 48;   // a multiple of kRows

  // positions of an image that a thread takes at a time, and whose moments are one part
  static constexpr int64_t kRun = 16 * kPositions;

  int64_t B, H, W, C, O, words, positions, panels;
  int threads;
  const T *x, *w, *bias, *residual;
  T* y;
  Statistics* statistics;  // of y, or null

  DirectConv(const Args& a, Statistics* statistics)
      : B(a.t[0].shape[0]),
        H(a.t[0].shape[1]),
        W(a.t[0].shape[2]),
        C(a.t[0].shape[3]),
        O(a.t[1].shape[0]),
        words((9 * C + kPer - 1) / kPer),
        positions(H * W),
        panels((O + kWide - 1) / kWide),
        threads(a.threads),
        x(a.t[0].as<T>()),
        w(a.t[1].as<T>()),
        bias(a.t[2].as<T>()),
        residual(a.t[3].as<T>()),
        y(a.t[4].as<T>()),
        statistics(statistics) {}

  // weights -> packed [panel, words, kWide]; zeros where there is no output or value
  Scratch<int32_t> pack() const {
    auto packed = scratch<int32_t>(panels * words * kWide);
    std::fill_n(packed.get(), panels * words * kWide, 0);
    for (int64_t o = 0; o < O; ++o) {
      T* to = reinterpret_cast<T*>(packed.get() + o / kWide * words * kWide + o % kWide);
      for (int64_t k = 0; k < 9 * C; ++k) to[k / kPer * kWide * kPer + k % kPer] = w[o * 9 * C + k];
    }
    return packed;
  }

  // The 9 C values around each of some positions -> rows [count, words]. kC: C, if it is known when
  // this is compiled.
  template <int kC>
  void gather(int64_t begin, int64_t count, int32_t* rows) const {
    const int64_t each = 3 * (kC ? kC : C);
    int64_t i = begin / W % H, j = begin % W;
    for (int64_t t = 0; t < count; ++t) {
      T* to = reinterpret_cast<T*>(rows + t * words);
      const T* from = x + (begin + t - W) * C - each / 3;
      const bool left = j == 0, right = j + 1 == W;
      for (int p = -1; p <= 1; ++p, to += each, from += W * C) {
        const bool inside = i + p >= 0 && i + p < H;
        if (inside && !left && !right) {
          __builtin_memcpy(to, from, each * sizeof(T));
          continue;
        }
        std::fill_n(to, each, T{});
        if (inside) std::copy(from + left * C, from + each - right * C, to + left * C);
      }
      if (!right) {
        ++j;
      } else {
        j = 0;
        i = i + 1 == H ? 0 : i + 1;
      }
    }
  }

  // sums m [count, kWide] of one panel, plus bias and residual -> y and, unless it is null, moments
  void finish(const float* m, int64_t begin, int64_t count, int64_t panel,
              ChannelMoments* moments) const {
    for (int64_t o = panel * kWide; o < std::min(O, (panel + 1) * kWide); o += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, O - o));
      const VF b = load_n(bias + o, n);
      VF written[kPositions];
      for (int64_t t = 0; t < count; ++t) {
        const int64_t to = (begin + t) * O + o;
        VF v = load(m + t * kWide + o - panel * kWide) + b;
        if (residual) v += load_n(residual + to, n);
        store_rounded<kNative>(y + to, v, n);
        if (moments) written[t] = rounded<kNative, T>(v);
      }
      if (moments) moments->merge(o % kWide, written, static_cast<int>(count));
    }
    if (moments) moments->counted(static_cast<int>(count));
  }

  // positions [from, to) of all images, which are of one image
  void run_part(int64_t from, int64_t to, const int32_t* packed, int32_t* rows, float* m) const {
    for (int64_t begin = from; begin < to; begin += kPositions) {
      const int64_t n = std::min(kPositions, to - begin);
      if (C == 3)
        gather<3>(begin, n, rows);
      else
        gather<0>(begin, n, rows);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int32_t* u = packed + panel * words * kWide;
        for (int64_t k = 0; k < words; k += kChain)
          multiply_rows<T, kNative>(rows + k, words, n, u + k * kWide, std::min(kChain, words - k),
                                    k > 0, m);
        ChannelMoments* moments = nullptr;
        if (statistics)
          moments = statistics->at(begin / positions, begin % positions / kRun, panel);
        finish(m, begin, n, panel, moments);
      }
    }
  }

  void run() const {
    prefer_large_pages(y, static_cast<size_t>(B * positions * O) * sizeof(T));
    const auto packed = pack();
    const int64_t parts = (positions + kRun - 1) / kRun;
    if (statistics) statistics->make_room(parts);
    parallel_for(threads, B * parts, 1, [&](int64_t from, int64_t to) {
      const auto rows = scratch<int32_t>(kPositions * words);
      const auto m = scratch<float>(kPositions * kWide);
      std::fill_n(rows.get(), kPositions * words, 0);  // also the value that fills a last word
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t image = unit / parts * positions, part = unit % parts * kRun;
        run_part(image + part, image + std::min(positions, part + kRun), packed.get(), rows.get(),
                 m.get());
      }
    });
    if (statistics) statistics->write();
  }
};

}  // namespace
}  // namespace vqfast::VQFAST_ISA
