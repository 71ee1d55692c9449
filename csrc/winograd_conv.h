// A 3x3 convolution by Winograd: blocks of tiles and panels of outputs, and who takes which. No
// include guard: a kernel file includes it once per instruction set, after panel_products.h and
// winograd_tiles.h. What it computes and why so: cpu/conv3x3.cpp.

namespace vqfast::VQFAST_ISA {
namespace {

constexpr int64_t kBlockBytes = 512 << 10;  // of V; the rest of L2 holds weights and products
constexpr int64_t kFewBytes = 2 << 20;      // V of all tiles: packing all weights does not pay

template <class T, class F, int kOut, bool kDoubled, bool kNative>
struct WinogradConv {
  using Tiles = WinogradTiles<T, F, kOut, kDoubled, kNative>;
  static constexpr bool kLarge = kOut == 4;  // with statistics
  static constexpr int kF = Tiles::kF;
  static constexpr int64_t kSub = Tiles::kSub;

  Tiles map;
  Statistics* statistics;          // of y, or null
  int64_t runs, run_tiles, block;  // a block has tiles of one run, all blocks about as many

  WinogradConv(const Args& a, Statistics* statistics)
      : map(a),
        statistics(statistics),
        // no block has tiles of two images where there are statistics, which are of one image
        runs(statistics ? map.B : 1),
        run_tiles(statistics ? map.tiles : map.B * map.tiles) {
    const int64_t size = 4 * kF * map.words;
    const int64_t most = std::max<int64_t>(kRows, kBlockBytes / size / kRows * kRows);
    const int64_t n = std::max<int64_t>(1, (run_tiles + most - 1) / most);
    block = ((run_tiles + n - 1) / n + kRows - 1) / kRows * kRows;
  }

  // Transformed inputs of some tiles.
  struct Transformed {
    int64_t stride, scales;  // from frequency to frequency, from chain to chain
    Scratch<int32_t> v;      // [kF, tiles, words]
    Scratch<float> scale;    // [chains, tiles], of int16
  };

  Transformed room(int64_t count) const {
    const int64_t padded = (count + kRows - 1) / kRows * kRows;
    // a vector more, as frequencies a power of two apart would share cache sets
    const int64_t stride = padded * map.words + 16;
    const int64_t scales = Tiles::kFixed ? (map.words + kChain - 1) / kChain * padded : 0;
    return {stride, padded, scratch<int32_t>(kF * stride), scratch<float>(scales)};
  }

  Scratch<T> no_pixel() const {
    auto zeros = scratch<T>(map.C);
    std::fill_n(zeros.get(), map.C, T{});
    return zeros;
  }

  // tile number `from` of x is number `to` of these
  void transform_input(int64_t from, const T* zeros, const Transformed& in, int64_t to) const {
    map.transform_input(from, zeros, reinterpret_cast<F*>(in.v.get() + to * map.words),
                        in.stride * Tiles::kPer, in.scale.get() + to, in.scales);
  }

  // Tiles [begin, begin + count) of one panel, from their transformed inputs, `at` and on; u [kF,
  // words, kWide].
  void run_panel(int64_t begin, int64_t count, int64_t panel, const int32_t* u,
                 const Transformed& in, int64_t at, float* m) const {
    const int64_t words = map.words;
    for (int64_t sub = 0; sub < count; sub += kSub) {
      const int64_t n = std::min(kSub, count - sub), tile = begin + sub, from = at + sub;
      for (int f = 0; f < kF; ++f)
        for (int64_t k = 0; k < words; k += kChain)
          multiply_rows<F, kNative>(in.v.get() + f * in.stride + from * words + k, words, n,
                                    u + (f * words + k) * kWide, std::min(kChain, words - k), k > 0,
                                    m + f * Tiles::kProducts,
                                    in.scale.get() + k / kChain * in.scales + from);
      if (!kLarge || !statistics) {
        for (int64_t t = 0; t < n; ++t)
          map.template transform_output<false>(m + t * kWide, tile + t, panel, nullptr);
        continue;
      }
      const int64_t of_image = tile % map.tiles, part = of_image / block * parts_of_block();
      ChannelMoments* moments =
          statistics->at(tile / map.tiles, part + of_image % block / kSub, panel);
      for (int64_t t = 0; t < n; ++t)
        map.template transform_output<kLarge>(m + t * kWide, tile + t, panel, moments);
    }
  }

  int64_t parts_of_block() const { return (block + kSub - 1) / kSub; }
  int64_t blocks() const { return runs * ((run_tiles + block - 1) / block); }
  // the first tile of a block, and their number
  std::pair<int64_t, int64_t> tiles_of(int64_t i) const {
    const int64_t each = blocks() / runs, first = i % each * block;
    return {i / each * run_tiles + first, std::min(block, run_tiles - first)};
  }

  // few tiles: V of all of them, then panel by panel the weights, which are used while in cache
  void run_few() const {
    const int64_t count = map.B * map.tiles;
    const Transformed in = room(count);
    const auto zeros = no_pixel();
    parallel_for(map.threads, count, 1, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) transform_input(t, zeros.get(), in, t);
    });
    parallel_for(map.threads, map.panels, 1, [&](int64_t from, int64_t to) {
      const auto tile = scratch<int32_t>(kF * kTile);
      const auto packed = scratch<int32_t>(kF * map.words * kWide);
      const auto m = scratch<float>(kF * Tiles::kProducts);
      for (int64_t p = from; p < to; ++p) {
        map.pack(p, tile.get(), packed.get());
        for (int64_t i = 0; i < blocks(); ++i) {
          const auto [begin, n] = tiles_of(i);
          run_panel(begin, n, p, packed.get(), in, begin, m.get());
        }
      }
    });
  }

  void run_many() const {
    const int64_t panels = map.panels, panel_size = kF * map.words * kWide, units = blocks();
    const int64_t outputs = map.B * map.H * map.W * map.kScale * map.kScale * map.O;
    prefer_large_pages(map.y, static_cast<size_t>(outputs) * sizeof(T));
    const auto packed = scratch<int32_t>(panels * panel_size);
    parallel_for(map.threads, panels, 1, [&](int64_t from, int64_t to) {
      const auto tile = scratch<int32_t>(kF * kTile);
      for (int64_t p = from; p < to; ++p) map.pack(p, tile.get(), packed.get() + p * panel_size);
    });
    // few blocks: their panels are shared out too, and each share transforms the input again
    const int64_t shares = units >= 8 * map.threads ? 1 : std::min<int64_t>(panels, 4);
    parallel_for(map.threads, units * shares, 1, [&](int64_t from, int64_t to) {
      const Transformed in = room(block);
      const auto m = scratch<float>(kF * Tiles::kProducts);
      const auto zeros = no_pixel();
      for (int64_t unit = from; unit < to; ++unit) {
        const auto [begin, count] = tiles_of(unit / shares);
        const int64_t share = unit % shares;
        for (int64_t t = 0; t < count; ++t) transform_input(begin + t, zeros.get(), in, t);
        for (int64_t p = panels * share / shares; p < panels * (share + 1) / shares; ++p)
          run_panel(begin, count, p, packed.get() + p * panel_size, in, 0, m.get());
      }
    });
  }

  void run() {
    if (map.B == 0) return;
    if constexpr (Tiles::kFixed) map.balance_factors();
    const bool few = kF * map.words * 4 * map.B * map.tiles <= kFewBytes;
    if (few && !statistics) block = run_tiles;
    if (statistics) statistics->make_room(blocks() / map.B * parts_of_block());
    few ? run_few() : run_many();
    if (statistics) statistics->write();
  }
};

}  // namespace
}  // namespace vqfast::VQFAST_ISA
