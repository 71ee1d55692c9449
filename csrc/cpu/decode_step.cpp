// Computes: one token of R sequences through all layers of a GPT, with its key-value cache:
//   embedding; per layer h += proj(attend(qkv(LN1 h), cache)), h += out(gelu(fc(LN2 h))); logits =
//   head(LN h) of the last n_logits rows. tokens, slots, positions [R]; caches [L, B, H, S, d]
//   float32 or bfloat16, written in place; packed weights as vqfast/ops/_packed.py describes
//   -> logits [n_logits, V]; scratch [R, row].
// Contract: keys and values of all rows of a layer are in the cache before a row attends; slots
//   past a row's position are never read. All indices were checked by the caller. Every float of
//   scratch is written before it is read.
// Numerics: float32 activations and accumulators in all formats. The order of each sum is fixed
//   (packed_matmul.h, attend.h; LayerNorm in lanes): a row's bits depend on its own sequence alone.
//   erf by two polynomials fitted to float64, absolute error < 2e-7.
// Shape of the code: phases of parallel_for, each over what it writes: rows (LayerNorm), panels of
//   16 outputs (matrices), heads (append, attend). Weights are read once per call for all rows;
//   7 phases per layer.
// Ladder: first version: panels, so that no sum is horizontal and one read of a column serves all
//   rows. Next: one parallel region for the whole step; int8 dot products for int8 and int4.
#include <cmath>

#include "half.h"
#include "kernel.h"
#include "parallel.h"

#define VQFAST_THIS_FILE "cpu/decode_step.cpp"
// clang-format off
#include "foreach_isa.h"
#include "simd.h"
#include "attend.h"
#include "packed_matmul.h"
// clang-format on

namespace vqfast::VQFAST_ISA {
namespace {

// erf(t) = t P(t^2) below 1, 1 - exp(-Q(t)) from there on
VQFAST_INLINE VF gelu(VF x) {
  constexpr float kSmall[] = {1.128379107e+00f,  -3.761262596e-01f, 1.128358245e-01f,
                              -2.685369179e-02f, 5.188099109e-03f,  -8.008189034e-04f,
                              7.847259258e-05f};
  constexpr float kLarge[] = {3.419623536e-04f, 1.127088904e+00f,  6.381424665e-01f,
                              1.031114534e-01f, -2.184170671e-02f, 2.948945854e-03f,
                              -1.865517115e-04f};
  const VF t = x * 0.70710678f, size = vmax(t, -t), s = t * t;
  const VF far = vmin(size, broadcast(4.0f));  // erf(4) is 1 in float32
  VF small = broadcast(kSmall[6]), large = broadcast(kLarge[6]);
#pragma GCC unroll 6
  for (int i = 5; i >= 0; --i) {
    small = fma(small, s, broadcast(kSmall[i]));
    large = fma(large, far, broadcast(kLarge[i]));
  }
  const VF tail = 1.0f - vexp(-large);
  const VF erf = select(size < broadcast(1.0f), small * t, select(t < VF{}, -tail, tail));
  return 0.5f * x * (1.0f + erf);
}

void layer_norm(const float* x, const float* weight, const float* bias, int64_t E, float* y) {
  VF sum{};
  for (int64_t i = 0; i < E; i += kLanes)
    sum += load_n(x + i, static_cast<int>(E - i < kLanes ? E - i : kLanes));
  const float mean = reduce_add(sum) / static_cast<float>(E);
  VF squares{};
  for (int64_t i = 0; i < E; i += kLanes) {
    const VF c = load_n(x + i, static_cast<int>(E - i < kLanes ? E - i : kLanes), mean) - mean;
    squares = fma(c, c, squares);
  }
  const float variance = reduce_add(squares) / static_cast<float>(E);
  const float deviation = std::sqrt(variance + 1e-5f);
  for (int64_t i = 0; i < E; ++i) y[i] = (x[i] - mean) / deviation * weight[i] + bias[i];
}

// ---- what becomes of the sums of a matrix product, 16 at a time
void put(const float* v, const float*, float* y, int count) {
  for (int i = 0; i < count; ++i) y[i] = v[i];
}
void put_biased(const float* v, const float* bias, float* y, int count) {
  for (int i = 0; i < count; ++i) y[i] = v[i] + bias[i];
}
void add_biased(const float* v, const float* bias, float* y, int count) {
  for (int i = 0; i < count; ++i) y[i] = y[i] + v[i] + bias[i];
}
void put_gelu(const float* v, const float* bias, float* y, int count) {
  for (int i = 0; i < count; i += kLanes) {
    const int rest = count - i < kLanes ? count - i : kLanes;
    store_n(y + i, gelu(load_n(v + i, rest) + load_n(bias + i, rest)), rest);
  }
}

struct Step {
  const int64_t *token, *slot, *position;
  View k_cache, v_cache;  // [L, B, H, S, d]
  const float *tok_emb, *pos_emb, *vectors;
  const uint8_t* weights;
  float* logits;
  int64_t L, B, H, S, d, E, V, R, n_logits;
  int bits, threads;
  // scratch: one row after another, ld floats apart
  int64_t ld;
  float *h, *normed, *attended, *qkv, *hidden;

  explicit Step(const Args& a) {
    token = a.t[0].as<int64_t>(), slot = a.t[1].as<int64_t>(), position = a.t[2].as<int64_t>();
    k_cache = a.t[3], v_cache = a.t[4];
    tok_emb = a.t[5].as<float>(), pos_emb = a.t[6].as<float>(), vectors = a.t[7].as<float>();
    weights = a.t[8].as<uint8_t>();
    logits = a.t[9].as<float>();
    L = k_cache.shape[0], B = k_cache.shape[1], H = k_cache.shape[2], S = k_cache.shape[3];
    d = k_cache.shape[4], E = H * d, V = a.t[5].shape[0], R = a.t[0].shape[0];
    bits = static_cast<int>(a.s[0].i), n_logits = a.s[1].i, threads = a.threads;
    ld = a.t[10].shape[1];
    const int64_t Ep = padded(E, kColumns);
    h = a.t[10].as<float>();
    normed = h + Ep, attended = normed + Ep, qkv = attended + Ep, hidden = qkv + 3 * E;
  }

  const float* next_vector(int64_t n) {
    const float* v = vectors;
    vectors += n;
    return v;
  }

  template <int kBits>
  void multiply_packed(int64_t N, int64_t K, const float* x, int64_t rows, const Output& to) {
    matmul<kBits>({weights, N, K}, x, ld, rows, threads, to);
    weights += matrix_bytes<kBits>(N, K);
  }

  // the next packed matrix [N, K] times `rows` rows of x
  void multiply(int64_t N, int64_t K, const float* x, int64_t rows, const Output& to) {
    switch (bits) {
      case 32:
        return multiply_packed<32>(N, K, x, rows, to);
      case 16:
        return multiply_packed<16>(N, K, x, rows, to);
      case 8:
        return multiply_packed<8>(N, K, x, rows, to);
      default:
        return multiply_packed<4>(N, K, x, rows, to);
    }
  }

  void embed() {
    const int64_t Ep = padded(E, kColumns), F = 4 * E, Fp = padded(F, kColumns);
    for (int64_t r = 0; r < R; ++r) {
      const float *word = tok_emb + token[r] * E, *place = pos_emb + position[r] * E;
      for (int64_t i = 0; i < E; ++i) h[r * ld + i] = word[i] + place[i];
      for (int64_t i = E; i < Ep; ++i) normed[r * ld + i] = attended[r * ld + i] = 0;
      for (int64_t i = F; i < Fp; ++i) hidden[r * ld + i] = 0;
    }
  }

  // normed[r] = LN h[r], from row `first` on
  void norm(int64_t first) {
    const float *weight = next_vector(E), *bias = next_vector(E);
    parallel_for(threads, R - first, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = first + begin; r < first + end; ++r)
        layer_norm(h + r * ld, weight, bias, E, normed + r * ld);
    });
  }

  template <class T>
  void append_and_attend(int64_t layer) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    T *k_at = k_cache.as<T>(), *v_at = v_cache.as<T>();
    parallel_for(threads, H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        for (int64_t r = 0; r < R; ++r) {
          const int64_t at = (((layer * B + slot[r]) * H + head) * S + position[r]) * d;
          float *q = qkv + r * ld + head * d, *k = q + E, *v = k + E;
          for (int64_t i = 0; i < d; ++i) {
            q[i] *= scale;
            k_at[at + i] = from_float<T>(k[i]);
            v_at[at + i] = from_float<T>(v[i]);
          }
        }
        for (int64_t r = 0; r < R; ++r) {
          const int64_t at = ((layer * B + slot[r]) * H + head) * S * d;
          attend(qkv + r * ld + head * d, k_at + at, v_at + at, position[r] + 1, d,
                 attended + r * ld + head * d);
        }
      }
    });
  }

  void run() {
    embed();
    for (int64_t layer = 0; layer < L; ++layer) {
      norm(0);
      multiply(3 * E, E, normed, R, {qkv, ld, next_vector(3 * E), put_biased});
      if (k_cache.dtype == DType::f32)
        append_and_attend<float>(layer);
      else
        append_and_attend<bf16>(layer);
      multiply(E, E, attended, R, {h, ld, next_vector(E), add_biased});
      norm(0);
      multiply(4 * E, E, normed, R, {hidden, ld, next_vector(4 * E), put_gelu});
      multiply(E, 4 * E, hidden, R, {h, ld, next_vector(E), add_biased});
    }
    const int64_t first = R - n_logits;
    norm(first);
    multiply(V, E, normed + first * ld, n_logits, {logits, V, logits, put});  // no bias
  }
};

void run(const Args& a) { Step(a).run(); }

}  // namespace

KERNEL(decode_step, "i64 i64 i64 f32|bf16 f32|bf16 f32 f32 f32 u8 -> f32 f32", run)

}  // namespace vqfast::VQFAST_ISA
