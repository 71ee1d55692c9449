// The logistic function and u sigmoid(u). No include guard: a kernel file includes it once per
// instruction set, after simd.h.
//
// Numerics: infinities and NaN come out as by exp and a division. kCoarse, for results of 8 bits:
//   relative error of 2^-12 with AVX-512 (2^t by a cubic, a reciprocal of 14 bits); elsewhere it is
//   the exact way too.

namespace vqfast::VQFAST_ISA {

#if VQFAST_LANES == 16
// 1 + e^-u; 2^t = 2^floor(t) p(t - floor(t))
VQFAST_INLINE VF coarse_denominator(VF u) {
  const VF t = u * -1.44269504f, f = (VF)_mm512_reduce_ps((__m512)t, 9);
  VF p = fma(f, broadcast(0.07802452f), broadcast(0.22606717f));
  p = fma(fma(p, f, broadcast(0.6958335f)), f, broadcast(0.9999252f));
  return (VF)_mm512_scalef_ps((__m512)p, (__m512)t) + 1.0f;
}
#endif

// With AVX-512 without a division; error of 2 eps.
template <bool kCoarse>
VQFAST_INLINE VF sigmoid(VF u) {
#if VQFAST_LANES == 16
  if constexpr (kCoarse) return (VF)_mm512_rcp14_ps((__m512)coarse_denominator(u));
  // beyond 80 the quotient stays finite; the operands of min and max stand so that a NaN stays
  const __m512 c =
      _mm512_min_ps(_mm512_set1_ps(80.0f), _mm512_max_ps(_mm512_set1_ps(-80.0f), (__m512)-u));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(c, _mm512_set1_ps(1.44269504f)), 8);
  VF r = fma((VF)n, broadcast(-0.693359375f), (VF)c);
  r = fma((VF)n, broadcast(2.12194440e-4f), r);
  VF p = fma(r, broadcast(1.3888889e-3f), broadcast(8.3334519e-3f));
  p = fma(fma(p, r, broadcast(4.1665796e-2f)), r, broadcast(1.6666667e-1f));
  p = fma(fma(fma(p, r, broadcast(0.5f)), r, broadcast(1.0f)), r, broadcast(1.0f));
  p = (VF)_mm512_scalef_ps((__m512)p, n) + 1.0f;
  const VF near = (VF)_mm512_rcp14_ps((__m512)p);
  return near * fma(-p, near, broadcast(2.0f));
#else
  return 1.0f / (1.0f + vexp(-u));
#endif
}

template <bool kCoarse>
VQFAST_INLINE VF silu(VF u) {
#if VQFAST_LANES == 16
  if constexpr (kCoarse) return u * (VF)_mm512_rcp14_ps((__m512)coarse_denominator(u));
#endif
  return u / (1.0f + vexp(-u));
}

}  // namespace vqfast::VQFAST_ISA
