// The transformed weights of a 3x3 convolution, packed in panels for panel_products.h. No include
// guard: a kernel file includes it once per instruction set, after panel_products.h.

namespace vqfast::VQFAST_ISA {
namespace {

// Words from one transformed weight to the next of a tile [kWide, kLanes] of them; a vector of
// padding, as those a power of two apart would share cache sets.
constexpr int64_t kTile = kWide * kLanes + 16;

// The kF transformed weights of the outputs of one panel -> packed [kF, words, kWide], values of T;
// zeros where there is no output or channel. transform(o, c, n, to): those of channels [c, c + n)
// of output o and zeros up to kLanes -> to[f * kTile words]; nothing is read if n = 0. tile
// [kF, kTile] is overwritten.
template <int kF, class T, class Transform>
VQFAST_INLINE void pack_panel(int64_t panel, int64_t O, int64_t C, int32_t* tile, int32_t* packed,
                              Transform&& transform) {
  constexpr int kPer = 4 / sizeof(T);
  const int64_t words = (C + kPer - 1) / kPer;
  for (int64_t from = 0; from < words; from += kLanes) {
    for (int row = 0; row < kWide; ++row)
      for (int part = 0; part < kPer; ++part) {
        const int64_t o = panel * kWide + row, c = from * kPer + part * kLanes;
        const int n = o < O ? static_cast<int>(std::clamp<int64_t>(C - c, 0, kLanes)) : 0;
        transform(o, c, n, reinterpret_cast<T*>(tile + row * kLanes) + part * kLanes);
      }
    const int64_t n = std::min<int64_t>(kLanes, words - from);
    for (int f = 0; f < kF; ++f)
      for (int half = 0; half < kWide; half += kLanes)
        transpose(tile + f * kTile + half * kLanes, n, packed + (f * words + from) * kWide + half);
  }
}

}  // namespace
}  // namespace vqfast::VQFAST_ISA
