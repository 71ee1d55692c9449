// Floats rounded to the type of the memory they go to. No include guard: a kernel file includes it
// once per instruction set, after simd.h.
//
// Numerics: to nearest, ties to even. By vcvtneps2bf16 (subnormal numbers are zero) in a quarter of
//   the instructions of store_n where kNative: has_avx512_bf16() in kernel.h.

namespace vqfast::VQFAST_ISA {

#if VQFAST_LANES == 16
VQFAST_INLINE __m256i native_bf16(VF v) {
  // the instruction belongs to no target that this project compiles for
  __m256i half;
  asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(v));
  return half;
}
#endif

template <bool kNative, class T>
VQFAST_INLINE void store_rounded(T* p, VF v, int n) {
  store_n(p, v, n);
}
template <bool kNative>
VQFAST_INLINE void store_rounded(bf16* p, VF v, int n) {
#if VQFAST_LANES == 16
  if constexpr (kNative)
    return _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1u), native_bf16(v));
#endif
  store_n(p, v, n);
}

// what store_rounded leaves of v in memory of T
template <bool kNative, class T>
VQFAST_INLINE VF rounded(VF v) {
  if constexpr (std::is_same_v<T, float>) return v;
#if VQFAST_LANES == 16
  if constexpr (kNative) return (VF)((VI)_mm512_cvtepu16_epi32(native_bf16(v)) << 16);
#endif
  T memory[kLanes];
  store_n(memory, v, kLanes);
  return load(memory);
}

}  // namespace vqfast::VQFAST_ISA
