#include "core/work_queue.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "core/gradual_underflow.h"

namespace rep_fast {
namespace {

class Queue {
  public:
    Queue(std::int64_t n_blocks, const std::function<void(std::int64_t, int)>& work)
        : n_blocks_(n_blocks), work_(work) {}

    void drain(int worker) {
        const GradualUnderflow exact_subnormals;
        try {
            for (std::int64_t block = next_++; block < n_blocks_; block = next_++) {
                work_(block, worker);
            }
        } catch (...) {
            next_ = n_blocks_;
            const std::lock_guard lock(failure_mutex_);
            if (!failure_) {
                failure_ = std::current_exception();
            }
        }
    }

    void rethrow() const {
        if (failure_) {
            std::rethrow_exception(failure_);
        }
    }

  private:
    const std::int64_t n_blocks_;
    const std::function<void(std::int64_t, int)>& work_;
    std::atomic<std::int64_t> next_{0};
    std::mutex failure_mutex_;
    std::exception_ptr failure_;
};

}  // namespace

void run_blocks(std::int64_t n_blocks, int n_threads, const std::function<void(std::int64_t, int)>& work) {
    Queue queue(n_blocks, work);
    const auto n_workers = static_cast<int>(std::clamp<std::int64_t>(n_blocks, 1, std::max(n_threads, 1)));
    {
        std::vector<std::jthread> others;
        others.reserve(static_cast<std::size_t>(n_workers - 1));
        for (int worker = 1; worker < n_workers; ++worker) {
            others.emplace_back([&queue, worker] { queue.drain(worker); });
        }
        queue.drain(0);
    }
    queue.rethrow();
}

}  // namespace rep_fast
