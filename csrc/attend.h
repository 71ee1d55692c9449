// Softmax attention of one query over the first `length` slots of a cache, for decode_attention and
// decode_step. No include guard: a kernel file includes it once per instruction set, after simd.h.
//
// Numerics: float accumulators; running maximum over chunks of kChunk slots (Milakov and
//   Gimelshein, arXiv:1805.02867), so the order of every sum depends on length and d alone. Slots
//   from `length` on are never read.

namespace vqfast::VQFAST_ISA {

constexpr int kChunk = 64;

// blocks of 2 kWidth lanes: the sums of both halves of a's, then of b's
template <int kWidth>
VQFAST_INLINE VF fold(VF a, VF b) {
  VI low{}, high{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const int within = i % (2 * kWidth), block = i - within;
    low[i] = within < kWidth ? i : kLanes + block + within - kWidth;
    high[i] = low[i] + kWidth;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// lane j = the sum of the lanes of part[j], pairwise as reduce_add
template <int kCount>
VQFAST_INLINE VF add_across(VF* part) {
  if constexpr (kCount == 1) {
    return part[0];
  } else {
    constexpr int kHalf = kCount / 2;
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) part[i] = fold<kHalf>(part[i], part[i + kHalf]);
    return add_across<kHalf>(part);
  }
}

// <q, k[j]> of the n <= kLanes slots from k on; the lanes from n on hold no sense
template <class T>
VQFAST_INLINE VF dots(const float* q, const T* k, int n, int64_t d) {
  VF part[kLanes] = {};
  const T* slot[kLanes];
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) slot[j] = k + (j < n ? j : n - 1) * d;
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    const VF x = load(q + i);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) part[j] = fma(x, load(slot[j] + i), part[j]);
  }
  if (i < d) {
    const int rest = static_cast<int>(d - i);
    const VF x = load_n(q + i, rest);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) part[j] = fma(x, load_n(slot[j] + i, rest), part[j]);
  }
  return add_across<kLanes>(part);
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
    for (int j = 0; j < n; j += kLanes) {
      const int rest = n - j < kLanes ? n - j : kLanes;
      store(p + j, dots(q, k + (begin + j) * d, rest, d));
    }
    for (int j = n; j < kChunk; ++j) p[j] = -__builtin_inff();  // e^-inf = 0
    for (int j = 0; j < n; ++j) best = p[j] > best ? p[j] : best;
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
