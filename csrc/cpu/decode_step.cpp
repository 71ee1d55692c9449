// Computes: one token of R sequences through all layers of a GPT, with its key-value cache:
//   embedding; per layer h += proj(attend(qkv(LN1 h), cache)), h += out(gelu(fc(LN2 h))); logits =
//   head(LN h) of the last n_logits rows. tokens, slots, positions [R]; caches [L, B, H, S, d]
//   float32 or bfloat16, written in place; packed weights as vqfast/ops/_packed.py describes
//   -> logits [n_logits, V]; scratch [R, row].
// Contract: keys and values of all rows of a layer are in the cache before a row attends; slots
//   past a row's position are never read. All indices were checked by the caller. Every float of
//   scratch is written before it is read.
// Numerics: float32 accumulators; activations are rounded before each matrix as the format of the
//   weights wants (packed_dot.h). The order of each sum is fixed (packed_matmul.h, attend.h;
//   LayerNorm in lanes): a row's bits depend on its own sequence alone. erf by two polynomials
//   fitted to float64, absolute error < 2e-7.
// Shape of the code: one team of threads for the whole step, with a barrier after each phase: rows
//   (LayerNorm), panels of 64 outputs (matrices), heads of rows (attention). A thread that has made
//   some outputs does with them what concerns them alone: bias and GELU, the cache, rounding.
//   Weights are read once per call for all rows; 7 phases per layer.
// Ladder (336M, R = 1 / 8, one thread of a Zen 5, CPU time, ms a step: fp32, bf16, int8, int4):
//   float products of widened weights, a region per phase    38 / 88  23 / 90  15.5 / 50  12 / 37
//   dot.h on rounded activations, one team, panels of 16     35 / -   19 / -   10.5 / -   7.0 / -
//   panels of 64 rows: one stream                            34 / 75  17 / 33   9.4 / 21  5.8 / 15
//   weights in large pages, 8 rows asking for memory ahead   31 / 57  16 / 29   8.8 / 15  5.3 / 11
#include <cmath>

#include "half.h"
#include "kernel.h"
#include "team.h"

#define VQFAST_THIS_FILE "cpu/decode_step.cpp"
// clang-format off
#include "foreach_isa.h"
#include "simd.h"
#include "attend.h"
#include "dot.h"
#include "packed_dot.h"
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
  const float inverse = 1.0f / std::sqrt(variance + 1e-5f);
  for (int64_t i = 0; i < E; ++i) y[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
}

// ---- what becomes of the sums of a matrix product, 64 at a time
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
  int i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {  // independent, as one alone is a long chain
#pragma GCC unroll 4
    for (int j = i; j < i + 4 * kLanes; j += kLanes)
      store(y + j, gelu(load(v + j) + load(bias + j)));
  }
  for (; i < count; i += kLanes) {
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
  int64_t L, B, H, S, d, E, V, R, n_logits, Ep, Fp;
  // scratch: one row after another, ld floats apart
  int64_t ld;
  float *h, *normed, *attended, *hidden, *qkv;
  float *narrow, *wide;  // rounded: of width E and 4 E

  explicit Step(const Args& a) {
    token = a.t[0].as<int64_t>(), slot = a.t[1].as<int64_t>(), position = a.t[2].as<int64_t>();
    k_cache = a.t[3], v_cache = a.t[4];
    tok_emb = a.t[5].as<float>(), pos_emb = a.t[6].as<float>(), vectors = a.t[7].as<float>();
    weights = a.t[8].as<uint8_t>();
    logits = a.t[9].as<float>();
    L = k_cache.shape[0], B = k_cache.shape[1], H = k_cache.shape[2], S = k_cache.shape[3];
    d = k_cache.shape[4], E = H * d, V = a.t[5].shape[0], R = a.t[0].shape[0];
    n_logits = a.s[1].i;
    ld = a.t[10].shape[1];
    Ep = padded(E, kColumns), Fp = padded(4 * E, kColumns);
    h = a.t[10].as<float>();
    normed = h + Ep, attended = normed + Ep, narrow = attended + Ep;
    hidden = narrow + Ep, wide = hidden + Fp, qkv = wide + Fp;
  }
};

// what one thread does; kNative: see dot2
template <int kBits, bool kNative, class Cache>
class Worker {
 public:
  Worker(const Step& step, Team& team)
      : s(step), team_(team), vectors_(step.vectors), weights_(step.weights) {}

  void run() {
    const int64_t E = s.E, F = 4 * E, last = s.R - s.n_logits;
    team_.share(s.R, 1, [&](int64_t begin, int64_t end) { embed(begin, end); });
    for (int64_t layer = 0; layer < s.L; ++layer) {
      norm(0);
      multiply(3 * E, E, rounded(s.normed, s.narrow), 0, {s.qkv, s.ld, next(3 * E), put_biased},
               [&](int64_t begin, int64_t end) { append(layer, begin, end); });
      // rows without logits have given the last layer all that others need
      const int64_t first = layer < s.L - 1 ? 0 : last;
      attention(layer, first);
      multiply(E, E, rounded(s.attended, s.narrow), first, {s.h, s.ld, next(E), add_biased});
      norm(first);
      multiply(F, E, rounded(s.normed, s.narrow), first, {s.hidden, s.ld, next(F), put_gelu},
               [&](int64_t begin, int64_t end) {  // whole groups: the last one is padded by zeros
                 for (int64_t r = first; r < s.R; ++r) round(s.hidden, s.wide, s.Fp, r, begin, end);
               });
      multiply(E, F, rounded(s.hidden, s.wide), first, {s.h, s.ld, next(E), add_biased});
    }
    norm(last);
    multiply(s.V, E, rounded(s.normed, s.narrow), last,
             {s.logits - last * s.V, s.V, s.logits, put});  // no bias
  }

 private:
  const Step& s;
  Team& team_;
  const float* vectors_;
  const uint8_t* weights_;

  const float* next(int64_t n) {
    const float* v = vectors_;
    vectors_ += n;
    return v;
  }

  static float* rounded(float* values, float* operands) { return kBits == 32 ? values : operands; }

  // columns [begin, end) of row r, begin a multiple of a group, end one or the last column
  void round(const float* values, float* operands, int64_t Kp, int64_t r, int64_t begin,
             int64_t end) {
    round_operand<kBits>(values + r * s.ld, Kp, begin / kGroup, padded(end, kColumns) / kGroup,
                         operands + r * s.ld);
  }

  static void nothing(int64_t, int64_t) {}

  // the next packed matrix [N, K] times the rows from `first` on; then(begin, end) on what a thread
  // has made
  template <class Then = void (&)(int64_t, int64_t)>
  void multiply(int64_t N, int64_t K, const float* operands, int64_t first, Output to,
                Then&& then = nothing) {
    const Matrix m{weights_, N, K};
    to.y += first * to.ld;
    team_.share(padded(N, kPanel) / kPanel, 1, [&](int64_t begin, int64_t end) {
      matmul<kBits, kNative>(m, begin, end, operands + first * s.ld, s.ld, s.R - first, to);
      then(begin * kPanel, end * kPanel < N ? end * kPanel : N);
    });
    weights_ += matrix_bytes<kBits>(N, K);
  }

  void embed(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float *word = s.tok_emb + s.token[r] * s.E, *place = s.pos_emb + s.position[r] * s.E;
      float* row = s.h + r * s.ld;
      for (int64_t i = 0; i < s.E; ++i) row[i] = word[i] + place[i];
      for (int64_t i = s.E; i < s.Ep; ++i) s.normed[r * s.ld + i] = s.attended[r * s.ld + i] = 0;
      for (int64_t i = 4 * s.E; i < s.Fp; ++i) s.hidden[r * s.ld + i] = 0;
    }
  }

  // normed[r] = LN h[r], rounded, from row `first` on
  void norm(int64_t first) {
    const float *weight = next(s.E), *bias = next(s.E);
    team_.share(s.R - first, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = first + begin; r < first + end; ++r) {
        layer_norm(s.h + r * s.ld, weight, bias, s.E, s.normed + r * s.ld);
        round(s.normed, s.narrow, s.Ep, r, 0, s.E);
      }
    });
  }

  // outputs [begin, end) of qkv: scales those of q, puts those of k and v into the cache
  void append(int64_t layer, int64_t begin, int64_t end) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(s.d));
    for (int64_t r = 0; r < s.R; ++r) {
      float* row = s.qkv + r * s.ld;
      for (int64_t n = begin; n < end && n < s.E; ++n) row[n] *= scale;
      for (int64_t n = begin > s.E ? begin : s.E; n < end;) {  // a head at a time
        const View& cache = n < 2 * s.E ? s.k_cache : s.v_cache;
        const int64_t head = n % s.E / s.d, i = n % s.d;
        const int64_t rest = s.d - i < end - n ? s.d - i : end - n;
        Cache* to = cache.as<Cache>() + cache_at(layer, r, head) + s.position[r] * s.d + i;
        for (int64_t j = 0; j < rest; ++j) to[j] = from_float<Cache>(row[n + j]);
        n += rest;
      }
    }
  }

  int64_t cache_at(int64_t layer, int64_t r, int64_t head) const {
    return ((layer * s.B + s.slot[r]) * s.H + head) * s.S * s.d;
  }

  // attended, rounded, from row `first` on
  void attention(int64_t layer, int64_t first) {
    const bool whole = s.d % kGroup == 0 && s.E % kColumns == 0;  // heads are whole groups
    team_.share((s.R - first) * s.H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = first + i / s.H, head = i % s.H, at = cache_at(layer, r, head);
        attend(s.qkv + r * s.ld + head * s.d, s.k_cache.as<Cache>() + at,
               s.v_cache.as<Cache>() + at, s.position[r] + 1, s.d,
               s.attended + r * s.ld + head * s.d);
        if (whole) round_group(s.attended, r, head * s.d, (head + 1) * s.d);
      }
    });
    if (kBits == 32 || whole) return;
    team_.share(s.R - first, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = first + begin; r < first + end; ++r)
        round(s.attended, s.narrow, s.Ep, r, 0, s.E);
    });
  }

  void round_group(const float* values, int64_t r, int64_t begin, int64_t end) {
    round_operand<kBits>(values + r * s.ld, s.Ep, begin / kGroup, end / kGroup,
                         s.narrow + r * s.ld);
  }
};

template <int kBits, bool kNative>
void run_format(const Step& step, int threads) {
  run_team(threads, [&](Team& team) {
    if (step.k_cache.dtype == DType::f32)
      Worker<kBits, kNative, float>(step, team).run();
    else
      Worker<kBits, kNative, bf16>(step, team).run();
  });
}

void run(const Args& a) {
  const Step step(a);
  switch (a.s[0].i) {
    case 32:
      return run_format<32, false>(step, a.threads);
    case 16:
#if VQFAST_LANES == 16
      if (has_avx512_bf16()) return run_format<16, true>(step, a.threads);
#endif
      return run_format<16, false>(step, a.threads);
    case 8:
      return run_format<8, false>(step, a.threads);
    default:
      return run_format<4, false>(step, a.threads);
  }
}

}  // namespace

KERNEL(decode_step, "i64 i64 i64 f32|bf16 f32|bf16 f32 f32 f32 u8 -> f32 f32", run)

}  // namespace vqfast::VQFAST_ISA
