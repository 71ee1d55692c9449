// y[r] = W x[r] for a few rows r and a matrix W packed as vqfast/ops/_packed.py describes; for
// decode_step. No include guard: a kernel file includes it once per instruction set, after simd.h.
//
// Numerics: float32 accumulators. Each output is a sum of blocks of 32 columns, each summed in the
//   order of the columns by one chain of multiply-adds, times the scale of the block (int4), and
//   the whole times the scale of the row (int8). So no output depends on the number of rows, their
//   order, or the threads. Error at most about (32 + K / 32) eps times the sum of |w x|.
// Shape of the code: a panel of 16 outputs is read once from memory, column by column, and used for
//   all rows: up to 8 at a time with AVX-512, 4 else. With one row, 4 panels run side by side to
//   hide the latency of the multiply-add.

namespace vqfast::VQFAST_ISA {

constexpr int kPanel = 16, kColumns = 64, kGroup = 32;
constexpr int kParts = kPanel / kLanes;          // vectors of a panel's column
constexpr int kMostRows = kLanes == 16 ? 8 : 4;  // accumulators fit the registers
constexpr int kSideBySide = 4;                   // panels that one thread takes at a time

VQFAST_INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Matrix {  // [N, K], packed
  const uint8_t* data;
  int64_t N, K;
};

template <int kBits>
VQFAST_INLINE int64_t panel_bytes(int64_t K) {
  const int64_t Kp = padded(K, kColumns);
  const int64_t scales = kBits == 8 ? kPanel * 4 : kBits == 4 ? Kp / kGroup * kPanel * 2 : 0;
  return kPanel * Kp * kBits / 8 + scales;
}

template <int kBits>
int64_t matrix_bytes(int64_t N, int64_t K) {
  return padded(N, kPanel) / kPanel * panel_bytes<kBits>(K);
}

VQFAST_INLINE VF widen_i8(const uint8_t* p) {
#if VQFAST_LANES == 16
  return (VF)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif VQFAST_LANES == 8
  return (VF)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  VF v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<int8_t>(p[i]);
  return v;
#endif
}

// low and high nibbles less 8
VQFAST_INLINE void widen_nibbles(const uint8_t* p, VF& low, VF& high) {
#if VQFAST_LANES == 16
  const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  low = (VF)_mm512_permutexvar_ps(b, table);  // reads the low 4 bits of each index
  high = (VF)_mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), table);
#else
  VI b;
#if VQFAST_LANES == 8
  b = (VI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  for (int i = 0; i < kLanes; ++i) b[i] = p[i];
#endif
  low = __builtin_convertvector((b & 15) - 8, VF);
  high = __builtin_convertvector((b >> 4) - 8, VF);
#endif
}

// two neighbouring columns of a panel, from the start of the first
template <int kBits>
VQFAST_INLINE void two_columns(const uint8_t* p, VF* even, VF* odd) {
#pragma GCC unroll 4
  for (int j = 0; j < kParts; ++j) {
    const int lane = j * kLanes;
    if constexpr (kBits == 32) {
      even[j] = load((const float*)p + lane);
      odd[j] = load((const float*)p + kPanel + lane);
    } else if constexpr (kBits == 16) {
      even[j] = load((const bf16*)p + lane);
      odd[j] = load((const bf16*)p + kPanel + lane);
    } else if constexpr (kBits == 8) {
      even[j] = widen_i8(p + lane);
      odd[j] = widen_i8(p + kPanel + lane);
    } else {
      widen_nibbles(p + lane, even[j], odd[j]);
    }
  }
}

// kRows x kPanels tile: x [kRows, Kp] with row stride ldx; out [kPanels][kRows][16]
template <int kBits, int kRows, int kPanels>
void tile(const uint8_t* panel, int64_t Kp, int64_t bytes, const float* x, int64_t ldx,
          float* out) {
  constexpr int kHead = kBits == 8 ? kPanel * 4 : 0;    // before the columns of a panel
  constexpr int kScales = kBits == 4 ? kPanel * 2 : 0;  // before those of a group
  constexpr int kTwo = kPanel * kBits / 4;              // bytes of two columns
  constexpr int kGroupBytes = kScales + kTwo * kGroup / 2;
  VF total[kPanels][kRows][kParts] = {};
  for (int64_t g = 0; g < Kp / kGroup; ++g) {
    VF part[kPanels][kRows][kParts] = {};
    const float* xg = x + g * kGroup;
    const uint8_t* at = panel + kHead + g * kGroupBytes;
    for (int k = 0; k < kGroup; k += 2) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        VF even[kParts], odd[kParts];
        two_columns<kBits>(at + p * bytes + kScales + k / 2 * kTwo, even, odd);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const VF a = broadcast(xg[r * ldx + k]), b = broadcast(xg[r * ldx + k + 1]);
#pragma GCC unroll 4
          for (int j = 0; j < kParts; ++j)
            part[p][r][j] = fma(odd[j], b, fma(even[j], a, part[p][r][j]));
        }
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < kParts; ++j) {
          if constexpr (kBits == 4)
            total[p][r][j] = fma(part[p][r][j], load((const bf16*)(at + p * bytes) + j * kLanes),
                                 total[p][r][j]);
          else
            total[p][r][j] += part[p][r][j];
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kParts; ++j) {
        VF y = total[p][r][j];
        if constexpr (kBits == 8) y = y * load((const float*)(panel + p * bytes) + j * kLanes);
        store(out + (p * kRows + r) * kPanel + j * kLanes, y);
      }
    }
  }
}

// what becomes of 16 (at the edge: count) finished sums v
using Finish = void (*)(const float* v, const float* bias, float* y, int count);

struct Output {
  float* y;  // [R, N], rows ld apart
  int64_t ld;
  const float* bias;  // [N]
  Finish finish;
};

// kRows rows from r on, of `panels` panels from `first` on
template <int kBits, int kRows, int kPanels>
void tiles(const Matrix& m, int64_t first, int64_t panels, const float* x, int64_t ldx, int64_t r,
           const Output& to) {
  const int64_t Kp = padded(m.K, kColumns), bytes = panel_bytes<kBits>(m.K);
  float out[kPanels * kRows * kPanel];
  for (int64_t p = first; p + kPanels <= first + panels; p += kPanels) {
    tile<kBits, kRows, kPanels>(m.data + p * bytes, Kp, bytes, x + r * ldx, ldx, out);
    for (int i = 0; i < kPanels * kRows; ++i) {
      const int64_t n = (p + i / kRows) * kPanel;
      to.finish(out + i * kPanel, to.bias + n, to.y + (r + i % kRows) * to.ld + n,
                static_cast<int>(m.N - n < kPanel ? m.N - n : kPanel));
    }
  }
}

// x: R rows of Kp floats, the last Kp - K of them zero
template <int kBits>
void matmul(const Matrix& m, const float* x, int64_t ldx, int64_t R, int threads,
            const Output& to) {
  const int64_t all = padded(m.N, kPanel) / kPanel;
  parallel_for(threads, all, kSideBySide, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p += kSideBySide) {
      const int64_t panels = end - p < kSideBySide ? end - p : kSideBySide;
      const int64_t even = panels & ~int64_t{1};
      int64_t r = 0;
      for (; R - r >= kMostRows; r += kMostRows)
        tiles<kBits, kMostRows, 1>(m, p, panels, x, ldx, r, to);
      for (; R - r >= 4; r += 4) tiles<kBits, 4, 1>(m, p, panels, x, ldx, r, to);
      for (; R - r >= 2; r += 2) {
        tiles<kBits, 2, 2>(m, p, even, x, ldx, r, to);
        tiles<kBits, 2, 1>(m, p + even, panels - even, x, ldx, r, to);
      }
      for (; r < R; ++r) {
        if (panels == kSideBySide)
          tiles<kBits, 1, kSideBySide>(m, p, panels, x, ldx, r, to);
        else
          tiles<kBits, 1, 1>(m, p, panels, x, ldx, r, to);
      }
    }
  });
}

}  // namespace vqfast::VQFAST_ISA
