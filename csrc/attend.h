// Softmax attention of one query over the first `length` slots of a cache, for decode_attention and
// decode_step. No include guard: a kernel file includes it once per instruction set, after simd.h.
//
// Numerics: float accumulators; running maximum over chunks of kChunk slots (Milakov and
//   Gimelshein, arXiv:1805.02867), so the order of every sum depends on length and d alone. Slots
//   from `length` on are never read.

namespace vqfast::VQFAST_ISA {

constexpr int kChunk = 64;

template <class T>
VQFAST_INLINE float dot(const float* q, const T* k, int64_t d) {
  VF sum{};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) sum = fma(load(q + i), load(k + i), sum);
  if (i < d) {
    const int rest = static_cast<int>(d - i);
    sum = fma(load_n(q + i, rest), load_n(k + i, rest), sum);
  }
  return reduce_add(sum);
}

// out[i] = out[i] * keep + sum_j p[j] * v[j * d + i]
template <class T>
VQFAST_INLINE void add_values(const float* p, const T* v, int n, int64_t d, float keep,
                              float* out) {
  constexpr int kWide = 4;  // vectors in flight, for the latency of the fma
  int64_t i = 0;
  for (; i + kWide * kLanes <= d; i += kWide * kLanes) {
    VF sum[kWide];
    for (int w = 0; w < kWide; ++w) sum[w] = load(out + i + w * kLanes) * keep;
    for (int j = 0; j < n; ++j)
      for (int w = 0; w < kWide; ++w)
        sum[w] = fma(broadcast(p[j]), load(v + j * d + i + w * kLanes), sum[w]);
    for (int w = 0; w < kWide; ++w) store(out + i + w * kLanes, sum[w]);
  }
  for (; i < d; i += kLanes) {
    const int rest = static_cast<int>(d - i < kLanes ? d - i : kLanes);
    VF sum = load_n(out + i, rest) * keep;
    for (int j = 0; j < n; ++j) sum = fma(broadcast(p[j]), load_n(v + j * d + i, rest), sum);
    store_n(out + i, sum, rest);
  }
}

// q [d] float, already times the scale; k, v [length, d]; out [d]: written, zeros for length 0
template <class T>
void attend(const float* q, const T* k, const T* v, int64_t length, int64_t d, float* out) {
  for (int64_t i = 0; i < d; ++i) out[i] = 0;
  float top = -__builtin_inff(), total = 0;
  for (int64_t begin = 0; begin < length; begin += kChunk) {
    const int n = static_cast<int>(length - begin < kChunk ? length - begin : kChunk);
    float p[kChunk];
    float best = top;
    for (int j = 0; j < n; ++j) {
      p[j] = dot(q, k + (begin + j) * d, d);
      best = p[j] > best ? p[j] : best;
    }
    for (int j = n; j < kChunk; ++j) p[j] = -__builtin_inff();  // e^-inf = 0
    VF sum{};
    for (int j = 0; j < kChunk; j += kLanes) {
      const VF e = vexp(load(p + j) - best);
      sum += e;
      store(p + j, e);
    }
    const float keep = begin ? vexp(broadcast(top - best))[0] : 0.0f;
    total = total * keep + reduce_add(sum);
    top = best;
    add_values(p, v + begin * d, n, d, keep, out);
  }
  const float share = length ? 1.0f / total : 0.0f;
  for (int64_t i = 0; i < d; ++i) out[i] *= share;
}

}  // namespace vqfast::VQFAST_ISA
