// Computes: token[b] = one draw from softmax(top_k(logits[b] / temperature)) cut by top_p, or the
//   argmax at temperature 0. Logits [B, V] float32, float16 or bfloat16; sample_index int64 [B], or
//   [2, B] with what is added to the position of each row -> token [B] int64, -1 for a row without a distribution (NaN, +inf, or nothing but -inf).
// Contract: order temperature, top-k (ties of the k-th stay), softmax, top-p (falling logits, equal
//   ones by token; the crossing token stays), draw: the first token in vocabulary order whose
//   running sum exceeds u * total.
// Numerics: exp and all sums in double, in vocabulary order (sorted order for top-p). A row is one
//   thread's work and depends on nothing but itself. u has 53 bits of Philox4x32-10, key = seed,
//   counter = (sample, position).
// Shape of the code: widen the row once; the k-th largest by a histogram of the high bits of
//   order-preserving keys, then quickselect inside one bin; exp and sort of the kept tokens only.
// Ladder: first version. Scalar code, compiled once for the plain target. Next: a vector exp for
//   draws without top-k.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "half.h"
#include "kernel.h"
#include "parallel.h"

#define VQFAST_THIS_FILE "cpu/sample_logits.cpp"

#ifndef VQFAST_ISA
namespace vqfast::sampling {

struct Options {
  double temperature;
  int64_t top_k;  // 0: off
  double top_p;   // 1: off
  uint64_t seed;
  uint32_t position;
};

struct Kept {
  double p;
  int64_t token;
};

// what one thread needs for a row of V logits
struct Scratch {
  explicit Scratch(int64_t V) : x(V), bin(V), kept(V), order(V) {}
  std::vector<float> x, bin;
  std::vector<Kept> kept, order;
};

constexpr int kBinBits = 11;

inline double uniform(uint64_t seed, uint64_t sample, uint32_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32), position, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
        static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    std::copy(next, next + 4, c);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return static_cast<double>((uint64_t{c[0] >> 5} << 26) + (c[1] >> 6)) / 9007199254740992.0;
}

// unsigned order of the keys = order of the floats; -0 and 0 differ, which moves a tie of the k-th
// by nothing
inline uint32_t ordered(float x) {
  const uint32_t u = float_bits(x + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// the k-th largest of x, 1 <= k <= V
inline float kth_largest(const std::vector<float>& x, int64_t k, std::vector<float>& bin) {
  std::array<int32_t, 1 << kBinBits> count{};
  for (const float v : x) ++count[ordered(v) >> (32 - kBinBits)];
  int b = (1 << kBinBits) - 1;
  for (; k > count[b]; --b) k -= count[b];
  int64_t n = 0;
  for (const float v : x)
    if (static_cast<int>(ordered(v) >> (32 - kBinBits)) == b) bin[n++] = v;
  std::nth_element(bin.begin(), bin.begin() + (k - 1), bin.begin() + n, std::greater<float>());
  return bin[k - 1];
}

// leaves the tokens before which the sorted sum is <= top_p of the whole; the order of `kept` stays
inline int64_t cut_by_top_p(Scratch& s, int64_t n, double top_p) {
  const auto likelier = [&x = s.x](const Kept& a, const Kept& b) {
    const float xa = x[a.token], xb = x[b.token];
    return xa > xb || (xa == xb && a.token < b.token);
  };
  std::copy(s.kept.begin(), s.kept.begin() + n, s.order.begin());
  std::sort(s.order.begin(), s.order.begin() + n, likelier);
  double total = 0, before = 0;
  for (int64_t i = 0; i < n; ++i) total += s.order[i].p;
  int64_t m = 0;
  for (; m < n && before <= top_p * total; ++m) before += s.order[m].p;
  const Kept last = s.order[m - 1];
  int64_t left = 0;
  for (int64_t i = 0; i < n; ++i)
    if (!likelier(last, s.kept[i])) s.kept[left++] = s.kept[i];
  return left;
}

template <class T>
int64_t draw(const T* row, int64_t V, uint64_t sample, uint32_t position, const Options& o,
             Scratch& s) {
  int64_t best = 0;
  for (int64_t v = 0; v < V; ++v) {
    const float x = to_float(row[v]);
    if (!(x <= std::numeric_limits<float>::max())) return -1;  // NaN, +inf
    s.x[v] = x;
    if (x > s.x[best]) best = v;
  }
  const double top = s.x[best];
  if (std::isinf(top)) return -1;
  if (o.temperature == 0) return best;
  const float least = o.top_k > 0 && o.top_k < V ? kth_largest(s.x, o.top_k, s.bin)
                                                 : -std::numeric_limits<float>::infinity();
  int64_t n = 0;
  for (int64_t v = 0; v < V; ++v) {
    if (s.x[v] < least) continue;
    const double p = std::exp((s.x[v] - top) / o.temperature);
    if (p > 0) s.kept[n++] = {p, v};
  }
  if (o.top_p < 1) n = cut_by_top_p(s, n, o.top_p);
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += s.kept[i].p;
  const double edge = uniform(o.seed, sample, position) * total;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += s.kept[i].p;
    if (sum > edge) return s.kept[i].token;
  }
  return s.kept[n - 1].token;
}

template <class T>
void run_typed(const Args& a, const Options& o) {
  const View &logits = a.t[0], &sample = a.t[1], &token = a.t[2];
  const int64_t V = logits.shape[1], B = logits.shape[0];
  const int64_t* index = sample.as<int64_t>();
  const bool placed = sample.ndim == 2;  // a second row: what is added to each position
  parallel_for(a.threads, B, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(V);
    for (int64_t b = begin; b < end; ++b)
      token.as<int64_t>()[b] =
          draw(logits.as<T>() + b * V, V, static_cast<uint64_t>(index[b]),
               o.position + static_cast<uint32_t>(placed ? index[B + b] : 0), o, scratch);
  });
}

inline void run(const Args& a) {
  const Options o{a.s[0].f, a.s[1].i, a.s[2].f, static_cast<uint64_t>(a.s[3].i),
                  static_cast<uint32_t>(a.s[4].i)};
  switch (a.t[0].dtype) {
    case DType::f32:
      return run_typed<float>(a, o);
    case DType::f16:
      return run_typed<f16>(a, o);
    default:
      return run_typed<bf16>(a, o);
  }
}

}  // namespace vqfast::sampling
#endif

#include "foreach_isa.h"

namespace vqfast::VQFAST_ISA {

// scalar code, compiled once for the plain target
KERNEL(sample_logits, "f32|f16|bf16 i64 -> i64", sampling::run)

}  // namespace vqfast::VQFAST_ISA
