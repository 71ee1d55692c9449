// How many rows chose each code, and their sum.
//
// Computes: counts[k] = #{n : indices[n] = k},  sums[k][d] = sum of z[n][d] over those n.
// Contract: indices [N] int64, z [N, D], all contiguous. Indices outside 0..K-1 are left out.
// Numerics: float64 sums in ascending n, rounded once: the bits of the reference and of every other
//     backend. No atomics. Overflow only where the float64 sum itself overflows.
// Shape of the code: a block owns kCodes codes and up to 64 columns and keeps their sums in shared
//     memory (16 KiB). It scans all indices, kChunk at a time, and packs the hits, in order, into a
//     list; a thread owns one column of the codes whose number it has modulo the groups, and so
//     adds without locks. Reads 8 N bytes of indices per block, mostly from L2, and each row of z
//     once. No scratch memory, no allocation, no synchronisation with the host.
// Ladder: 1. this. A counting sort needs scratch memory; it wins once K / kCodes scans of the
//     indices cost more than one sort (estimate: N K > 10^11). Never run on hardware: see
//     `cuda_record` in vqfast/ops/code_stats.py.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "view.h"

namespace {

using vqfast::DType;
using vqfast::Scalar;
using vqfast::View;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kCodes = 32;
constexpr int kColumns = 64;
constexpr int kRounds = 8;  // indices a thread reads of each chunk
constexpr int kChunk = kThreads * kRounds;

__device__ double widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ double widen(__half x) { return __half2float(x); }
__device__ double widen(__nv_bfloat16 x) { return __bfloat162float(x); }

struct Hit {
  short row;   // within the chunk
  short code;  // within the block
};

// Packs the hits of one chunk into `list` in ascending n; returns how many. Every thread calls it.
__device__ int pack(const int64_t* indices, int64_t base, int64_t N, int64_t first, int (*count)[kWarps],
                    Hit* list) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int code[kRounds];
  unsigned mask[kRounds];
  bool any = false;
#pragma unroll
  for (int j = 0; j < kRounds; ++j) {
    const int64_t n = base + j * kThreads + threadIdx.x;
    const int64_t local = n < N ? indices[n] - first : -1;
    const bool hit = local >= 0 && local < kCodes;
    code[j] = hit ? static_cast<int>(local) : -1;
    mask[j] = __ballot_sync(0xffffffffu, hit);
    if (lane == 0) count[j][warp] = __popc(mask[j]);
    any |= hit;
  }
  if (!__syncthreads_or(any)) return 0;
  int total = 0;
#pragma unroll
  for (int j = 0; j < kRounds; ++j) {
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp && code[j] >= 0) {
        const int at = total + __popc(mask[j] & ((1u << lane) - 1));
        list[at] = {static_cast<short>(j * kThreads + threadIdx.x), static_cast<short>(code[j])};
      }
      total += count[j][w];
    }
  }
  __syncthreads();
  return total;
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads)
    stats(const int64_t* __restrict__ indices, const T* __restrict__ z, int64_t* __restrict__ counts,
          S* __restrict__ sums, int64_t N, int64_t K, int64_t D, int columns) {
  __shared__ double sum[kCodes * kColumns];
  __shared__ int64_t rows[kCodes];
  __shared__ Hit list[kChunk];
  __shared__ int count[kRounds][kWarps];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kCodes;
  const int groups = kThreads / columns;
  const int column = threadIdx.x % columns, group = threadIdx.x / columns;
  const int64_t d = static_cast<int64_t>(blockIdx.y) * columns + column;
  for (int i = threadIdx.x; i < kCodes * kColumns; i += kThreads) sum[i] = 0.0;
  if (threadIdx.x < kCodes) rows[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t base = 0; base < N; base += kChunk) {
    const int hits = pack(indices, base, N, first, count, list);
    for (int i = 0; i < hits; ++i) {
      const Hit hit = list[i];
      if (hit.code % groups != group) continue;
      if (d < D) sum[hit.code * columns + column] += widen(z[(base + hit.row) * D + d]);
      if (column == 0) ++rows[hit.code];
    }
    __syncthreads();  // the list and the counts are written again
  }
  for (int code = group; code < kCodes; code += groups) {
    const int64_t k = first + code;
    if (k >= K) break;
    if (d < D) sums[k * D + d] = static_cast<S>(sum[code * columns + column]);
    if (column == 0 && blockIdx.y == 0) counts[k] = rows[code];
  }
}

template <class T, class S>
int launch(const View* t, int64_t K, cudaStream_t stream) {
  const int64_t N = t[1].shape[0], D = t[1].shape[1];
  int columns = 1;
  while (columns < kColumns && columns < D) columns *= 2;
  const int64_t wide = (K + kCodes - 1) / kCodes, slabs = (D + columns - 1) / columns;
  if (K <= 0 || D <= 0) return cudaSuccess;
  if (wide > 0x7fffffff || slabs > 65535) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(wide), static_cast<unsigned>(slabs));
  stats<T, S><<<grid, kThreads, 0, stream>>>(t[0].as<int64_t>(), t[1].as<T>(), t[2].as<int64_t>(),
                                            t[3].as<S>(), N, K, D, columns);
  return cudaGetLastError();
}

}  // namespace

extern "C" {

extern const char* const vqfast_code_stats_signature;
const char* const vqfast_code_stats_signature = "i64 f32|f16|bf16|f64 -> i64 f32|f64";

// t: indices, z, counts, sums; s: K. Returns a cudaError_t.
int vqfast_code_stats(const View* t, int, const Scalar* s, int, void* stream) {
  const cudaStream_t at = static_cast<cudaStream_t>(stream);
  switch (t[1].dtype) {
    case DType::f32:
      return launch<float, float>(t, s[0].i, at);
    case DType::f16:
      return launch<__half, float>(t, s[0].i, at);
    case DType::bf16:
      return launch<__nv_bfloat16, float>(t, s[0].i, at);
    case DType::f64:
      return launch<double, double>(t, s[0].i, at);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // extern "C"
