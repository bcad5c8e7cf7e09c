// Fewer, larger pages for memory that is passed over again and again.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace rep_fast {

inline constexpr std::size_t kHugePage = std::size_t{2} << 20;

// A wish for memory nobody has touched yet: with pages of 4 KiB, panels and triangles of many megabytes miss the buffer
// of page translations at every row. Smaller memory is left alone, and so is the wish where the system grants none.
inline void prefer_huge_pages(void* data, std::size_t n_bytes) {
    constexpr std::uintptr_t kPage = 4096;
    const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const auto end = (reinterpret_cast<std::uintptr_t>(data) + n_bytes) / kPage * kPage;
    if (n_bytes >= kHugePage) {
        ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
}

}  // namespace rep_fast
