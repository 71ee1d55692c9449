// Winograd's minimal filtering F(kOut, 3) in one dimension, for vectors of channels: kOut outputs
// y[i] = sum over p of g[p] d[i + p] by kTaps = kOut + 2 products, y = A'[(G g) * (B' d)]. Used
// along rows, then columns. Its transpose is the gradient of the weights, dw = G'[(A g) * (B' d)]
// of kOut gradients g of outputs. No include guard: a kernel file includes it once per instruction
// set, after simd.h.
//
// F(2, 3) has the points 0, 1, -1 and infinity; F(4, 3) 0, 5/8, -5/8, 3/2, -3/2 and infinity. All
// constants but those of G are exact in float32. The error of a whole convolution by F(4x4, 3x3),
// against float64, is 0.5 to 0.9 times that of oneDNN's direct one in channels_last and 4 to 5
// times that of F(2x2, 3x3); with Lavin's points 0, 1, -1, 2, -2 it is 3 to 5 times larger still.
// Source: arXiv:1509.09308; on the choice of points arXiv:1803.10986.

namespace vqfast::VQFAST_ISA {

template <int kOut, bool kDoubled>
struct Winograd;

template <>
struct Winograd<2, false> {
  static constexpr int kOut = 2, kTaps = 4, kStep = 2;  // kStep: inputs from tile to tile

  VQFAST_INLINE static void weights(const VF* g, VF* u) {
    const VF ends = g[0] + g[2];
    u[0] = g[0];
    u[1] = (ends + g[1]) * 0.5f;
    u[2] = (ends - g[1]) * 0.5f;
    u[3] = g[2];
  }
  VQFAST_INLINE static void inputs(const VF* d, VF* v) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  VQFAST_INLINE static void outputs(const VF* m, VF* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  VQFAST_INLINE static void output_gradients(const VF* g, VF* u) {
    u[0] = g[0];
    u[1] = g[0] + g[1];
    u[2] = g[0] - g[1];
    u[3] = -g[1];
  }
  VQFAST_INLINE static void weight_gradients(const VF* m, VF* dw) {
    const VF half = (m[1] + m[2]) * 0.5f;
    dw[0] = m[0] + half;
    dw[1] = (m[1] - m[2]) * 0.5f;
    dw[2] = half + m[3];
  }
};

// d = a b b c, the inputs doubled from a b c: the third product is zero and left out
template <>
struct Winograd<2, true> {
  static constexpr int kOut = 2, kTaps = 3, kStep = 1;

  VQFAST_INLINE static void weights(const VF* g, VF* u) {
    u[0] = g[0];
    u[1] = (g[0] + g[2] + g[1]) * 0.5f;
    u[2] = g[2];
  }
  VQFAST_INLINE static void inputs(const VF* d, VF* v) {
    v[0] = d[0] - d[1];
    v[1] = d[1] + d[1];
    v[2] = d[1] - d[2];
  }
  VQFAST_INLINE static void outputs(const VF* m, VF* y) {
    y[0] = m[0] + m[1];
    y[1] = m[1] - m[2];
  }
};

template <>
struct Winograd<4, false> {
  static constexpr int kOut = 4, kTaps = 6, kStep = 4;
  static constexpr float a = 0.625f, b = 1.5f, aa = a * a, bb = b * b;
  static constexpr float at_zero = 1 / (aa * bb), at_a = 1 / (2 * aa * (aa - bb)),
                         at_b = 1 / (2 * bb * (bb - aa));

  VQFAST_INLINE static void weights(const VF* g, VF* u) {
    u[0] = g[0] * at_zero;
    const VF near = fma(g[2], broadcast(aa), g[0]), far = fma(g[2], broadcast(bb), g[0]);
    u[1] = fma(g[1], broadcast(a), near) * at_a;
    u[2] = fma(g[1], broadcast(-a), near) * at_a;
    u[3] = fma(g[1], broadcast(b), far) * at_b;
    u[4] = fma(g[1], broadcast(-b), far) * at_b;
    u[5] = g[2];
  }
  VQFAST_INLINE static void inputs(const VF* d, VF* v) {
    const VF both = broadcast(-aa - bb), product = broadcast(aa * bb);
    v[0] = fma(d[0], product, fma(d[2], both, d[4]));
    v[5] = fma(d[1], product, fma(d[3], both, d[5]));
    const VF near = fma(d[1], broadcast(-bb), d[3]), near_even = fma(d[2], broadcast(-bb), d[4]);
    const VF far = fma(d[1], broadcast(-aa), d[3]), far_even = fma(d[2], broadcast(-aa), d[4]);
    v[1] = fma(near, broadcast(a), near_even);
    v[2] = fma(near, broadcast(-a), near_even);
    v[3] = fma(far, broadcast(b), far_even);
    v[4] = fma(far, broadcast(-b), far_even);
  }
  VQFAST_INLINE static void outputs(const VF* m, VF* y) {
    const VF near = m[1] + m[2], far = m[3] + m[4];
    const VF near_odd = (m[1] - m[2]) * a, far_odd = (m[3] - m[4]) * b;
    y[0] = m[0] + near + far;
    y[1] = near_odd + far_odd;
    y[2] = fma(near, broadcast(aa), far * bb);
    y[3] = fma(near_odd, broadcast(aa), fma(far_odd, broadcast(bb), m[5]));
  }
  VQFAST_INLINE static void output_gradients(const VF* g, VF* u) {
    const VF near = fma(g[2], broadcast(aa), g[0]), far = fma(g[2], broadcast(bb), g[0]);
    const VF near_odd = fma(g[3], broadcast(aa), g[1]), far_odd = fma(g[3], broadcast(bb), g[1]);
    u[0] = g[0];
    u[1] = fma(near_odd, broadcast(a), near);
    u[2] = fma(near_odd, broadcast(-a), near);
    u[3] = fma(far_odd, broadcast(b), far);
    u[4] = fma(far_odd, broadcast(-b), far);
    u[5] = g[3];
  }
  VQFAST_INLINE static void weight_gradients(const VF* m, VF* dw) {
    const VF near = (m[1] + m[2]) * at_a, far = (m[3] + m[4]) * at_b;
    dw[0] = fma(m[0], broadcast(at_zero), near + far);
    dw[1] = fma(m[1] - m[2], broadcast(a * at_a), (m[3] - m[4]) * (b * at_b));
    dw[2] = fma(near, broadcast(aa), fma(far, broadcast(bb), m[5]));
  }
};

// One of the transforms above in two dimensions: take(i, j, v) for the kTo x kTo results of the
// kFrom x kFrom values load(i, j), asked for column by column.
template <auto line, int kFrom, int kTo, class Load, class Take>
VQFAST_INLINE void along_both(Load&& load, Take&& take) {
  VF t[kFrom][kTo];  // [column][row]
#pragma GCC unroll 6
  for (int j = 0; j < kFrom; ++j) {
    VF column[kFrom];
#pragma GCC unroll 6
    for (int i = 0; i < kFrom; ++i) column[i] = load(i, j);
    line(column, t[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTo; ++i) {
    VF row[kFrom], out[kTo];
#pragma GCC unroll 6
    for (int j = 0; j < kFrom; ++j) row[j] = t[j][i];
    line(row, out);
#pragma GCC unroll 6
    for (int j = 0; j < kTo; ++j) take(i, j, out[j]);
  }
}

}  // namespace vqfast::VQFAST_ISA
