// Computes: out_i = sum_{j<=i} softmax_j(scale <q_i, k_j>) v_j and lse_i = log sum_{j<=i} exp(scale
//   <q_i, k_j>) for q, k, v [B, H, T, d], d <= 256, out like q and contiguous, lse [B, H, T]
//   float32.
// Contract: any strides of q, k, v. Keys and values after row i are not used for it, whatever they
//   hold. A row whose scores are all -inf gives zeros and lse = +inf. NaN among what a row sees
//   gives NaN.
// Numerics: float32 throughout, also for half-precision inputs; scale is multiplied into q. Scores
//   are sums over d in pieces of 32; the output adds blocks of kBlock keys, so its error grows with
//   kBlock + T / kBlock. exp has 2 ulp. No overflow below the range of float32: the running maximum
//   is taken out of every exponent.
// Shape of the code: a unit of work is a (batch, head) and at most kChunk rows. For each block of
//   keys it packs K transposed and V in rows (L2), then for each tile of 6 rows: a strip of scores
//   [6][block] in L1, exact maximum and exponentials along the strip, strip times V into the
//   chunk's output. Packing costs two vector moves per kChunk rows and element. The order of work
//   inside a row depends on T and d alone: equal bits for any number of threads.
// Ladder: none measured yet.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernel.h"
#include "parallel.h"

#ifndef VQFAST_ISA
namespace vqfast {
namespace {
const char* why_not(const Args& a) {
  return a.t[0].shape[3] > 256 ? "head dimension above 256" : nullptr;
}
}  // namespace
REFUSES(causal_attention, why_not)
}  // namespace vqfast
#endif

#define VQFAST_THIS_FILE "cpu/causal_attention.cpp"
#include "foreach_isa.h"
#include "tiled_attention.h"

namespace vqfast::VQFAST_ISA {
namespace {

using namespace attention;

constexpr int kChunk = 132;  // rows of a unit of work
constexpr float kInf = std::numeric_limits<float>::infinity();

// Memory of one thread.
struct Scratch {
  int ld;     // d in whole vectors
  int block;  // keys at a time, a multiple of kRows and of kLanes
  std::vector<float> q, k, v, strip, sum, top, total;
  explicit Scratch(int d)
      : ld(round_up(d, kLanes)),
        block(d <= 128 ? 384 : 192),
        q(kChunk * ld),
        k(ld * block),
        v(block * ld),
        strip(kRows * block),
        sum(kChunk * ld),
        top(kChunk),
        total(kChunk) {}
};

// Scores of one row to weights relative to the running maximum; columns from n on are not looked
// at. Returns what the row's earlier sums have to be multiplied with.
float soften(float* row, int n, float& top, float& total) {
  const int whole = n / kLanes * kLanes, rest = n - whole;
  VI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const VI inside = lane < rest;
  VF most = broadcast(top);
  for (int j = 0; j < whole; j += kLanes)
    most = vmax(load(row + j), most);  // NaN is passed over here
  if (rest) most = vmax(inside ? load(row + whole) : most, most);
  const float before = top;
  top = reduce_max(most);
  const float shift = top == -kInf ? 0.0f : top;
  VF sum{};
  for (int j = 0; j < whole; j += kLanes) {
    const VF p = exp_nonpositive(load(row + j) - shift);
    store(row + j, p);
    sum += p;
  }
  if (rest) {
    VF p = exp_nonpositive(load(row + whole) - shift);
    p = inside ? p : VF{};
    store(row + whole, p);
    sum += p;
  }
  const float keep = exp_nonpositive(broadcast(before - shift))[0];
  total = total * keep + reduce_add(sum);
  return keep;
}

// Tile of kRows rows from `at` in the chunk, against packed keys; `past` of them are before the
// tile's first row.
template <Steps S>
void attend(Scratch& s, int d, int at, int past) {
  const int width = S == Steps::kFirst ? past + kRows : past;
  const int columns = round_up(width, kLanes);
  float* strip = s.strip.data();
  dot_products(s.q.data() + at * s.ld, s.ld, s.k.data(), s.block, d, strip, s.block, columns);
  for (int r = 0; r < kRows; ++r) {
    const int seen = S == Steps::kFirst ? past + r + 1 : past;
    const float keep = soften(strip + r * s.block, seen, s.top[at + r], s.total[at + r]);
    if (keep == 1.0f) continue;
    float* sum = s.sum.data() + (at + r) * s.ld;
    for (int t = 0; t < s.ld; t += kLanes) store(sum + t, load(sum + t) * keep);
  }
  product<Walk::kAlongRow, S>(strip, s.block, s.v.data(), s.ld, past, s.sum.data() + at * s.ld,
                              s.ld, s.ld);
}

// Rows [begin, end) of one head; begin is a multiple of kRows.
void run_chunk(const Head& q, const Head& k, const Head& v, float scale, int64_t begin, int64_t end,
               Scratch& s) {
  const int64_t rows = end - begin, padded = round_up<int64_t>(rows, kRows);
  pack_rows(q, begin, rows, padded, scale, s.q.data(), s.ld);
  std::fill(s.sum.begin(), s.sum.end(), 0.0f);
  std::fill(s.top.begin(), s.top.end(), -kInf);
  std::fill(s.total.begin(), s.total.end(), 0.0f);
  for (int64_t first = 0; first < end; first += s.block) {
    const int64_t n = std::min<int64_t>(s.block, end - first), whole = round_up<int64_t>(n, kRows);
    pack_transposed(k, first, n, round_up<int64_t>(whole, kLanes), s.k.data(), s.block);
    pack_rows(v, first, n, whole, 1.0f, s.v.data(), s.ld);
    for (int64_t at = 0; at < padded; at += kRows) {
      const int64_t past = begin + at - first;  // keys of the block before the tile
      if (past >= s.block)
        attend<Steps::kAll>(s, q.d, static_cast<int>(at), s.block);
      else if (past >= 0)
        attend<Steps::kFirst>(s, q.d, static_cast<int>(at), static_cast<int>(past));
    }
  }
}

void run(const Args& a) {
  const View &q = a.t[0], &k = a.t[1], &v = a.t[2], &out = a.t[3], &lse = a.t[4];
  const float scale = static_cast<float>(a.s[0].f);
  const int64_t H = q.shape[1], T = q.shape[2], d = q.shape[3];
  if (q.numel() == 0) return;
  const int64_t parts = (T + kChunk - 1) / kChunk;
  const int64_t chunk = round_up<int64_t>((T + parts - 1) / parts, kRows);
  const int64_t chunks = (T + chunk - 1) / chunk;
  parallel_for(a.threads, q.shape[0] * H * chunks, 1, [&](int64_t from, int64_t to) {
    Scratch s(static_cast<int>(d));
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t head = unit / chunks, b = head / H, h = head % H;
      const int64_t begin = fold(unit % chunks, chunks) * chunk, end = std::min(T, begin + chunk);
      run_chunk(head_of(q, b, h), head_of(k, b, h), head_of(v, b, h), scale, begin, end, s);
      for (int64_t i = 0; i < end - begin; ++i) {
        const bool none = s.top[i] == -kInf && s.total[i] == 0.0f;
        const int64_t row = head * T + begin + i;
        write_row(out, row, s.sum.data() + i * s.ld, none ? 1.0f : s.total[i]);
        const double log_sum = std::log(static_cast<double>(s.total[i])) + s.top[i];
        lse.as<float>()[row] = none ? kInf : static_cast<float>(log_sum);
      }
    }
  });
}

}  // namespace

KERNEL(causal_attention, "f32|f16|bf16~ f32|f16|bf16~ f32|f16|bf16~ -> f32|f16|bf16 f32", run)

}  // namespace vqfast::VQFAST_ISA
