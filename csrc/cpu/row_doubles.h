// Rows in float64: kHalfLanes doubles from as many floats, for sums that every set takes alike.
//
// Included once per instruction set, inside namespace vqfast::VQFAST_ISA, so it has no include
// guard. Each result here is one rounded operation, or an exact one, so the sets agree bit for bit.

typedef double VD __attribute__((vector_size(VQFAST_LANES * 4)));
typedef float VH __attribute__((vector_size(VQFAST_LANES * 2)));  // as many floats
constexpr int kHalfLanes = VQFAST_LANES / 2;

VQFAST_INLINE VH load_h(const float* p) {
  VH v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
VQFAST_INLINE void store_h(float* p, VH v) { __builtin_memcpy(p, &v, sizeof v); }
VQFAST_INLINE VD load_d(const double* p) {
  VD v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
VQFAST_INLINE void store_d(double* p, VD v) { __builtin_memcpy(p, &v, sizeof v); }
VQFAST_INLINE VD to_double(VH v) { return __builtin_convertvector(v, VD); }
VQFAST_INLINE VH to_single(VD v) { return __builtin_convertvector(v, VH); }

VQFAST_INLINE VH low_half(VF v) {
  VH h;
  __builtin_memcpy(&h, &v, sizeof h);
  return h;
}
VQFAST_INLINE VH high_half(VF v) {
  VH h;
  __builtin_memcpy(&h, reinterpret_cast<const char*>(&v) + sizeof h, sizeof h);
  return h;
}

// Rows are visited in the order of codes, which no hardware prefetcher foresees.
template <bool Write = false, class T>
VQFAST_INLINE void fetch_ahead(const T* row, int64_t n) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t at = 0; at < n * static_cast<int64_t>(sizeof(T)) && at < 4096; at += 64)
    __builtin_prefetch(p + at, Write);
}
constexpr int64_t kAhead = 2;  // rows

// the row as floats: itself, or its copy in room [n]
inline const float* as_floats(const float* x, int64_t, float*) { return x; }
template <class T>
inline const float* as_floats(const T* x, int64_t n, float* room) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(room + i, load(x + i));
  store_n(room + i, load_n(x + i, static_cast<int>(n - i)), static_cast<int>(n - i));
  return room;
}

// floats -> the row, in its type
template <class T>
inline void from_floats(const float* x, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
  store_n(out + i, load_n(x + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

// total += x
VQFAST_INLINE void add_row(const float* x, int64_t n, double* total) {
  int64_t i = 0;
  for (; i + kHalfLanes <= n; i += kHalfLanes)
    store_d(total + i, load_d(total + i) + to_double(load_h(x + i)));
  for (; i < n; ++i) total[i] += x[i];
}
