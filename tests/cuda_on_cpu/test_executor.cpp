// The executor itself: does a kernel compute what a device would, and does each kind of mistake show?
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx/counter.cuh"
#include "cuda/ptx/wide_access.cuh"
#include "execution_errors.h"
#include "tests.h"

namespace {

using rep_fast::cuda::launch;
using rep_fast::cuda::shared_as;

void expect(bool holds, const char* what) {
    if (!holds) {
        std::fprintf(stderr, "failed: %s\n", what);
        std::exit(EXIT_FAILURE);
    }
}

// ---- kernels
// ----------------------------------------------------------------------------------------------------------

__global__ void number_threads(int* out) {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const unsigned per_block = blockDim.x * blockDim.y * blockDim.z;
    atomicAdd(&out[block * per_block + thread], 1);
}

struct Reversal {
    float values[96];
};

template <bool kWithBarrier>
__global__ void reverse(const float* in, float* out, int n) {
    auto& shared = shared_as<Reversal>();
    const int i = static_cast<int>(threadIdx.x);
    shared.values[i] = in[i];
    if (kWithBarrier) {
        __syncthreads();
    }
    out[i] = shared.values[n - 1 - i];
}

__global__ void sum_by_shuffles(const float* in, float* out) {
    float value = in[threadIdx.x];
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, lanes);
    }
    out[threadIdx.x] = value;
}

__global__ void shift_down(const float* in, float* out, unsigned delta) {
    out[threadIdx.x] = __shfl_down_sync(0xffffffffu, in[threadIdx.x], delta);
}

__global__ void vote(unsigned* out) {
    out[threadIdx.x] = __ballot_sync(0xffffffffu, threadIdx.x % 3 == 0);
}

// Round after round one thread, or none, says yes; what a thread saw wrong is written down.
__global__ void vote_often(int* out) {
    int n_right = 0;
    for (int round = 0; round < 20; ++round) {
        const bool is_wanted = round % 3 != 0;
        n_right += (__syncthreads_or(is_wanted && threadIdx.x == static_cast<unsigned>(round)) != 0) == is_wanted;
    }
    out[threadIdx.x] = out[50 + threadIdx.x] = n_right == 20;
}

// Half the warp leaves; the others name only themselves.
__global__ void half_warp(int* out) {
    if (threadIdx.x >= 16) {
        return;
    }
    out[threadIdx.x] = __shfl_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 15);
}

__global__ void barrier_for_some() {
    if (threadIdx.x == 3) {
        __syncwarp(0x00000008u);
        __ballot_sync(0x00000018u, 1);  // lane 4 never comes
    }
    __syncthreads();
}

__global__ void mask_without_self() {
    __syncwarp(threadIdx.x == 5 ? 0x1u : 0x20u);
}

__global__ void shuffle_from_outside(int* out) {
    if (threadIdx.x < 4) {
        out[threadIdx.x] = __shfl_sync(0xfu, 1, 9);
    }
}

struct Staged {
    float values[64];
};

template <bool kWithWait>
__global__ void copy_in_stages(const float* in, float* out) {
    auto& shared = shared_as<Staged>();
    const unsigned i = threadIdx.x;
    cuda_on_cpu::copy_later(&shared.values[i], &in[i], sizeof(float));
    cuda_on_cpu::commit_copies();
    cuda_on_cpu::copy_later(&shared.values[32 + i], &in[32 + i], sizeof(float));
    cuda_on_cpu::commit_copies();
    if (kWithWait) {
        cuda_on_cpu::wait_for_copies(1);
    }
    out[i] = shared.values[i];
    const float early = shared.values[32 + i];
    cuda_on_cpu::wait_for_copies(0);
    out[32 + i] = kWithWait ? shared.values[32 + i] : early;
}

__global__ void forget_a_copy(const float* in) {
    cuda_on_cpu::copy_later(&shared_as<Staged>().values[threadIdx.x], &in[threadIdx.x], sizeof(float));
    cuda_on_cpu::commit_copies();
}

__global__ void read_uninitialised(float* out) {
    out[threadIdx.x] = shared_as<Staged>().values[threadIdx.x];
}

__global__ void write_past_the_end(int offset) {
    shared_as<Staged>().values[64 + offset] = 1.0f;
}

// The last block to come adds up what all have written.
template <bool kWithBarrier>
__global__ void add_in_last_block(int* written, int* ticket, int* sum) {
    auto& is_last = shared_as<int>();
    written[blockIdx.x * blockDim.x + threadIdx.x] = 1;
    if (kWithBarrier) {
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        is_last = atomicAdd(ticket, 1) == static_cast<int>(gridDim.x) - 1;
    }
    __syncthreads();
    if (is_last != 0 && threadIdx.x == 0) {
        for (unsigned n = 0; n < gridDim.x * blockDim.x; ++n) {
            *sum += written[n];
        }
    }
}

// ---- tests
// ------------------------------------------------------------------------------------------------------------

std::vector<float> counted(int n) {
    std::vector<float> values(static_cast<std::size_t>(n));
    for (int i = 0; i < n; ++i) {
        values[static_cast<std::size_t>(i)] = static_cast<float>(i) + 0.5f;
    }
    return values;
}

// Every block writes its number and reads its neighbour's, behind a barrier of all blocks that may be left out.
template <bool kWaits>
__global__ void ask_neighbour(int* numbers, int* n_arrived, int* out) {
    if (threadIdx.x == 0) {
        numbers[blockIdx.x] = 1 + static_cast<int>(blockIdx.x);
        atomicAdd(n_arrived, 1);
        if (kWaits) {
            rep_fast::cuda::ptx::wait_until_reached(n_arrived, static_cast<int>(gridDim.x));
        }
    }
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = numbers[(blockIdx.x + 1) % gridDim.x];
}

__global__ void wait_for_a_number(int* number) {
    rep_fast::cuda::ptx::wait_until_reached(number, 1);
}

void test_every_thread_runs_once() {
    const dim3 grid(3, 2, 2), block(5, 3, 2);
    std::vector<int> out(grid.count() * block.count());
    launch("number_threads", number_threads, {grid, block}, out.data());
    for (const int times : out) {
        expect(times == 1, "every thread of every block runs once");
    }
}

void test_barriers_and_shared_memory() {
    const auto in = counted(96);
    std::vector<float> out(96);
    bool is_race_seen = false;
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
        cuda_on_cpu::set_seed(seed);
        launch("reverse", reverse<true>, {dim3(1), dim3(96), sizeof(Reversal)}, in.data(), out.data(), 96);
        for (std::size_t i = 0; i < 96; ++i) {
            expect(out[i] == in[95 - i], "a barrier makes all writes visible");
        }
        launch("reverse", reverse<false>, {dim3(1), dim3(96), sizeof(Reversal)}, in.data(), out.data(), 96);
        for (std::size_t i = 0; i < 96; ++i) {
            is_race_seen |= out[i] != in[95 - i];
        }
        expect(is_race_seen, "a missing barrier shows");
    }
}

void test_blocks_overtake_each_other() {
    bool is_race_seen = false;
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
        cuda_on_cpu::set_seed(seed);
        std::vector<int> written(5 * 64), unsafe(5 * 64);
        int ticket = 0, sum = 0, other_ticket = 0, other_sum = 0;
        launch("add", add_in_last_block<true>, {dim3(5), dim3(64), sizeof(int)}, written.data(), &ticket, &sum);
        expect(sum == 5 * 64, "the last block sees what all have written");
        launch("add", add_in_last_block<false>, {dim3(5), dim3(64), sizeof(int)}, unsafe.data(), &other_ticket,
               &other_sum);
        is_race_seen |= other_sum != 5 * 64;
    }
    expect(is_race_seen, "a ticket taken before the block is done shows");
}

void test_block_votes() {
    std::vector<int> out(100, 0);
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
        cuda_on_cpu::set_seed(seed);
        launch("votes", vote_often, {dim3(1), dim3(50)}, out.data());
        expect(out == std::vector<int>(100, 1), "every vote counts once, for everybody");
    }
}

void test_warp_operations() {
    const auto in = counted(64);
    std::vector<float> out(64);
    launch("sum", sum_by_shuffles, {dim3(1), dim3(64)}, in.data(), out.data());
    for (std::size_t i = 0; i < 64; ++i) {
        float wanted = 0;
        for (std::size_t lane = 0; lane < 32; ++lane) {
            wanted += in[i / 32 * 32 + lane];
        }
        expect(std::fabs(out[i] - wanted) < 1e-3f, "a butterfly of shuffles sums each warp");
    }
    launch("shift", shift_down, {dim3(1), dim3(64)}, in.data(), out.data(), 5u);
    for (std::size_t i = 0; i < 64; ++i) {
        expect(out[i] == (i % 32 + 5 < 32 ? in[i + 5] : in[i]), "shfl_down reads five lanes on, or itself");
    }
    std::vector<unsigned> votes(32);
    launch("vote", vote, {dim3(1), dim3(32)}, votes.data());
    for (const unsigned found : votes) {
        expect(found == 0x49249249u, "a ballot holds the lanes that said yes");
    }
    std::vector<int> halves(16);
    launch("half", half_warp, {dim3(1), dim3(32)}, halves.data());
    for (const int found : halves) {
        expect(found == 15, "half a warp may talk when the mask names it");
    }
}

void test_mistakes_are_sentences() {
    expect(holds(error_of([] { launch("some", barrier_for_some, {dim3(1), dim3(32)}); }), "nobody can go on"),
           "a barrier nobody can pass is found");
    expect(holds(error_of([] { launch("self", mask_without_self, {dim3(1), dim3(32)}); }), "does not name it"),
           "a mask without its caller is found");
    std::vector<int> out(32);
    expect(holds(error_of([&] { launch("outside", shuffle_from_outside, {dim3(1), dim3(32)}, out.data()); }),
                 "reads lane 9"),
           "a shuffle from a lane outside the mask is found");
    expect(
        holds(error_of([&] { launch("big", number_threads, {dim3(1), dim3(1025)}, out.data()); }), "no device takes"),
        "a block of 1025 threads is refused");
    expect(holds(error_of([&] { launch("big", number_threads, {dim3(1), dim3(1), 200000}, out.data()); }),
                 "bytes of shared memory"),
           "too much shared memory is refused");
    expect(holds(error_of([] { (void)cuda_on_cpu::thread_index(); }), "outside a kernel"),
           "device functions belong into kernels");
    alignas(16) unsigned char bytes[32] = {};
    expect(holds(error_of([&] { (void)rep_fast::cuda::ptx::load_16(bytes + 8); }), "not a multiple of the size"),
           "16 bytes from an address between two multiples of 16 are found");
    expect(holds(error_of([&] { rep_fast::cuda::ptx::store_8(bytes + 4, {}); }), "not a multiple of the size"),
           "8 bytes to an address between two multiples of 8 are found");
    // and the executor still works afterwards
    std::vector<int> once(4);
    launch("number_threads", number_threads, {dim3(1), dim3(4)}, once.data());
    expect(once == std::vector<int>(4, 1), "an error leaves the executor usable");
}

void test_asynchronous_copies() {
    const auto in = counted(64);
    std::vector<float> out(64);
    launch("copy", copy_in_stages<true>, {dim3(1), dim3(32), sizeof(Staged)}, in.data(), out.data());
    expect(std::memcmp(in.data(), out.data(), 64 * sizeof(float)) == 0, "copies land at their wait");
    launch("copy", copy_in_stages<false>, {dim3(1), dim3(32), sizeof(Staged)}, in.data(), out.data());
    for (const float value : out) {
        expect(std::isnan(value) || value == 0.0f, "what is read before the wait is not there yet");
    }
    expect(holds(error_of([&] { launch("forget", forget_a_copy, {dim3(1), dim3(32), sizeof(Staged)}, in.data()); }),
                 "before its asynchronous copies"),
           "a copy nobody waits for is found");
}

void test_shared_memory_is_poisoned() {
    bool is_nan_seen = false, is_zero_seen = false;
    for (std::uint64_t seed = 0; seed < 16; ++seed) {
        cuda_on_cpu::set_seed(seed);
        std::vector<float> out(64, 1.0f);
        launch("read", read_uninitialised, {dim3(1), dim3(64), sizeof(Staged)}, out.data());
        for (const float value : out) {
            expect(std::isnan(value) || value == 0.0f, "shared memory begins as NaN or zero");
            is_nan_seen |= std::isnan(value);
            is_zero_seen |= value == 0.0f;
        }
    }
    expect(is_nan_seen && is_zero_seen, "both fillings occur");
}

void test_blocks_of_a_cooperative_launch_wait_for_each_other() {
    const auto together = [](unsigned n_blocks) {
        return rep_fast::cuda::LaunchShape{.grid = dim3(n_blocks), .block = dim3(40), .is_cooperative = true};
    };
    const auto asked = [&](auto kernel) {
        std::vector<int> numbers(3), out(120);
        int n_arrived = 0;
        launch("ask", kernel, together(3), numbers.data(), &n_arrived, out.data());
        bool is_right = true;
        for (std::size_t i = 0; i < out.size(); ++i) {
            is_right &= out[i] == 1 + static_cast<int>((i / 40 + 1) % 3);
        }
        return is_right;
    };
    bool is_missing_wait_seen = false;
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
        cuda_on_cpu::set_seed(seed);
        expect(asked(ask_neighbour<true>), "behind a barrier of all blocks their numbers are there");
        is_missing_wait_seen |= !asked(ask_neighbour<false>);
    }
    expect(is_missing_wait_seen, "without it some are not");
    int number = 0;
    expect(holds(error_of([&] { launch("wait", wait_for_a_number, together(2), &number); }), "waits for a condition"),
           "a number that nobody raises is found");
    expect(holds(error_of([&] { launch("wait", wait_for_a_number, together(4), &number); }), "wait for each other"),
           "more blocks than run at once are refused");
}

}  // namespace

void test_executor() {
    test_every_thread_runs_once();
    test_barriers_and_shared_memory();
    test_blocks_overtake_each_other();
    test_block_votes();
    test_warp_operations();
    test_mistakes_are_sentences();
    test_blocks_of_a_cooperative_launch_wait_for_each_other();
    test_asynchronous_copies();
    test_shared_memory_is_poisoned();
}

void write_past_the_end_of_shared_memory() {
    launch("past", write_past_the_end, {dim3(1), dim3(1), sizeof(Staged)}, 0);
}
