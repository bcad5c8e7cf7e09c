// Buffers for kernels under test: the byte behind the last element is unreadable, so that a read past the end dies.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"

template <class T>
class Guarded {
  public:
    // `aligned` moves the begin down to a multiple of 256 bytes, as an allocation on a device has it; the end then lies
    // up to 255 bytes before the guard.
    explicit Guarded(std::size_t n, bool aligned = false) : n_(n) {
        const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        whole_bytes_ = (n * sizeof(T) + 256 + page - 1) / page * page + page;
        whole_ = mmap(nullptr, whole_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        EXPECT(whole_ != MAP_FAILED);
        unsigned char* const end = static_cast<unsigned char*>(whole_) + whole_bytes_ - page;
        EXPECT(mprotect(end, page, PROT_NONE) == 0);
        auto begin = reinterpret_cast<std::uintptr_t>(end) - n * sizeof(T);
        if (aligned) {
            begin = begin / 256 * 256;
        }
        data_ = reinterpret_cast<T*>(begin);
        std::memset(static_cast<void*>(data_), 0xff, n * sizeof(T));
    }
    explicit Guarded(const std::vector<T>& values, bool aligned = false) : Guarded(values.size(), aligned) {
        std::memcpy(static_cast<void*>(data_), values.data(), values.size() * sizeof(T));
    }
    ~Guarded() { munmap(whole_, whole_bytes_); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    Guarded(Guarded&& other) noexcept
        : n_(other.n_), whole_bytes_(other.whole_bytes_), whole_(other.whole_), data_(other.data_) {
        other.whole_ = nullptr;
        other.whole_bytes_ = 0;
    }

    [[nodiscard]] T* data() { return data_; }
    [[nodiscard]] const T* data() const { return data_; }
    [[nodiscard]] std::size_t size() const { return n_; }
    T& operator[](std::size_t i) { return data_[i]; }
    const T& operator[](std::size_t i) const { return data_[i]; }
    T* begin() { return data_; }
    T* end() { return data_ + n_; }
    [[nodiscard]] const T* begin() const { return data_; }
    [[nodiscard]] const T* end() const { return data_ + n_; }

  private:
    std::size_t n_;
    std::size_t whole_bytes_ = 0;
    void* whole_ = nullptr;
    T* data_ = nullptr;
};
