// The search among cells: of few dimensions, most codes are too far to be looked at.
//
// Included once per instruction set by nearest.cpp, inside namespace vqfast::VQFAST_ISA, so it has
// no include guard.
//
// The codes are cut into cells of kLanes x kGroup by medians of their widest coordinate. A cell
// whose box is farther from a row than a code already seen holds no winner. In the frame and with
// the error E of nearest_f32.h, t_k >= (d^2 - |a|^2) / 2 for the distance d from a to the box, and
// t_k - E > min_j (t_j + E) rules a code out; so does d^2 > 2 (min_j (t_j + E) + E) + |a|^2, with
// 2^-18 of each term for the rounding of this comparison.
//
// Shape of the code: distances to all boxes, a vector of boxes at a time; the nearest cell first,
// then the others that are left, in order. Lane l of a cell holds kGroup codes, as in the other
// screens. The cut costs K log K, so it pays for many rows only (`cells_pay`).

struct CellScreen {
  static constexpr int64_t kRowUnit = 1;
  static constexpr int kGroup = 8, kMaxD = 6;
  static constexpr int64_t kCell = static_cast<int64_t>(kLanes) * kGroup;

  struct Point {
    float b[kMaxD];
    int32_t code;
  };
  struct Rows {
    std::vector<float> a, length, square;  // [rows, D], [rows] |a|, [rows] |a|^2, rounded up
    std::vector<double> row;               // [D]
    std::vector<float> distance;           // [cells, up to whole vectors] squared, to the boxes
    std::vector<int64_t> visited;          // cells
    std::vector<float> minima;             // [visited, kLanes], of their groups
  };

  const Book* book;
  double scale;                  // S
  int64_t count, cells, wide;    // codes; cells, and these up to whole vectors
  float slope, shift;            // E = |a| slope + shift + a part that is the row's
  std::vector<int32_t> codes;    // [cells, kLanes, kGroup], -1 where none is
  Aligned<float> packed;         // [cells][D][kGroup][kLanes], negated
  Aligned<float> start;          // [cells][kGroup][kLanes]: |b|^2/2, infinity where no code is
  std::vector<float> low, high;  // [D][wide] the boxes

  void build(Book& b, int threads) {
    book = &b;
    scale = frame_scale(b, threads);
    count = b.K;
    parallel_for(threads, b.K, 64, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const float* c = b.codes + k * b.D;
        b.skip[k] = !all_finite(c, b.D);
        b.hash[k] = hash_of(c, b.weight.data(), b.D);
      }
    });
    skip_repeated(b, 0, b.K, [](int64_t) {});
    std::vector<Point> points;
    points.reserve(b.K);
    std::vector<double> row(b.D);
    double widest = 0.0;
    for (int64_t k = 0; k < b.K; ++k) {
      if (b.skip[k]) continue;
      Point p{};
      p.code = static_cast<int32_t>(k);
      load64(b.codes + k * b.D, b.norm(k), b.D, row.data());
      double square = 0.0;
      for (int64_t d = 0; d < b.D; ++d) {
        row[d] = (row[d] - b.centre[d]) * scale;
        p.b[d] = static_cast<float>(row[d]);
        square += row[d] * row[d];
      }
      widest = std::max(widest, square);
      points.push_back(p);
    }
    slope = FloatScreen::slope_of(b.D, widest);
    shift = FloatScreen::shift_of(b.D, widest);
    cells = (static_cast<int64_t>(points.size()) + kCell - 1) / kCell;
    wide = (cells + kLanes - 1) / kLanes * kLanes;
    cut(points, threads);
    fill(points, threads);
  }

  // orders the points by cell
  void cut(std::vector<Point>& points, int threads) const {
    struct Range {
      int64_t begin, end;
    };
    std::vector<Range> ranges{{0, static_cast<int64_t>(points.size())}};
    for (int level = 0; (1 << level) < threads; ++level) {
      std::vector<Range> halves;
      for (const Range& r : ranges) {
        const int64_t middle = split(points.data(), r.begin, r.end);
        halves.push_back({r.begin, middle});
        halves.push_back({middle, r.end});
      }
      ranges.swap(halves);
    }
    parallel_for(threads, static_cast<int64_t>(ranges.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) divide(points.data(), ranges[i].begin, ranges[i].end);
    });
  }

  void divide(Point* points, int64_t begin, int64_t end) const {
    if (end - begin <= kCell) return;
    const int64_t middle = split(points, begin, end);
    divide(points, begin, middle);
    divide(points, middle, end);
  }

  // Brings the lower keys, which all differ, before `middle`. A swap without a branch: which keys
  // are lower cannot be predicted.
  static void select(uint64_t* keys, int64_t n, int64_t middle) {
    int64_t begin = 0, end = n;
    for (int round = 0; end - begin > kLanes && round < 64; ++round) {
      const int64_t step = (end - begin) / 4;
      const uint64_t x = keys[begin + step], y = keys[begin + 2 * step], w = keys[end - 1 - step];
      // of three, so that at least one is lower
      const uint64_t pivot = std::max(std::min(x, y), std::min(std::max(x, y), w));
      int64_t lower = begin;
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t key = keys[i];
        keys[i] = keys[lower];
        keys[lower] = key;
        lower += key < pivot;
      }
      (middle < lower ? end : begin) = lower;
    }
    std::nth_element(keys + begin, keys + middle, keys + end);
  }

  // halves a range at a whole number of cells; where it begins and ends itself if it is one cell
  int64_t split(Point* points, int64_t begin, int64_t end) const {
    const int64_t n = (end - begin + kCell - 1) / kCell, middle = begin + n / 2 * kCell;
    if (n < 2) return end;
    int64_t widest = 0;
    float extent = -1.0f;
    for (int64_t d = 0; d < book->D; ++d) {
      float least = points[begin].b[d], most = least;
      for (int64_t i = begin; i < end; ++i) {
        least = std::min(least, points[i].b[d]);
        most = std::max(most, points[i].b[d]);
      }
      if (most - least > extent) extent = most - least, widest = d;
    }
    // the coordinate, in an order of integers, and the place, so that no two keys are equal
    std::vector<uint64_t> keys(end - begin);
    for (int64_t i = begin; i < end; ++i) {
      int32_t bits;
      std::memcpy(&bits, &points[i].b[widest], 4);
      const uint32_t order = static_cast<uint32_t>(bits ^ (bits >> 31 | INT32_MIN));
      keys[i - begin] = static_cast<uint64_t>(order) << 32 | static_cast<uint64_t>(i - begin);
    }
    select(keys.data(), end - begin, middle - begin);
    std::vector<Point> moved;
    moved.reserve(end - begin);
    for (const uint64_t key : keys) moved.push_back(points[begin + static_cast<uint32_t>(key)]);
    std::copy(moved.begin(), moved.end(), points + begin);
    return middle;
  }

  void fill(const std::vector<Point>& points, int threads) {
    const float infinity = std::numeric_limits<float>::infinity();
    const int64_t D = book->D;
    codes.assign(cells * kCell, -1);
    packed = aligned<float>(cells * D * kCell);
    start = aligned<float>(cells * kCell);
    low.assign(D * wide, infinity);
    high.assign(D * wide, infinity);
    parallel_for(threads, cells, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t j = 0; j < kCell; ++j) {
          const int64_t i = c * kCell + j, at = j % kGroup * kLanes + j / kGroup;
          const bool real = i < static_cast<int64_t>(points.size());
          const Point p = real ? points[i] : Point{};
          double square = 0.0;
          for (int64_t d = 0; d < D; ++d) {
            packed[(c * D + d) * kCell + at] = -p.b[d];
            square += static_cast<double>(p.b[d]) * p.b[d];
            if (!real) continue;
            low[d * wide + c] = j == 0 ? p.b[d] : std::min(low[d * wide + c], p.b[d]);
            high[d * wide + c] = j == 0 ? p.b[d] : std::max(high[d * wide + c], p.b[d]);
          }
          start[c * kCell + at] = real ? static_cast<float>(square / 2) : infinity;
          if (real) codes[i] = p.code;
        }
      }
    });
  }

  int64_t block_rows(int64_t, int) const { return 64; }

  void reserve(Rows& w, int64_t rows) const {
    w.a.resize(rows * book->D);
    w.length.resize(rows);
    w.square.resize(rows);
    w.row.resize(book->D);
    w.distance.resize(wide);
    w.minima.resize(cells * kLanes);
  }

  void screen(const float* x, const double* norms, int64_t rows, Rows& w) const {
    const int64_t D = book->D;
    for (int64_t r = 0; r < rows; ++r) {
      if (norms[r] < 0.0) continue;
      load64(x + r * D, norms[r], D, w.row.data());
      double square = 0.0;
      for (int64_t d = 0; d < D; ++d) {
        w.row[d] = (w.row[d] - book->centre[d]) * scale;
        w.a[r * D + d] = static_cast<float>(w.row[d]);
        square += w.row[d] * w.row[d];
      }
      w.square[r] = static_cast<float>(square * (1.0 + 0x1p-20));
      w.length[r] = largest_magnitude(w.row.data(), D) > FloatScreen::kWild
                        ? std::numeric_limits<float>::infinity()
                        : static_cast<float>(std::sqrt(square) * (1.0 + 0x1p-12));
    }
  }

  template <class List>
  void flagged(Rows& w, int64_t r, List&& list) const {
    if (w.length[r] == std::numeric_limits<float>::infinity()) return list.enter(0, count);
    const float error = w.length[r] * slope + shift + FloatScreen::own_error(book->D, w.length[r]);
    const float* a = w.a.data() + r * book->D;
    const float least = book->D == 1   ? search<1>(w, a, w.square[r], error)
                        : book->D == 2 ? search<2>(w, a, w.square[r], error)
                        : book->D == 3 ? search<3>(w, a, w.square[r], error)
                        : book->D == 4 ? search<4>(w, a, w.square[r], error)
                        : book->D == 5 ? search<5>(w, a, w.square[r], error)
                                       : search<6>(w, a, w.square[r], error);
    const VF limit = broadcast(least + error);
    for (size_t i = 0; i < w.visited.size(); ++i) {
      uint32_t mask = at_most(load(w.minima.data() + i * kLanes), limit);
      for (; mask; mask &= mask - 1) {
        list.enter(codes.data() + w.visited[i] * kCell + __builtin_ctz(mask) * kGroup, kGroup);
      }
    }
  }

  // visits the cells that may hold the winner; the least t + E
  template <int D>
  float search(Rows& w, const float* a, float square, float error) const {
    VF x[D];
    for (int d = 0; d < D; ++d) x[d] = broadcast(a[d]);
    VF nearest = broadcast(std::numeric_limits<float>::infinity());
    for (int64_t c = 0; c < wide; c += kLanes) {
      VF sum = {};
      for (int d = 0; d < D; ++d) {
        const VF below = load(low.data() + d * wide + c) - x[d];
        const VF above = x[d] - load(high.data() + d * wide + c);
        const VF off = larger(larger(below, above), VF{});
        sum = fma(off, off, sum);
      }
      store(w.distance.data() + c, sum);
      nearest = lesser(nearest, sum);
    }
    const float closest = reduce_min(nearest);
    int64_t first = 0;
    while (w.distance[first] != closest) ++first;
    w.visited.clear();
    VF best = broadcast(std::numeric_limits<float>::infinity());
    float least = 0.0f, reach = 0.0f;
    const auto visit = [&](int64_t cell) {
      const VF m = minima<D>(cell, x);
      store(w.minima.data() + w.visited.size() * kLanes, m);
      w.visited.push_back(cell);
      best = lesser(best, m);
      least = reduce_min(best) + error;
      const float t = least + error;
      reach = 2.0f * t + square + 0x1p-18f * (std::fabs(t) + square);
    };
    visit(first);
    for (int64_t c = 0; c < wide; c += kLanes) {
      uint32_t mask = at_most(load(w.distance.data() + c), broadcast(reach));
      for (; mask; mask &= mask - 1) {
        const int64_t cell = c + __builtin_ctz(mask);
        if (cell != first && w.distance[cell] <= reach) visit(cell);
      }
    }
    return least;
  }

  template <int D>
  VF minima(int64_t cell, const VF* x) const {
    const float* codes = packed.get() + cell * D * kCell;
    const float* begin = start.get() + cell * kCell;
    VF m = broadcast(std::numeric_limits<float>::infinity());
#pragma GCC unroll 8
    for (int v = 0; v < kGroup; ++v) {
      VF s = load(begin + v * kLanes);
      for (int d = 0; d < D; ++d) s = fma(x[d], load(codes + d * kCell + v * kLanes), s);
      m = lesser(m, s);
    }
    return m;
  }
};
