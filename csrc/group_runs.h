// How group_norm_silu and its backward pass go over x. No include guard: a kernel file includes it
// once per instruction set, after simd.h and group_layout.h.
//
// Contiguous, a unit of work is a (sample, group). Channels-last, a unit is a run of positions of
// all channels, with one accumulator per channel in L1; what the runs give is merged in order
// between two parallel passes. What a unit is depends on the shape alone: equal bits for any number
// of threads.

namespace vqfast::VQFAST_ISA {
namespace {

using group_norm::Shape;

constexpr int64_t kBlock = 4096;         // values summed in float32 before float64 takes over
constexpr int64_t kRunValues = 1 << 16;  // values of a channels-last run

// f(offset, width) for whole vectors and then the rest of [0, n)
template <class F>
VQFAST_INLINE void vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}

// weight or bias in float32
std::vector<float> widen(const View& v) {
  std::vector<float> out(v.numel());
  for (size_t i = 0; i < out.size(); ++i) {
    if (v.dtype == DType::f32) out[i] = v.as<float>()[i];
    if (v.dtype == DType::f16) out[i] = to_float(v.as<f16>()[i]);
    if (v.dtype == DType::bf16) out[i] = to_float(v.as<bf16>()[i]);
  }
  return out;
}

// Positions per run and runs per sample.
struct Runs {
  int64_t size, count;
  explicit Runs(const Shape& s)
      : size(std::max<int64_t>(1, kRunValues / s.C)), count((s.S + size - 1) / size) {}
};

// f(sample, run, first value, positions) for every run
template <class F>
void each_run(int threads, const Shape& s, const Runs& runs, F&& f) {
  parallel_for(threads, s.B * runs.count, 1, [&](int64_t from, int64_t to) {
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t sample = unit / runs.count, run = unit % runs.count;
      f(sample, run, (sample * s.S + run * runs.size) * s.C,
        std::min(runs.size, s.S - run * runs.size));
    }
  });
}

// f(channel, width, vectors) for all channels, kCount vectors at a time where there are so many
template <int kCount, class F>
VQFAST_INLINE void channel_blocks(int64_t C, F&& f) {
  int64_t c = 0;
  for (; c + kCount * kLanes <= C; c += kCount * kLanes)
    f(c, kLanes, std::integral_constant<int, kCount>());
  for (; c + kLanes <= C; c += kLanes) f(c, kLanes, std::integral_constant<int, 1>());
  if (c < C) f(c, static_cast<int>(C - c), std::integral_constant<int, 1>());
}

// One value per channel of what the groups of a sample share.
std::vector<float> spread(const float* of_group, const Shape& s) {
  std::vector<float> out(s.C);
  for (int64_t c = 0; c < s.C; ++c) out[c] = of_group[c / s.per()];
  return out;
}

}  // namespace
}  // namespace vqfast::VQFAST_ISA
