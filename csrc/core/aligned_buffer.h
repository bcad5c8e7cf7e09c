// Scratch floats that start on a cache line: a 64-byte load that straddles two lines costs two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "core/huge_pages.h"

namespace rep_fast {

class AlignedBuffer {
  public:
    // At least n floats; what they hold is undefined, and pointers handed out before may be gone.
    float* reserve(std::int64_t n) {
        if (n > capacity_) {
            const std::size_t n_bytes = static_cast<std::size_t>(n) * sizeof(float);
            const std::align_val_t alignment{n_bytes < kHugePage ? kLine : kHugePage};
            data_ = Memory(static_cast<float*>(::operator new(n_bytes, alignment)), Release{alignment});
            capacity_ = n;
            prefer_huge_pages(data_.get(), n_bytes);
        }
        return data_.get();
    }

  private:
    static constexpr std::size_t kLine = 64;
    struct Release {
        std::align_val_t alignment;
        void operator()(float* data) const { ::operator delete(data, alignment); }
    };
    using Memory = std::unique_ptr<float, Release>;
    Memory data_{nullptr, Release{std::align_val_t{kLine}}};
    std::int64_t capacity_ = 0;
};

}  // namespace rep_fast
