// Scratch floats that start on a cache line: a 64-byte load that straddles two lines costs two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace rep_fast {

class AlignedBuffer {
  public:
    // At least n floats; what they hold is undefined, and pointers handed out before may be gone.
    float* reserve(std::int64_t n) {
        if (n > capacity_) {
            data_.reset(static_cast<float*>(::operator new(static_cast<std::size_t>(n) * sizeof(float), kAlignment)));
            capacity_ = n;
        }
        return data_.get();
    }

  private:
    static constexpr std::align_val_t kAlignment{64};
    struct Release {
        void operator()(float* data) const { ::operator delete(data, kAlignment); }
    };
    std::unique_ptr<float, Release> data_;
    std::int64_t capacity_ = 0;
};

}  // namespace rep_fast
