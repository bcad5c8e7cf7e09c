// Memory that ends, and begins, at a page nobody can read.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>

#include "executor.h"

namespace cuda_on_cpu {

inline std::size_t page_size() {
    return static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

// Memory between two unreadable pages.
class GuardedPages {
  public:
    explicit GuardedPages(std::size_t bytes) : page_(page_size()), inner_((bytes + page_ - 1) / page_ * page_) {
        whole_ = mmap(nullptr, inner_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (whole_ == MAP_FAILED || mprotect(begin(), inner_, PROT_READ | PROT_WRITE) != 0) {
            throw ExecutionError("no memory for a fiber or for shared memory");
        }
    }
    ~GuardedPages() { munmap(whole_, inner_ + 2 * page_); }
    GuardedPages(const GuardedPages&) = delete;
    GuardedPages& operator=(const GuardedPages&) = delete;

    [[nodiscard]] unsigned char* begin() const { return static_cast<unsigned char*>(whole_) + page_; }
    [[nodiscard]] unsigned char* end() const { return begin() + inner_; }
    [[nodiscard]] std::size_t size() const { return inner_; }

  private:
    std::size_t page_;
    std::size_t inner_;
    void* whole_ = nullptr;
};

}  // namespace cuda_on_cpu
