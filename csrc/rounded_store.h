// Floats rounded to the type of the memory they go to. No include guard: a kernel file includes it
// once per instruction set, after simd.h.
//
// Numerics: to nearest, ties to even. By vcvtneps2bf16 (subnormal numbers are zero) in a quarter of
//   the instructions of store_n where kNative: has_avx512_bf16() in kernel.h.

namespace vqfast::VQFAST_ISA {

template <bool kNative, class T>
VQFAST_INLINE void store_rounded(T* p, VF v, int n) {
  store_n(p, v, n);
}
template <bool kNative>
VQFAST_INLINE void store_rounded(bf16* p, VF v, int n) {
#if VQFAST_LANES == 16
  if constexpr (kNative) {
    // it belongs to no target that this project compiles for
    __m256i half;
    asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(v));
    return _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1u), half);
  }
#endif
  store_n(p, v, n);
}

// what store_rounded leaves of v in memory of T
template <bool kNative, class T>
VQFAST_INLINE VF rounded(VF v) {
  if constexpr (std::is_same_v<T, float>) return v;
#if VQFAST_LANES == 16
  if constexpr (kNative) {
    __m256i half;
    asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(v));
    return (VF)((VI)_mm512_cvtepu16_epi32(half) << 16);
  }
#endif
  T memory[kLanes];
  store_n(memory, v, kLanes);
  return load(memory);
}

}  // namespace vqfast::VQFAST_ISA
