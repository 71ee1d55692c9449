// Memory that is written for the first time: Linux clears it page by page, 1.5 us for each 4 KiB
// on the machine of the ladder in cpu/conv3x3.cpp, which is eight times what a copy of it costs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace vqfast {

// Asks for pages of 2 MiB for the whole ones in [p, p + bytes); the contents stay as they are. Only
// blocks from 32 MiB on: malloc maps those anew each time. Smaller ones share a heap whose pages
// are warm.
inline void prefer_large_pages(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < size_t{32} << 20) return;
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) & ~(kPage - 1);
  // a system without large pages answers with an error
  (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)p;
  (void)bytes;
#endif
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Scratch = std::unique_ptr<T[], Free>;

// n values, not initialised, on a cache line
template <class T>
Scratch<T> scratch(int64_t n) {
  const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes ? bytes : 64);
  if (!p) throw std::bad_alloc();
  return Scratch<T>(static_cast<T*>(p));
}

}  // namespace vqfast
