// Runs the source of CUDA kernels on the CPU, for tests only: every thread of a block is a fiber, a few blocks are
// under way at once. It is about meaning, never about speed.
//
// What it makes visible:
//   * the order in which threads run between two barriers is drawn from a seed, so a missing __syncthreads() or
//     __syncwarp() reads what is not written yet; so is how far each block gets before another goes on;
//   * shared memory is filled with NaN or with zeros before each block and ends at an unreadable page;
//   * asynchronous copies land at their wait, not before; what the device does by itself (bulk copies) happens at any
//     moment, mostly when nobody can go on without it;
//   * a wide access at an address that is not a multiple of its size throws, as do others of a device's instructions;
//   * a barrier that somebody never reaches, or a warp operation whose mask names a lane that does not come, ends the
//     run with a sentence instead of hanging.
//   * blocks that wait for each other end the run, too, unless the launch is cooperative and all of them are there.
// What it does not model: memory ordering finer than that (fences do nothing), clocks.
#pragma once

#include <any>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

namespace cuda_on_cpu {

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    [[nodiscard]] constexpr std::size_t count() const { return std::size_t{x} * y * z; }
};

inline constexpr unsigned kWarpSize = 32;
inline constexpr unsigned kMaxThreads = 1024;
// what a block may ask for on every architecture that is served (sm_86, sm_89: 99 KiB, sm_80: 163)
inline constexpr std::size_t kMaxSharedBytes = 99 * 1024;
// the same on sm_90, whose swizzled tiles begin at multiples of 1024 bytes
inline constexpr std::size_t kMaxSharedBytesOfHopper = 227 * 1024;

class ExecutionError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// Order of threads and blocks from here on.
void set_seed(std::uint64_t seed);

// Blocks that are under way at once, here the whole device; more of them would show nothing else.
inline constexpr std::size_t kResidentBlocks = 3;

struct LaunchKind {
    bool is_for_hopper = false;
    bool is_cooperative = false;  // all blocks are under way at once
};

// Runs body once for every thread of every block; returns when all are done. Throws ExecutionError for a launch no
// device would take, a barrier or condition nobody can pass, and whatever a thread itself threw.
void run_grid(const std::string& name, Dim3 grid, Dim3 block, std::size_t shared_bytes,
              const std::function<void()>& body, LaunchKind kind = {});

// ---- what a running thread may ask; calling any of these outside a kernel is an error -------------------------------
const Dim3& grid_size();
const Dim3& block_size();
const Dim3& block_index();
const Dim3& thread_index();
unsigned lane();
void* shared_memory();

// All threads of the block that have not returned.
void block_barrier();
// The same, and tells everybody whether the predicate held for anybody.
bool block_any(bool predicate);
// The lanes of this warp named in mask, which must name the caller.
void warp_barrier(unsigned mask);

using WarpWords = std::array<std::uint64_t, kWarpSize>;
// Every lane of mask gives one word and gets those of all lanes; lanes outside mask read as 0.
WarpWords exchange(unsigned mask, std::uint64_t mine);

// Every lane of mask gives `bytes` bytes; `all` [kWarpSize · bytes] gets those of all lanes, zeros for others.
void exchange_bytes(unsigned mask, const void* mine, void* all, std::size_t bytes);

// A copy that lands when its group is waited for; a group ends at commit_copies().
void copy_later(void* destination, const void* source, std::size_t bytes);
void commit_copies();
// Lands all groups of this thread but the `pending` youngest.
void wait_for_copies(unsigned pending);

// The calling thread goes on once `holds`; it is asked at any time and by anybody.
void wait_until(std::function<bool()> holds);
// Something the device does by itself, at any moment from here on but before the block ends.
void happen_later(std::function<void()> event);

// Work of the calling thread that is done when its group is waited for, as copies are; a group ends at commit_work().
void work_later(std::function<void()> work);
void commit_work();
void wait_for_work(unsigned pending);

// Place of an address in the block's shared memory.
std::uint32_t shared_offset(const void* address);
unsigned char* shared_at(std::uint32_t offset);

// What a model of an instruction keeps for the calling thread; empty when the thread begins.
std::any& notes();

// ---- warp operations on values of up to 8 bytes ---------------------------------------------------------------------
template <class T>
std::uint64_t as_word(T value) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t));
    std::uint64_t word = 0;
    std::memcpy(&word, &value, sizeof(T));
    return word;
}
template <class T>
T from_word(std::uint64_t word) {
    T value;
    std::memcpy(&value, &word, sizeof(T));
    return value;
}

// The value of `source`; reading a lane that takes no part is an error, on a device it would be undefined.
template <class T>
T shuffle(unsigned mask, T value, unsigned source);

namespace detail {
[[noreturn]] void fail_shuffle(unsigned mask, unsigned source);
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
    const WarpWords words = exchange(mask, as_word(value));
    if (source >= kWarpSize || (mask >> source & 1u) == 0) {
        detail::fail_shuffle(mask, source);
    }
    return from_word<T>(words[source]);
}

}  // namespace cuda_on_cpu
