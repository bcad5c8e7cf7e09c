// The threads of a block as fibers, as the scheduler (executor.cpp) and the calls of a running thread
// (thread_calls.cpp) see them.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <any>
#include <array>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "executor.h"
#include "guarded_pages.h"

namespace cuda_on_cpu::detail {

inline constexpr std::size_t kStackBytes = 128 * 1024;

struct PendingCopy {
    void* destination;
    const void* source;
    std::size_t bytes;
};

struct Event {
    std::function<void()> happens;
    bool is_late = false;  // not before nobody can go on without it
};

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kAtCondition, kDone };

struct Fiber {
    ucontext_t context{};  // where it begins
    jmp_buf resume{};      // where it goes on: swapcontext would make a system call each time
    bool has_begun = false;
    GuardedPages stack{kStackBytes};
    Dim3 index;
    unsigned number = 0;  // within the block
    State state = State::kReady;
    unsigned mask = 0;  // of the warp barrier it waits at
    std::vector<PendingCopy> open_copies;
    std::deque<std::vector<PendingCopy>> committed_copies;
    std::vector<std::function<void()>> open_work;
    std::deque<std::vector<std::function<void()>>> committed_work;
    std::function<bool()> condition;
    std::any notes;
    std::exception_ptr thrown;

    [[nodiscard]] unsigned warp() const { return number / kWarpSize; }
    [[nodiscard]] unsigned lane() const { return number % kWarpSize; }
};

struct Block {
    std::string kernel;
    Dim3 grid, block, index;
    unsigned char* shared = nullptr;
    const std::function<void()>* body = nullptr;
    std::vector<std::unique_ptr<Fiber>>* fibers = nullptr;
    std::size_t n_threads = 0;
    std::vector<std::size_t> ready;    // threads that can go on
    std::vector<std::size_t> waiting;  // threads at a condition
    std::vector<Event> events;         // that have not happened yet
    std::size_t shared_bytes = 0;
    std::vector<std::vector<unsigned char>> warp_slots;  // per warp, what its lanes have put down
    std::array<bool, 2> votes{};                         // of block_any: one is filled while the other is read
    std::size_t open_vote = 0;
    jmp_buf scheduler{};
    Fiber* current = nullptr;
};

// Block and fiber that are running; an error outside a kernel.
Block& here();
// The running thread stops until the scheduler sets it ready again.
void wait_in(State state);
// Uniform in [0, n), by the seed.
std::size_t draw(std::size_t n);

}  // namespace cuda_on_cpu::detail
