// The screen in integers: half the score of every code up to a proved error, as minima of groups.
//
// Included once per instruction set that multiplies small integers faster than floats by
// nearest.cpp, inside namespace vqfast::VQFAST_ISA, so it has no include guard: int8 with
// vpdpbusd (four times the products of float32), int16 with vpmaddwd on AVX2 (twice). AVX-512
// without VNNI gains nothing from vpmaddwd, as it adds on the same ports.
//
// About the centre m (dot: m = 0 and no norm), a = z - m and b_k = c_k - m give
//     t_k = |b_k|^2 / 2 - a.b_k,
// which orders codes as |z - c_k|^2 does. Four rows that share a scale u are rounded to aq = u A, a
// tile of codes to bq = s B, with integers A and B of at most kLevels, and the screen computes
//     (h_k - A.B_k) in units of u s,    h_k = round(|b_k|^2 / 2 / (u s)),
// exactly in int32. Half of score64 differs from it, up to a constant of the row, by
//     E = |a - aq| |b| + |aq| |b - bq|     Cauchy-Schwarz, residuals as measured
//       + u s                              rounding of h_k, and half a unit to spare
//       + (D+24) 2^-24 (|a||b| + |b|^2/2)  a, b, |b|^2, units and the sums of this bound are
//       float32
//       + (D+8) 2^-52 (|a|^2 + |b|^2)      rounding of score64 itself
// at most; |b| and |b - bq| are the largest of the tile. The measured residuals carry 2^-22 of the
// vector's length for its own rounding, and 2^-56 for squares that underflow. |A.B| stays below
// 2^29: by D <= 16384 for int8, by |A| and |B| <= 23000 for int16. h_k is cut at 2^30: a tile whose
// minimum passes 2^29 gives no upper bound. Books whose coordinates are not within 2^-30 .. 2^40
// are left to the float32 screen, rows beyond 2^40 are not screened.
//
// Shape of the code: rows are broadcast from L1, 4 rows x kColumns vectors of codes in registers;
// two vpdpbusd a cycle on Zen 5. Bytes of codes are unsigned (B + 128; the row gets 128 sum(A)
// back). Lane l of a tile holds V consecutive codes, so the minimum of a group needs no shuffle.
// Rows of a block are taken in order of their largest coordinate, so that rows that share a scale
// are of about one size.

struct IntScreen {
#ifdef VQFAST_VNNI
  typedef int8_t Level;
  static constexpr int kLevels = 127, kOffset = 128, kColumns = 4;
  static constexpr float kLength = 0x1p30f;  // of A and B in levels: no limit
#else
  typedef int16_t Level;
  static constexpr int kLevels = 16383, kOffset = 0, kColumns = 2;
  static constexpr float kLength = 23000.0f;
#endif
  static constexpr int kPart = 4 / sizeof(Level);  // coordinates of a dword
  static constexpr int64_t kRowUnit = 4;
  static constexpr int64_t kMaxRun = 262144;
  static constexpr int64_t kMaxD = 16384;               // sums stay below 2^29
  static constexpr int64_t kMinima = int64_t{1} << 20;  // bytes of a block
  static constexpr int32_t kFar = 1 << 29;  // minima above it are of codes that were cut
  static constexpr float kWild = 0x1p40f, kLeast = 0x1p-30f, kFloor = 0x1p-50f;

  const Book* book;
  int64_t first, count, tiles;
  int64_t depth, width;     // D up to whole dwords, and up to whole vectors
  int V;                    // codes per group, vectors per tile
  Aligned<int32_t> packed;  // [tiles][V / kColumns][depth / kPart][kColumns][kLanes]
  Aligned<float> half;      // [tiles][V][kLanes]: |b|^2/2, infinity where no code is
  std::vector<float> unit, reach, lost, top;  // [tiles]: s, |b|, |b - bq|, largest coordinate

  struct Found {
    float lower;  // t - E
    int32_t at;   // first code of the group, in the run
  };

  struct Rows {
    std::vector<float> a;                                     // [rows, width]
    std::vector<float> top, square, length, residual, scale;  // [rows] max |a|, |a|^2, |a|,
                                                              // |a - aq|, u
    std::vector<int32_t> offset, minima;  // [rows] kOffset sum(A); [rows, tiles, kLanes]
    std::vector<Level> A;                 // [rows, depth], of -a, in the order of `order`
    std::vector<int> order, place;        // row at a place, place of a row
    std::vector<Found> found;             // groups of the row at hand
    std::vector<float> error, step;       // [tiles] of the row at hand: E and u s
  };

  static int64_t run_codes(const Book& b) {
    const int64_t unit = kLanes * 32, bytes = int64_t{32} << 20;
    return std::max(unit, std::min(kMaxRun, bytes / int64_t(b.D * sizeof(Level))) / unit * unit);
  }

  // of the minima of a row; an odd number of cache lines, as rows a power of two apart share sets
  int64_t stride() const { return (tiles | 1) * kLanes; }

  int64_t tile_codes() const { return static_cast<int64_t>(kLanes) * V; }

  // b = c - m in float32 (zeros behind D), its largest coordinate and its squared length
  static void centred(const Book& b, const float* c, double norm, float* out, int64_t width,
                      float& top, float& square) {
    const int64_t D = b.D;
    VF high = {}, sum = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, D - i));
      if (b.metric == kCosine) {
        for (int j = 0; j < kLanes; ++j) {
          out[i + j] = j < n ? static_cast<float>(c[i + j] / norm - b.centre[i + j]) : 0.0f;
        }
      } else {
        store(out + i, load_n(c + i, n) - load_n(b.centre.data() + i, n));
      }
      const VF v = load(out + i);
      high = larger(high, (VF)((VI)v & 0x7FFFFFFF));
      sum = fma(v, v, sum);
    }
    top = reduce_max(high);
    square = reduce_add(sum);
  }

  // the step at which a vector, or several of at most this size, has levels within the limits
  static float step_for(float top, float length) {
    return std::max(std::max(top / kLevels, length / kLength), kFloor / kLevels);
  }

  static VQFAST_INLINE VI round_int(VF x) {
#if VQFAST_LANES == 16
    return (VI)_mm512_cvtps_epi32((__m512)x);
#else
    return (VI)_mm256_cvtps_epi32((__m256)x);
#endif
  }
  static VQFAST_INLINE VF as_float(VI x) { return __builtin_convertvector(x, VF); }
  static VQFAST_INLINE VI least(VI a, VI b) {
#if VQFAST_LANES == 16
    return (VI)_mm512_min_epi32((__m512i)a, (__m512i)b);
#else
    return (VI)_mm256_min_epi32((__m256i)a, (__m256i)b);
#endif
  }
  static VQFAST_INLINE VI load_int(const int32_t* p) {
    VI v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static VQFAST_INLINE void store_int(int32_t* p, VI v) { __builtin_memcpy(p, &v, sizeof v); }

  static VQFAST_INLINE void store_levels(Level* out, VI q, int n) {
#ifdef VQFAST_VNNI
    const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1u);
    _mm512_mask_cvtepi32_storeu_epi8(out, mask, (__m512i)q);
#else
    for (int j = 0; j < n; ++j) out[j] = static_cast<Level>(q[j]);
#endif
  }

  // round(a / step) at `out`, of codes with the offset, of rows negated; the squared residual
  template <bool kCode>
  static float quantise(const float* a, int64_t width, int64_t depth, float step, Level* out,
                        int32_t* total) {
    const VF inverse = broadcast(1.0f / step), size = broadcast(-step);
    VF lost = {};
    VI sum = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      const VF x = load(a + i);
      const VI q = round_int(x * inverse);
      const VF r = fma(as_float(q), size, x);
      lost = fma(r, r, lost);
      sum += q;
      const int n = static_cast<int>(std::min<int64_t>(kLanes, depth - i));
      store_levels(out + i, kCode ? q + kOffset : -q, n);
    }
    int32_t all = 0;
    for (int l = 0; l < kLanes; ++l) all += sum[l];
    if (total) *total = all;
    return reduce_add(lost);
  }

  // what `sqrt(squared residual)` may miss of the distance to the true vector of this length
  static float residual_bound(float squared, float length, bool cosine) {
    return std::sqrt(squared) * (1.0f + 0x1p-12f) + 0x1p-22f * length + 0x1p-56f +
           (cosine ? 0x1p-22f : 0.0f);
  }

  struct Scratch {
    Aligned<float> b;       // [tile_codes, width]
    Aligned<Level> levels;  // [tile_codes, depth]
  };

  void pack_tile(Book& book, int64_t t, Scratch& w) {
    const int64_t size = tile_codes(), begin = t * size;
    float most = 0.0f, longest = 0.0f, lost_most = 0.0f;
    float* halves = half.get() + t * size;
    for (int64_t j = 0; j < size; ++j) {
      const int64_t k = first + begin + j;
      float& h = halves[j % V * kLanes + j / V];
      h = std::numeric_limits<float>::infinity();
      float* b = w.b.get() + j * width;
      const float* c = book.codes + k * book.D;
      bool sound = begin + j < count;
      if (sound) {
        sound = all_finite(c, book.D);
        book.skip[k] = !sound;
      }
      if (!sound) {
        std::fill(b, b + width, 0.0f);
        continue;
      }
      book.hash[k] = hash_of(c, book.weight.data(), book.D);
      const double norm = book.metric == kCosine ? length64(c, book.D) : 0.0;
      float high, square;
      centred(book, c, norm, b, width, high, square);
      h = book.metric == kDot ? 0.0f : 0.5f * square;
      most = std::max(most, high);
      longest = std::max(longest, square);
    }
    const float length = std::sqrt(longest) * (1.0f + 0x1p-12f);
    const float step = step_for(most, length);
    for (int64_t j = 0; j < size; ++j) {
      const float squared = quantise<true>(w.b.get() + j * width, width, depth, step,
                                           w.levels.get() + j * depth, nullptr);
      lost_most = std::max(lost_most, squared);
    }
    // dwords of a code go to one lane; see `packed`
    const int64_t steps = depth / kPart;
    for (int64_t block = 0; block < V / kColumns; ++block) {
      int32_t* out = packed.get() + (t * V + block * kColumns) * kLanes * steps;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        for (int64_t v = 0; v < kColumns; ++v) {
          const Level* from = w.levels.get() + (lane * V + block * kColumns + v) * depth;
          int32_t* to = out + v * kLanes + lane;
          for (int64_t d = 0; d < steps; ++d) {
            std::memcpy(to + d * kColumns * kLanes, from + d * kPart, 4);
          }
        }
      }
    }
    unit[t] = step;
    reach[t] = length;
    lost[t] = residual_bound(lost_most, length, book.metric == kCosine);
    top[t] = most;
  }

  void pack(Book& b, int64_t from, int64_t codes_of_run, int threads) {
    book = &b;
    first = from;
    count = codes_of_run;
    depth = (b.D + kPart - 1) / kPart * kPart;
    width = (b.D + kLanes - 1) / kLanes * kLanes;
    V = b.D >= 24 ? 8 : 16;
    if (count > 65536) V = 32;
    while (V > 4 && tile_codes() / 2 >= count) V /= 2;
    tiles = (count + tile_codes() - 1) / tile_codes();
    packed = aligned<int32_t>(tiles * tile_codes() * depth / kPart);
    half = aligned<float>(tiles * tile_codes());
    for (auto* of : {&unit, &reach, &lost, &top})
      of->resize((tiles + kLanes - 1) / kLanes * kLanes);
    parallel_for(threads, tiles, 1, [&](int64_t begin, int64_t end) {
      Scratch w{aligned<float>(tile_codes() * width), aligned<Level>(tile_codes() * depth)};
      for (int64_t t = begin; t < end; ++t) pack_tile(b, t, w);
    });
    skip_repeated(b, first, count, [&](int64_t k) {
      const int64_t at = k - first, t = at / tile_codes(), j = at % tile_codes();
      half[t * tile_codes() + j % V * kLanes + j / V] = std::numeric_limits<float>::infinity();
    });
  }

  // whether the codes are of a size that the bound above allows
  bool fits() const {
    const float most = *std::max_element(top.begin(), top.end());
    return most >= kLeast && most <= kWild && book->D <= kMaxD;
  }

  int64_t block_rows(int64_t N, int threads) const {
    int64_t rows = std::min<int64_t>(96, 65536 / width);
    rows = std::min(rows, kMinima / (stride() * 4));
    rows = std::min(rows, (N + threads - 1) / threads);
    return std::max<int64_t>(1, (rows + kRowUnit - 1) / kRowUnit) * kRowUnit;
  }

  void reserve(Rows& w, int64_t rows) const {
    w.a.resize(rows * width);
    for (auto* of : {&w.top, &w.square, &w.length, &w.residual, &w.scale}) of->resize(rows);
    w.offset.resize(rows);
    w.minima.resize(rows * stride());
    w.A.resize(rows * depth);
    w.order.resize(rows);
    w.place.resize(rows);
    w.error.resize(unit.size());
    w.step.resize(unit.size());
  }

  // x [rows, D]; norms [rows], negative where the row is not finite
  void screen(const float* x, const double* norms, int64_t rows, Rows& w) const {
    const int64_t padded = (rows + kRowUnit - 1) / kRowUnit * kRowUnit;
    const bool cosine = book->metric == kCosine;
    for (int64_t r = 0; r < padded; ++r) {
      float* a = w.a.data() + r * width;
      w.order[r] = static_cast<int>(r);
      w.top[r] = 0.0f;
      if (r < rows && norms[r] >= 0.0) {
        centred(*book, x + r * book->D, norms[r], a, width, w.top[r], w.square[r]);
        w.length[r] = std::sqrt(w.square[r]) * (1.0f + 0x1p-12f);
        if (!(w.top[r] <= kWild)) w.length[r] = std::numeric_limits<float>::infinity();
      }
      if (r >= rows || norms[r] < 0.0 || !(w.top[r] <= kWild)) {
        std::fill(a, a + width, 0.0f);
        w.top[r] = 0.0f;
      }
    }
    std::sort(w.order.begin(), w.order.begin() + padded,
              [&](int i, int j) { return w.top[i] < w.top[j]; });
    for (int64_t p = 0; p < padded; p += kRowUnit) {
      float most = 0.0f, length = 0.0f;
      for (int64_t i = p; i < p + kRowUnit; ++i) {
        const int r = w.order[i];
        most = std::max(most, w.top[r]);
        if (w.top[r] > 0.0f) length = std::max(length, w.length[r]);
      }
      const float step = step_for(most, length);
      for (int64_t i = p; i < p + kRowUnit; ++i) {
        const int r = w.order[i];
        w.place[r] = static_cast<int>(i);
        w.scale[r] = step;
        int32_t total;
        const float squared = quantise<false>(w.a.data() + r * width, width, depth, step,
                                              w.A.data() + i * depth, &total);
        w.offset[r] = kOffset * total;
        w.residual[r] = residual_bound(squared, w.length[r], cosine);
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t p = 0; p < padded; p += kRowUnit) {
        const float inverse = 1.0f / (w.scale[w.order[p]] * unit[t]);
        tile_rows(w.A.data() + p * depth, packed.get() + t * tile_codes() * (depth / kPart),
                  half.get() + t * tile_codes(), inverse,
                  w.minima.data() + p * stride() + t * kLanes);
      }
    }
  }

  // 4 rows against a tile: the minima of its groups
  void tile_rows(const Level* A, const int32_t* tile, const float* halves, float inverse,
                 int32_t* minima) const {
    constexpr int C = kColumns;
    const VF scale = broadcast(inverse), cut = broadcast(0x1p30f);
    for (int block = 0; block < V / C; ++block) {
      VI s0[C], s1[C], s2[C], s3[C];
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) {
        const VF h = load(halves + (block * C + v) * kLanes) * scale;
        s0[v] = s1[v] = s2[v] = s3[v] = round_int(lesser(h, cut));
      }
      for (int64_t d = 0; d < depth; d += kPart, tile += C * kLanes) {
        const VI z0 = broadcast_dword(A + d), z1 = broadcast_dword(A + depth + d);
        const VI z2 = broadcast_dword(A + 2 * depth + d), z3 = broadcast_dword(A + 3 * depth + d);
#pragma GCC unroll 4
        for (int v = 0; v < C; ++v) {
          const VI c = load_int(tile + v * kLanes);
          add_products(s0[v], c, z0);
          add_products(s1[v], c, z1);
          add_products(s2[v], c, z2);
          add_products(s3[v], c, z3);
        }
      }
#pragma GCC unroll 4
      for (int v = 1; v < C; ++v) {
        s0[0] = least(s0[0], s0[v]);
        s1[0] = least(s1[0], s1[v]);
        s2[0] = least(s2[0], s2[v]);
        s3[0] = least(s3[0], s3[v]);
      }
      const VI m[4] = {s0[0], s1[0], s2[0], s3[0]};
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        int32_t* out = minima + r * stride();
        store_int(out, block ? least(m[r], load_int(out)) : m[r]);
      }
    }
  }
  static VQFAST_INLINE VI broadcast_dword(const Level* p) {
    int32_t dword;
    std::memcpy(&dword, p, 4);
    return broadcast_int(dword);
  }
  static VQFAST_INLINE void add_products(VI& sum, VI codes, VI row) {
#ifdef VQFAST_VNNI
    // gcc 12 copies and spills the sums of _mm512_dpbusd_epi32: a third of the speed
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(row));
#else
    sum += (VI)_mm256_madd_epi16((__m256i)codes, (__m256i)row);
#endif
  }

  // Groups that may hold the winner: the most promising one first, then, in ascending order, those
  // that are left by `list.high()`, which bounds the least score64 of the codes seen so far.
  template <class List>
  void flagged(Rows& w, int64_t r, List&& list) const {
    if (w.length[r] == std::numeric_limits<float>::infinity()) {
      return list.enter(first, first + count);
    }
    const int32_t* minima = w.minima.data() + w.place[r] * stride();
    const VI offset = broadcast_int(w.offset[r]);
    const auto visit = [&](int32_t at) {
      list.enter(first + at, first + std::min<int64_t>(count, at + V));
    };
    bounds(w, r);
    VF best = broadcast(std::numeric_limits<float>::infinity());
    const VF none = best;
    for (int64_t t = 0; t < tiles; ++t) {
      const VI m = load_int(minima + t * kLanes);
      const VF upper = fma(as_float(m + offset), broadcast(w.step[t]), broadcast(w.error[t]));
      best = lesser(best, select(m <= kFar, upper, none));
    }
    const VF limit = broadcast(reduce_min(best));
    w.found.clear();
    for (int64_t t = 0; t < tiles; ++t) {
      const VF lower = fma(as_float(load_int(minima + t * kLanes) + offset), broadcast(w.step[t]),
                           broadcast(-w.error[t]));
      for (uint32_t mask = at_most(lower, limit); mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        const int64_t at = t * tile_codes() + static_cast<int64_t>(lane) * V;
        w.found.push_back({lower[lane], static_cast<int32_t>(at)});
      }
    }
    const auto least = std::min_element(w.found.begin(), w.found.end(),
                                        [](auto& x, auto& y) { return x.lower < y.lower; });
    if (least == w.found.end()) return;
    visit(least->at);
    const float left = upper_bound(w, r, list.high());
    for (const Found& f : w.found) {
      if (f.at != least->at && f.lower <= left) visit(f.at);
    }
  }

  // what a score64 of at most `high` says of t
  float upper_bound(const Rows& w, int64_t r, float high) const {
    const float square = w.square[r], D = static_cast<float>(book->D);
    if (book->metric == kDot) return high + 0x1p-22f * std::fabs(high);
    const float error = (D + 24.0f) * 0x1p-24f * square + 0x1p-22f * (std::fabs(high) + square) +
                        (book->metric == kCosine ? 0x1p-18f : 0.0f);
    return 0.5f * (high - square) + error;
  }

  // E and u s of each tile for row r
  void bounds(Rows& w, int64_t r) const {
    const float D = static_cast<float>(book->D), A = w.length[r], da = w.residual[r];
    const float own = (D + 8.0f) * 0x1p-52f * A * A;
    const VF half_unit = broadcast(0.5f), u = broadcast(w.scale[r]);
    for (int64_t t = 0; t < tiles; t += kLanes) {
      const VF b = load(reach.data() + t), db = load(lost.data() + t);
      const VF step = u * load(unit.data() + t);
      const VF e = da * b + (A + da) * db + step +
                   (D + 24.0f) * 0x1p-24f * (A * b + half_unit * b * b) +
                   (D + 8.0f) * 0x1p-52f * b * b + own;
      store(w.step.data() + t, step);
      store(w.error.data() + t, e * (1.0f + 0x1p-10f));
    }
  }
};
