// The products of packed weights with rounded activations, a few columns of a row at a time, and
// the rounding of the activations; for packed_matmul.h. No include guard: a kernel file includes it
// once per instruction set, after simd.h. Layouts: vqfast/ops/_packed.py.
//
// Numerics: int8 products are added in int32, exactly, on every instruction set. Two bfloat16
//   products are added to a float by vdpbf16ps where the CPU has it (no rounding between, subnormal
//   numbers are zero), by two multiply-adds elsewhere.

namespace vqfast::VQFAST_ISA {

constexpr int kPanel = 64, kColumns = 64, kGroup = 32;
constexpr int kSlice = 16;               // rows of a panel that are multiplied together
constexpr float kLeast = 0x1p-100f;      // a group of activations below it becomes zeros
constexpr int kParts = kSlice / kLanes;  // vectors that hold one value of each row of a slice

VQFAST_INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// acc[i] += sum over j < 4 of (uint8) w[4 i + j] * (int8) x[j]; w and x hold 4 bytes a lane, x the
// same ones in each
VQFAST_INLINE void dot4(VI& acc, VI w, VI x) {
#if VQFAST_LANES == 16 && defined(VQFAST_VNNI)
  // not the intrinsic: gcc 12 copies its accumulator in every call
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
#elif VQFAST_LANES == 16
  const __m512i low = _mm512_set1_epi16(0xFF), W = (__m512i)w, X = (__m512i)x;
  const __m512i even =
      _mm512_madd_epi16(_mm512_and_si512(W, low), _mm512_srai_epi16(_mm512_slli_epi16(X, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(W, 8), _mm512_srai_epi16(X, 8));
  acc += (VI)_mm512_add_epi32(even, odd);
#elif VQFAST_LANES == 8
  const __m256i low = _mm256_set1_epi16(0xFF), W = (__m256i)w, X = (__m256i)x;
  const __m256i even =
      _mm256_madd_epi16(_mm256_and_si256(W, low), _mm256_srai_epi16(_mm256_slli_epi16(X, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(W, 8), _mm256_srai_epi16(X, 8));
  acc += (VI)_mm256_add_epi32(even, odd);
#else
  acc += (w & 255) * (x << 24 >> 24) + (w >> 8 & 255) * (x << 16 >> 24) +
         (w >> 16 & 255) * (x << 8 >> 24) + (w >> 24 & 255) * (x >> 24);
#endif
}

// acc[i] += w[2 i] * x[0] + w[2 i + 1] * x[1] in bfloat16; w and x hold 2 values a lane
template <bool kNative>
VQFAST_INLINE void dot2(VF& acc, VI w, VI x) {
#if VQFAST_LANES == 16
  if constexpr (kNative) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return;
  }
#endif
  const int32_t high = static_cast<int32_t>(0xFFFF0000u);
  acc = fma((VF)(w << 16), (VF)(x << 16), acc);
  acc = fma((VF)(w & high), (VF)(x & high), acc);
}

VQFAST_INLINE VI load_int(const void* p) {
  VI v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

VQFAST_INLINE VI every_lane(const void* p) {  // 4 bytes
  int32_t x;
  __builtin_memcpy(&x, p, sizeof x);
  return broadcast_int(x);
}

// ---- activations

// one row of activations, [Kp] of the type that the products take
struct Operand {
  const void* values;     // float, bf16 or int8
  const float* scale;     // int8: of each group
  const int32_t* offset;  // int8: -sum of the group, which undoes the offset of the weights
};

// where its parts stand in Kp floats of memory
template <int kBits>
VQFAST_INLINE Operand operand_at(const float* row, int64_t Kp) {
  if constexpr (kBits >= 16) return {row, nullptr, nullptr};
  const float* scale = row + Kp / 4;
  return {row, scale, (const int32_t*)(scale + Kp / kGroup)};
}

// groups [begin, end) of x [Kp] -> to, which is Kp floats of memory; nothing for float32, where x
// is the operand itself
template <int kBits>
void round_operand(const float* x, int64_t Kp, int64_t begin, int64_t end, float* to) {
  if constexpr (kBits == 16) {
    bf16* out = (bf16*)to;
    for (int64_t k = begin * kGroup; k < end * kGroup; k += kLanes) store(out + k, load(x + k));
  } else if constexpr (kBits < 16) {
    const Operand parts = operand_at<kBits>(to, Kp);
    int8_t* out = (int8_t*)to;
    const VF magic = broadcast(12582912.0f);  // its last bit is 1: adding it rounds to an integer
    for (int64_t g = begin; g < end; ++g) {
      const float* at = x + g * kGroup;
      VF most{}, odd{};
      for (int k = 0; k < kGroup; k += kLanes) {
        const VF v = load(at + k);
        most = vmax(vmax(v, -v), most);
        odd = odd + (v - v);  // 0, or NaN where one is not finite
      }
      const float largest = reduce_max(most), finite = reduce_add(odd);
      const VF inverse = broadcast(127.0f / (largest < kLeast ? 1.0f : largest));
      VI sum{};
      for (int k = 0; k < kGroup; k += kLanes) {
        VF v = (load(at + k) * inverse + magic) - magic;
        v = select(v == v, v, VF{});
        const VI q = __builtin_convertvector(v, VI);
        sum += q;
        typedef int8_t Bytes __attribute__((vector_size(VQFAST_LANES)));
        const Bytes b = __builtin_convertvector(q, Bytes);
        __builtin_memcpy(out + g * kGroup + k, &b, sizeof b);
      }
      int32_t total = 0;
      for (int i = 0; i < kLanes; ++i) total += sum[i];
      ((float*)parts.scale)[g] = finite == 0 ? largest / 127.0f : __builtin_nanf("");
      ((int32_t*)parts.offset)[g] = -(kBits == 8 ? 128 : 8) * total;
    }
  }
}

}  // namespace vqfast::VQFAST_ISA
