// mbarrier: a barrier in shared memory on which threads arrive and bulk copies count their bytes (sm_90). It goes
// through phases; a phase is complete when all arrivals it expects have come and as many bytes as were announced, and
// the next one begins at once. Phases have parities 0, 1, 0, … from the first on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace rep_fast::cuda::ptx {

#ifdef REP_FAST_CUDA_ON_CPU

namespace detail {

// What is in the word is the device's own affair; it counts further.
struct Barrier {
    std::int32_t bytes;
    std::uint16_t pending;
    std::uint8_t expected;
    std::uint8_t parity;
};
static_assert(sizeof(Barrier) == sizeof(std::uint64_t));

inline Barrier read(const std::uint64_t* barrier) {
    return cuda_on_cpu::from_word<Barrier>(*barrier);
}

// Writes it back, in its next phase where this one is complete.
inline void settle(std::uint64_t* barrier, Barrier state) {
    if (state.pending == 0 && state.bytes == 0) {
        state.parity ^= 1;
        state.pending = state.expected;
    }
    *barrier = cuda_on_cpu::as_word(state);
}

inline void arrive(std::uint64_t* barrier, unsigned announced) {
    Barrier state = read(barrier);
    if (state.pending == 0 || state.expected == 0) {
        throw cuda_on_cpu::ExecutionError("mbarrier: more arrivals than the phase expects, or no mbarrier.init");
    }
    state.bytes += static_cast<std::int32_t>(announced);
    --state.pending;
    settle(barrier, state);
}

// What a bulk copy does when it has landed.
inline void complete_bytes(std::uint64_t* barrier, unsigned landed) {
    Barrier state = read(barrier);
    state.bytes -= static_cast<std::int32_t>(landed);
    settle(barrier, state);
}

}  // namespace detail

inline void mbarrier_init(std::uint64_t* barrier, unsigned n_arrivals) {
    if (cuda_on_cpu::shared_offset(barrier) % sizeof(std::uint64_t) != 0) {
        throw cuda_on_cpu::ExecutionError("mbarrier: the address is not a multiple of 8");
    }
    const auto expected = static_cast<std::uint8_t>(n_arrivals);
    *barrier = cuda_on_cpu::as_word(detail::Barrier{0, expected, expected, 0});
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(std::uint64_t* barrier) {
    detail::arrive(barrier, 0);
}
inline void mbarrier_arrive_expect_tx(std::uint64_t* barrier, unsigned n_bytes) {
    detail::arrive(barrier, n_bytes);
}
inline bool mbarrier_try_wait_parity(std::uint64_t* barrier, unsigned parity) {
    cuda_on_cpu::wait_until([=] { return detail::read(barrier).parity != parity; });
    return true;
}

#else

// mbarrier.init.shared::cta.b64 [barrier], n_arrivals: phase 0 begins, which expects so many arrivals, as will all
// others.
__device__ inline void mbarrier_init(std::uint64_t* barrier, unsigned n_arrivals) {
    const auto at = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(n_arrivals) : "memory");
}

// fence.mbarrier_init.release.cluster: barriers initialised before are there for bulk copies; for other threads after a
// barrier behind it.
__device__ inline void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive.shared::cta.b64 _, [barrier]: one arrival, behind what this thread has read and written.
__device__ inline void mbarrier_arrive(std::uint64_t* barrier) {
    const auto at = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

// mbarrier.arrive.expect_tx.shared::cta.b64 _, [barrier], n_bytes: announces bytes for this phase, then arrives.
__device__ inline void mbarrier_arrive_expect_tx(std::uint64_t* barrier, unsigned n_bytes) {
    const auto at = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(n_bytes) : "memory");
}

// mbarrier.try_wait.parity.shared::cta.b64: waits a while for the phase of this parity that is under way, or was the
// last; tells whether it is complete.
__device__ inline bool mbarrier_try_wait_parity(std::uint64_t* barrier, unsigned parity) {
    const auto at = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
    unsigned is_complete;
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.b32 %0, 1, 0, complete;\n"
        "}\n"
        : "=r"(is_complete)
        : "r"(at), "r"(parity)
        : "memory");
    return is_complete != 0;
}

#endif

}  // namespace rep_fast::cuda::ptx
