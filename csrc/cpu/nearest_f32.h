// The screen in float32: half the score of every code up to a proved error, as minima of groups.
//
// Included once per instruction set by nearest.cpp, inside namespace vqfast::VQFAST_ISA, so it has
// no include guard.
//
// With S a power of two that brings the largest code coordinate near 1, and about the centre m,
//     a = S (z - m),  b_k = S (c_k - m),  t_k = |b_k|^2 / 2 - a.b_k
// orders codes as |z - c_k|^2 does (dot: m = 0 and no norm). t_k is computed from a and b rounded
// to float32, and half of score64 differs from it, up to a constant of the row, by
//     E_k = (D+16) 2^-24 (|a||b_k| + |b_k|^2/2)  rounding of a, b, products and sums, any order
//         + (D+8) 2^-53 (|a| + |b_k|)^2          rounding of score64 itself
//         + (D+8) 2^-122 (1 + |a|)               underflow, flushed or not
// at most, with |b_k| taken as the largest of its tile of codes.
//
// Shape of the code: tiles of kLanes x V codes. Lane l holds V consecutive codes, so the minimum
// over a tile's V vectors gives kLanes group minima with no shuffle and no index. D > 8: register
// tile of 12 (6) rows x 2 vectors, z broadcast from L1. D <= 8: z stays in registers, codes stream,
// one load feeds several rows.

struct FloatScreen {
  static constexpr int kTileRows = VQFAST_LANES == 16 ? 12 : 6;  // divides kRowUnit, as do 1, 2, 4
  static constexpr int64_t kRowUnit = 12;
  static constexpr int64_t kMaxRun = 65536;
  static constexpr float kWild = 0x1p50f;

  const Book* book;
  double scale;  // S
  int64_t first, count, tiles;
  int64_t depth;             // D, padded to 1, 2, 4 or 8 for the small kernel
  int V;                     // vectors per tile, codes per group
  int width;                 // vectors that lie side by side: 2, or 1 for the small kernel
  Aligned<float> packed;     // [tiles][V / width][depth][width][kLanes], negated
  std::vector<float> start;  // [tiles][V][kLanes]: |b|^2/2, 0 for dot, infinity where no code is
  std::vector<float> slope, shift;  // [tiles]: E = |a| slope + shift + a part that is the row's

  struct Rows {
    std::vector<float> a, minima, length;  // [rows, depth], [rows, tiles, kLanes], [rows] |a|
    std::vector<double> row;               // [D]
  };

  static int64_t run_codes(const Book& b) {
    const int64_t unit = kLanes * 16, bytes = int64_t{32} << 20;
    return std::max(unit, std::min(kMaxRun, bytes / (4 * b.D)) / unit * unit);
  }

  int64_t tile_codes() const { return static_cast<int64_t>(kLanes) * V; }

  void begin(const Book& b, int threads) {
    book = &b;
    scale = frame_scale(b, threads);
  }

  // The terms of E, where the largest |b|^2 is `square`; the last is that of a row. 2^-12 covers
  // the rounding of these and of sums with them.
  static float slope_of(int64_t D, double square) {
    const double g = static_cast<double>(D + 16) * 0x1p-24;
    return static_cast<float>(g * std::sqrt(square) * (1.0 + 0x1p-12) + 0x1p-110);
  }
  static float shift_of(int64_t D, double square) {
    const double g = static_cast<double>(D + 16) * 0x1p-24;
    const double h = static_cast<double>(D + 8) * 0x1p-52;
    return static_cast<float>((g / 2 + h) * square * (1.0 + 0x1p-12) + 0x1p-110);
  }
  static float own_error(int64_t D, double length) {
    const double d = static_cast<double>(D + 8);
    return static_cast<float>(d * 0x1p-52 * length * length * (1.0 + 0x1p-12) +
                              d * 0x1p-121 * (1.0 + length));
  }

  // Codes of a tile, and their slots: of each pair (or single vector) all lanes, so that stores
  // stay in one panel.
  void pack_tile(Book& b, int64_t t, double* row) {
    const int64_t W = width, step = W * kLanes, D = b.D;
    double widest = 0.0;
    for (int slot = 0; slot < V * kLanes; ++slot) {
      const int64_t panel = slot / step, l = slot % step / W, w = slot % W, v = panel * W + w;
      const int64_t k = t * tile_codes() + l * V + v;
      float* out = packed.get() + t * tile_codes() * depth + panel * depth * step + w * kLanes + l;
      float& half = start[t * tile_codes() + v * kLanes + l];
      const float* c = b.codes + (first + k) * D;
      if (k < count) b.skip[first + k] = !all_finite(c, D);
      if (k >= count || b.skip[first + k]) {
        for (int64_t i = 0; i < depth; ++i) out[i * step] = 0.0f;
        half = std::numeric_limits<float>::infinity();
        continue;
      }
      b.hash[first + k] = hash_of(c, b.weight.data(), D);
      load64(c, b.norm(first + k), D, row);
      for (int64_t i = 0; i < D; ++i) row[i] = (b.centre[i] - row[i]) * scale;
      for (int64_t i = 0; i < D; ++i) out[i * step] = static_cast<float>(row[i]);
      for (int64_t i = D; i < depth; ++i) out[i * step] = 0.0f;
      const double square = sum_squares(row, D);
      half = b.metric == kDot ? 0.0f : static_cast<float>(square / 2);
      widest = square > widest ? square : widest;
    }
    slope[t] = slope_of(D, widest);
    shift[t] = shift_of(D, widest);
  }

  void pack(Book& b, int64_t from, int64_t codes_of_run, int threads) {
    first = from;
    count = codes_of_run;
    const bool small = b.D <= 8;
    width = small ? 1 : 2;
    depth = small ? (b.D <= 2 ? b.D : b.D <= 4 ? 4 : 8) : b.D;
    V = small ? 16 : b.D <= 64 ? 8 : 4;
    while (V > 2 && tile_codes() / 2 >= count) V /= 2;
    tiles = (count + tile_codes() - 1) / tile_codes();
    packed = aligned<float>(tiles * tile_codes() * depth);
    start.resize(tiles * tile_codes());
    slope.resize(tiles);
    shift.resize(tiles);
    parallel_for(threads, tiles, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> row(b.D);
      for (int64_t t = begin; t < end; ++t) pack_tile(b, t, row.data());
    });
    skip_repeated(b, first, count, [&](int64_t k) {
      const int64_t at = k - first, t = at / tile_codes(), l = at % tile_codes() / V, v = at % V;
      start[t * tile_codes() + v * kLanes + l] = std::numeric_limits<float>::infinity();
    });
  }

  // rows per block: z and the minima of a block stay in the second-level cache
  int64_t block_rows(int64_t N, int threads) const {
    int64_t rows = std::min<int64_t>(96, 32768 / depth);
    rows = std::min(rows, (int64_t{1} << 20) / (tiles * kLanes * 4));
    rows = std::min(rows, (N + threads - 1) / threads);
    return std::max<int64_t>(1, (rows + kRowUnit - 1) / kRowUnit) * kRowUnit;
  }

  void reserve(Rows& w, int64_t rows) const {
    w.a.resize(rows * depth);
    w.minima.resize(rows * tiles * kLanes);
    w.length.resize(rows);
    w.row.resize(book->D);
  }

  // a = S (z - m), rounded, and its length; infinity where it is not to be screened
  float place_row(const float* x, double norm, double* row, float* a) const {
    const int64_t D = book->D;
    std::fill(a, a + depth, 0.0f);
    load64(x, norm, D, row);
    for (int64_t i = 0; i < D; ++i) row[i] = (row[i] - book->centre[i]) * scale;
    if (largest_magnitude(row, D) > kWild) return std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < D; ++i) a[i] = static_cast<float>(row[i]);
    return static_cast<float>(std::sqrt(sum_squares(row, D)) * (1.0 + 0x1p-12));
  }

  // x [rows, D]; norms [rows], negative where the row is not finite
  void screen(const float* x, const double* norms, int64_t rows, Rows& w) const {
    const int64_t padded = (rows + kRowUnit - 1) / kRowUnit * kRowUnit;
    std::fill(w.a.data(), w.a.data() + padded * depth, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      if (norms[r] < 0.0) continue;
      w.length[r] = place_row(x + r * book->D, norms[r], w.row.data(), w.a.data() + r * depth);
    }
    multiply(w.a.data(), padded, w.minima.data());
  }

  // R rows against all V vectors of a tile; z in registers
  template <int DEPTH, int R>
  static void small_rows(const float* a, int64_t rows, const float* tile, const float* bias, int V,
                         int64_t stride, float* minima) {
    for (int64_t r = 0; r < rows; r += R) {
      VF x[R][DEPTH], m[R];
      for (int i = 0; i < R; ++i) {
        for (int d = 0; d < DEPTH; ++d) x[i][d] = broadcast(a[(r + i) * DEPTH + d]);
        m[i] = broadcast(std::numeric_limits<float>::infinity());
      }
      for (int v = 0; v < V; ++v) {
        const float* c = tile + static_cast<int64_t>(v) * DEPTH * kLanes;
        const VF start = load(bias + v * kLanes);
        VF s[R];
        for (int i = 0; i < R; ++i) s[i] = start;
#pragma GCC unroll 8
        for (int d = 0; d < DEPTH; ++d) {
          const VF y = load(c + d * kLanes);
          for (int i = 0; i < R; ++i) s[i] = fma(x[i][d], y, s[i]);
        }
        for (int i = 0; i < R; ++i) m[i] = lesser(m[i], s[i]);
      }
      for (int i = 0; i < R; ++i) store(minima + (r + i) * stride, m[i]);
    }
  }

  // kTileRows rows against two vectors of codes at a time; sums in registers
  static void tile_rows(const float* a, int64_t rows, int64_t D, const float* tile,
                        const float* bias, int V, int64_t stride, float* minima) {
    constexpr int R = kTileRows;
    for (int64_t r = 0; r < rows; r += R) {
      const float* x = a + r * D;
      for (int v = 0; v < V; v += 2) {
        const float* c = tile + static_cast<int64_t>(v) * D * kLanes;
        const VF first = load(bias + v * kLanes), second = load(bias + (v + 1) * kLanes);
        VF s0[R], s1[R];
#pragma GCC unroll 12
        for (int i = 0; i < R; ++i) s0[i] = first, s1[i] = second;
        for (int64_t d = 0; d < D; ++d) {
          const VF y0 = load(c + d * 2 * kLanes), y1 = load(c + d * 2 * kLanes + kLanes);
#pragma GCC unroll 12
          for (int i = 0; i < R; ++i) {
            const VF z = broadcast(x[i * D + d]);
            s0[i] = fma(z, y0, s0[i]);
            s1[i] = fma(z, y1, s1[i]);
          }
        }
#pragma GCC unroll 12
        for (int i = 0; i < R; ++i) {
          float* out = minima + (r + i) * stride;
          const VF m = lesser(s0[i], s1[i]);
          store(out, v == 0 ? m : lesser(m, load(out)));
        }
      }
    }
  }

  void multiply(const float* a, int64_t rows, float* minima) const {
    constexpr int kMany = VQFAST_LANES == 16 ? 16 : 8;  // registers for z
    const int64_t stride = tiles * kLanes;
    for (int64_t t = 0; t < tiles; ++t) {
      const float* tile = packed.get() + t * tile_codes() * depth;
      const float* bias = start.data() + t * tile_codes();
      float* out = minima + t * kLanes;
      if (width == 2) {
        tile_rows(a, rows, depth, tile, bias, V, stride, out);
      } else if (depth == 8) {
        small_rows<8, kMany / 8>(a, rows, tile, bias, V, stride, out);
      } else if (depth == 4) {
        small_rows<4, kMany / 4>(a, rows, tile, bias, V, stride, out);
      } else if (depth == 2) {
        small_rows<2, 4>(a, rows, tile, bias, V, stride, out);
      } else {
        small_rows<1, 4>(a, rows, tile, bias, V, stride, out);
      }
    }
  }

  // every group whose least screened score reaches the bound; as a rule one, so that an upper bound
  // from the codes seen so far would not help
  template <class List>
  void flagged(const Rows& w, int64_t r, List&& list) const {
    const float* minima = w.minima.data() + r * tiles * kLanes;
    const float length = w.length[r];
    if (length == std::numeric_limits<float>::infinity()) {
      return list.enter(first, first + count);
    }
    const float own = own_error(book->D, length);
    VF best = broadcast(std::numeric_limits<float>::infinity());
    for (int64_t t = 0; t < tiles; ++t) {
      const float e = length * slope[t] + shift[t] + own;
      best = lesser(best, load(minima + t * kLanes) + e);
    }
    const float least = reduce_min(best);
    for (int64_t t = 0; t < tiles; ++t) {
      const float e = length * slope[t] + shift[t] + own;
      uint32_t mask = at_most(load(minima + t * kLanes), broadcast(least + e));
      for (; mask; mask &= mask - 1) {
        const int64_t at = t * tile_codes() + static_cast<int64_t>(__builtin_ctz(mask)) * V;
        list.enter(first + at, first + std::min(count, at + V));
      }
    }
  }
};
