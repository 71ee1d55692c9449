// y[r] = W x[r] for some rows r and a matrix W packed as vqfast/ops/_packed.py describes; for
// decode_step. No include guard: a kernel file includes it once per instruction set, after dot.h
// and packed_dot.h.
//
// Numerics: each output is a sum of blocks of 32 columns, each summed in the order of the columns
//   by one chain of float32 multiply-adds (exactly in int32 for bits 8 and 4), times the scales of
//   the block, and the whole times the scale of the row (bits 8). So no output depends on the
//   number of rows, their order, or the threads. Error of float32 at most about (32 + K / 32) eps
//   times the sum of |w x|.
// Shape of the code: a panel of 64 outputs is read once from memory, as one stream, and used for
//   all rows. Up to 4 rows take all 4 slices of 16 outputs, 8 rows (AVX-512) 2 at a time: 16
//   accumulators, so that a broadcast activation serves several products. Those go twice over a
//   block of 8 groups of columns and so do not look like a stream to the prefetcher of the CPU:
//   they ask for memory ahead. CPU time of a step, 336M, 8 rows, one thread of a Zen 5, ms, int4 /
//   int8 / bf16 / fp32: twice over a whole panel 15 / 21 / 33 / 75, over blocks 25 / 25 / 36 / 67,
//   and with the asking 11 / 15 / 29 / 57.

namespace vqfast::VQFAST_ISA {

constexpr int kMostRows = kLanes == 16 ? 8 : 4;  // rows of a tile
constexpr int kBlock = 8;                        // groups of columns
constexpr int kAhead = 8192;                     // bytes

struct Matrix {  // [N, K], packed
  const uint8_t* data;
  int64_t N, K;
};

// bytes of 32 columns of a panel, with the scales that stand before them
template <int kBits>
constexpr int group_bytes() {
  return kPanel * kGroup * kBits / 8 + (kBits == 4 ? kPanel * 2 : 0);
}

template <int kBits>
constexpr int head_bytes() {  // before the columns of a panel: scales of its rows
  return kBits == 8 ? kPanel * 4 : 0;
}

template <int kBits>
VQFAST_INLINE int64_t panel_bytes(int64_t K) {
  return head_bytes<kBits>() + padded(K, kColumns) / kGroup * group_bytes<kBits>();
}

template <int kBits>
int64_t matrix_bytes(int64_t N, int64_t K) {
  return padded(N, kPanel) / kPanel * panel_bytes<kBits>(K);
}

// what kRows x kSlices x 16 outputs take from 32 columns; W: the first slice of the first column of
// the group, after its scales
template <int kBits, bool kNative, int kRows, int kSlices>
VQFAST_INLINE void add_group(const uint8_t* W, const Operand* x, int64_t g,
                             VF (&sum)[kSlices][kRows][kParts]) {
  if constexpr (kBits == 32) {
#pragma GCC unroll 4
    for (int k = 0; k < kGroup; ++k) {
      VF w[kSlices][kParts];
#pragma GCC unroll 4
      for (int p = 0; p < kSlices; ++p)
#pragma GCC unroll 4
        for (int j = 0; j < kParts; ++j)
          w[p][j] = load((const float*)W + k * kPanel + p * kSlice + j * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const VF a = broadcast(((const float*)x[r].values)[g * kGroup + k]);
#pragma GCC unroll 4
        for (int p = 0; p < kSlices; ++p)
#pragma GCC unroll 4
          for (int j = 0; j < kParts; ++j) sum[p][r][j] = fma(w[p][j], a, sum[p][r][j]);
      }
    }
  } else if constexpr (kBits == 16) {
#pragma GCC unroll 4
    for (int k = 0; k < kGroup / 2; ++k) {
      VI w[kSlices][kParts];
#pragma GCC unroll 4
      for (int p = 0; p < kSlices; ++p)
#pragma GCC unroll 4
        for (int j = 0; j < kParts; ++j)
          w[p][j] = load_int(W + (k * kPanel + p * kSlice + j * kLanes) * 4);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const VI a = every_lane((const bf16*)x[r].values + g * kGroup + 2 * k);
#pragma GCC unroll 4
        for (int p = 0; p < kSlices; ++p)
#pragma GCC unroll 4
          for (int j = 0; j < kParts; ++j) sum[p][r][j] = dot2<kNative>(sum[p][r][j], w[p][j], a);
      }
    }
  } else {
    VI total[kSlices][kRows][kParts];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < kSlices; ++p)
#pragma GCC unroll 4
        for (int j = 0; j < kParts; ++j) total[p][r][j] = broadcast_int(x[r].offset[g]);
    constexpr int kQuads = kBits == 8 ? 1 : 2;  // quads of columns in one load
#pragma GCC unroll 8
    for (int v = 0; v < kGroup / 4 / kQuads; ++v) {
      VI w[kQuads][kSlices][kParts];
#pragma GCC unroll 4
      for (int p = 0; p < kSlices; ++p) {
#pragma GCC unroll 4
        for (int j = 0; j < kParts; ++j) {
          const VI packed = load_int(W + (v * kPanel + p * kSlice + j * kLanes) * 4);
          if constexpr (kBits == 8) {
            w[0][p][j] = packed;
          } else {
            w[0][p][j] = packed & 0x0F0F0F0F;
            w[1][p][j] = packed >> 4 & 0x0F0F0F0F;
          }
        }
      }
#pragma GCC unroll 2
      for (int q = 0; q < kQuads; ++q) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const VI a = every_lane((const int8_t*)x[r].values + g * kGroup + (v * kQuads + q) * 4);
#pragma GCC unroll 4
          for (int p = 0; p < kSlices; ++p)
#pragma GCC unroll 4
            for (int j = 0; j < kParts; ++j) total[p][r][j] = dot4(total[p][r][j], w[q][p][j], a);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < kSlices; ++p)
#pragma GCC unroll 4
        for (int j = 0; j < kParts; ++j) sum[p][r][j] = __builtin_convertvector(total[p][r][j], VF);
  }
}

// slices [slice, slice + kSlices) of the groups [begin, end): out [kRows][64] +=, or = for begin 0;
// asks for the memory of all slices kAhead bytes further on, if it is new
template <int kBits, bool kNative, int kRows, int kSlices>
VQFAST_INLINE void add_groups(const uint8_t* panel, int slice, int64_t begin, int64_t end,
                              const Operand* x, bool is_new, float* out) {
  constexpr int kScales = kBits == 4 ? kPanel * 2 : 0;
  constexpr int kBytes = group_bytes<kBits>();
  VF total[kSlices][kRows][kParts];
#pragma GCC unroll 4
  for (int p = 0; p < kSlices; ++p)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < kParts; ++j)
        total[p][r][j] = begin ? load(out + r * kPanel + (slice + p) * kSlice + j * kLanes) : VF{};
  for (int64_t g = begin; g < end; ++g) {
    const uint8_t* at = panel + head_bytes<kBits>() + g * kBytes;
    if (is_new)
      for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(at + kAhead + line);
    VF sum[kSlices][kRows][kParts] = {};
    // all formats have 4 bytes for a row of the columns that stand together
    add_group<kBits, kNative, kRows, kSlices>(at + kScales + slice * kSlice * 4, x, g, sum);
#pragma GCC unroll 4
    for (int p = 0; p < kSlices; ++p) {
#pragma GCC unroll 4
      for (int j = 0; j < kParts; ++j) {
        VF scale{};
        if constexpr (kBits == 4) scale = load((const bf16*)at + (slice + p) * kSlice + j * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          VF& t = total[p][r][j];
          if constexpr (kBits >= 16)
            t += sum[p][r][j];
          else if constexpr (kBits == 8)
            t = fma(sum[p][r][j], broadcast(x[r].scale[g]), t);
          else
            t = fma(sum[p][r][j], scale * x[r].scale[g], t);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kSlices; ++p)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < kParts; ++j)
        store(out + r * kPanel + (slice + p) * kSlice + j * kLanes, total[p][r][j]);
}

// a panel times x [kRows] -> out [kRows][64], kSlices at a time; where that is not all of them,
// kBlock groups, so that both passes over a block find it in the cache
template <int kBits, bool kNative, int kRows, int kSlices>
void tile(const uint8_t* panel, int64_t Kp, const Operand* x, bool is_new, float* out) {
  constexpr int kAll = kPanel / kSlice;
  const int64_t groups = Kp / kGroup, step = kSlices == kAll ? groups : kBlock;
  for (int64_t begin = 0; begin < groups; begin += step)
    for (int slice = 0; slice < kAll; slice += kSlices)
      add_groups<kBits, kNative, kRows, kSlices>(panel, slice, begin,
                                                 begin + step < groups ? begin + step : groups, x,
                                                 is_new && kSlices < kAll && slice == 0, out);
  if constexpr (kBits == 8) {
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kPanel; i += kLanes)
        store(out + r * kPanel + i, load(out + r * kPanel + i) * load((const float*)panel + i));
  }
}

// what becomes of 64 (at the edge: count) finished sums v
using Finish = void (*)(const float* v, const float* bias, float* y, int count);

struct Output {
  float* y;  // [R, N], rows ld apart
  int64_t ld;
  const float* bias;  // [N]
  Finish finish;
};

// one panel, from output n on, times kRows operands, the rows r.. of the result
template <int kBits, bool kNative, int kRows, int kSlices>
void finished_tile(const uint8_t* panel, int64_t n, const Matrix& m, const Operand* x, int64_t r,
                   const Output& to) {
  float out[kRows * kPanel];
  tile<kBits, kNative, kRows, kSlices>(panel, padded(m.K, kColumns), x, r == 0, out);
  const int count = static_cast<int>(m.N - n < kPanel ? m.N - n : kPanel);
  for (int i = 0; i < kRows; ++i)
    to.finish(out + i * kPanel, to.bias + n, to.y + (r + i) * to.ld + n, count);
}

// the panels [begin, end) of m times R operands, rows `ld` floats apart
template <int kBits, bool kNative>
void matmul(const Matrix& m, int64_t begin, int64_t end, const float* operands, int64_t ld,
            int64_t R, const Output& to) {
  constexpr bool kWide = kLanes == 16;
  const int64_t Kp = padded(m.K, kColumns), bytes = panel_bytes<kBits>(m.K);
  for (int64_t p = begin; p < end; ++p) {
    const uint8_t* at = m.data + p * bytes;
    const int64_t n = p * kPanel;
    Operand x[kMostRows];
    for (int64_t r = 0; r < R;) {
      const int rows = R - r >= kMostRows ? kMostRows : R - r >= 4 ? 4 : R - r >= 2 ? 2 : 1;
      for (int i = 0; i < rows; ++i) x[i] = operand_at<kBits>(operands + (r + i) * ld, Kp);
      if (rows == 8)
        finished_tile<kBits, kNative, kMostRows, 2>(at, n, m, x, r, to);
      else if (rows == 4)
        finished_tile<kBits, kNative, 4, kWide ? 4 : 1>(at, n, m, x, r, to);
      else if (rows == 2)
        finished_tile<kBits, kNative, 2, kWide ? 4 : 2>(at, n, m, x, r, to);
      else
        finished_tile<kBits, kNative, 1, 4>(at, n, m, x, r, to);
      r += rows;
    }
  }
}

}  // namespace vqfast::VQFAST_ISA
