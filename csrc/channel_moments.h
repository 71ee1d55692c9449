// Mean and deviation of each group of channels of what a convolution writes, taken while its
// results are in registers. No include guard: a kernel file includes it once per instruction set,
// after panel_products.h, whose panels these are.
//
// Numerics: float32 over the values of a part (a few hundred), less the first of them, so that an
//   offset of all values costs no digits: squares about the mean of some 16 values, which are
//   merged by the formula of Chan, so that nothing cancels. Parts are merged in float64. What the
//   parts are depends on the size of an image alone.
//   Source: Chan, Golub and LeVeque, doi:10.1080/00031305.1983.10483115, eq. 2.1.

namespace vqfast::VQFAST_ISA {
namespace {

// Of a panel of channels: how many values each has, their mean after `shift`, and the sum of
// squares about it.
struct ChannelMoments {
  float count, shift[kWide], mean[kWide], square[kWide];

  // n more values of kLanes channels, the first of which is `channel` of the panel; `counted` comes
  // after those of all channels
  VQFAST_INLINE void merge(int64_t channel, const VF* v, int n) {
    const float values = static_cast<float>(n), share = values / (count + values);
    const VF about = count > 0 ? load(shift + channel) : v[0];
    VF total{}, squares{};
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) total += v[i] - about;
    const VF middle = total * (1.0f / values), known = load(mean + channel);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      const VF gap = v[i] - about - middle;
      squares = fma(gap, gap, squares);
    }
    const VF apart = middle - known;
    store(shift + channel, about);
    store(mean + channel, fma(apart, broadcast(share), known));
    store(square + channel,
          load(square + channel) + fma(apart * apart, broadcast(count * share), squares));
  }
  void counted(int n) { count += static_cast<float>(n); }
};

// The moments of the parts of each image, and where the statistics go: mean and rstd [B, G].
struct Statistics {
  int64_t B, O, G, parts, panels;
  double eps;
  float *mean, *rstd;
  Scratch<ChannelMoments> all;  // [B, parts, panels]

  // of a kernel that writes y [B, .., O], mean, rstd, and has the scalars groups and eps
  Statistics(const View& y, const View* outputs, const Scalar* s)
      : B(y.shape[0]),
        O(y.shape[3]),
        G(s[0].i),
        parts(0),
        panels((O + kWide - 1) / kWide),
        eps(s[1].f),
        mean(outputs[0].as<float>()),
        rstd(outputs[1].as<float>()) {}

  void make_room(int64_t parts_of_image) {
    parts = parts_of_image;
    all = scratch<ChannelMoments>(B * parts * panels);
    std::fill_n(all.get(), B * parts * panels, ChannelMoments{});
  }
  ChannelMoments* at(int64_t image, int64_t part, int64_t panel) const {
    return &all[(image * parts + part) * panels + panel];
  }

  // f(values, mean, squares about it) for each part and channel of a group of an image
  template <class F>
  void each(int64_t image, int64_t group, F&& f) const {
    const int64_t per = O / G;
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t o = group * per; o < (group + 1) * per; ++o) {
        const ChannelMoments& m = *at(image, part, o / kWide);
        const int64_t i = o % kWide;
        if (m.count > 0) f(double{m.count}, double{m.shift[i]} + m.mean[i], double{m.square[i]});
      }
  }

  void write() const {
    for (int64_t i = 0; i < B * G; ++i) {
      double n = 0, total = 0, square = 0;
      each(i / G, i % G, [&](double count, double middle, double) {
        n += count;
        total += count * middle;
      });
      const double middle = total / n;
      each(i / G, i % G, [&](double count, double of_part, double squares) {
        square += squares + count * (of_part - middle) * (of_part - middle);
      });
      mean[i] = static_cast<float>(middle);
      rstd[i] = static_cast<float>(1.0 / std::sqrt(square / n + eps));
    }
  }
};

}  // namespace
}  // namespace vqfast::VQFAST_ISA
