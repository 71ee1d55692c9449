// The packed weights of vqfast/ops/_packed.py: their constants, and the rounding of the activations
// that they are multiplied with; for packed_matmul.h. No include guard: a kernel file includes it
// once per instruction set, after simd.h.

namespace vqfast::VQFAST_ISA {

constexpr int kPanel = 64, kColumns = 64, kGroup = 32;
constexpr int kSlice = 16;               // rows of a panel that are multiplied together
constexpr float kLeast = 0x1p-100f;      // a group of activations below it becomes zeros
constexpr int kParts = kSlice / kLanes;  // vectors that hold one value of each row of a slice

VQFAST_INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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
