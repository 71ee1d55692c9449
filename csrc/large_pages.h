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

constexpr size_t kLine = 64;  // bytes of a cache line

// Of memory on a line: what malloc gave stands before it.
struct Free {
  void operator()(void* p) const {
    if (p) std::free(static_cast<void**>(p)[-1]);
  }
};
template <class T>
using Scratch = std::unique_ptr<T[], Free>;

// n values, not initialised, on a cache line. Not by aligned_alloc: before glibc 2.38 a block that
// it gave is too small for its like once it is freed, and the heap grows with every other one.
template <class T>
Scratch<T> scratch(int64_t n) {
  void* whole = std::malloc(static_cast<size_t>(n) * sizeof(T) + 2 * kLine);
  if (!whole) throw std::bad_alloc();
  const uintptr_t line = (reinterpret_cast<uintptr_t>(whole) / kLine + 1) * kLine;
  // malloc gives multiples of 8 at least, so that a pointer fits before the next line
  void** p = reinterpret_cast<void**>(line);
  p[-1] = whole;
  return Scratch<T>(reinterpret_cast<T*>(p));
}

}  // namespace vqfast
