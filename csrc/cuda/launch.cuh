// How kernels are launched and where they find shared memory: the two places that differ between a device and the
// executor of tests/cuda_on_cpu, which runs the same source on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <tuple>
#include <utility>

#include "cuda/check.cuh"

namespace rep_fast::cuda {

struct LaunchShape {
    dim3 grid;
    dim3 block;
    std::size_t shared_bytes = 0;  // all shared memory is dynamic: its layout is a struct, see shared_as()
    cudaStream_t stream = nullptr;
    bool is_for_hopper = false;   // sm_90a alone, whose blocks may have more shared memory; for the executor to know
    bool is_cooperative = false;  // its blocks wait for each other: all of them run at once, or the launch is refused
};

// Of the thread's device; as many persistent blocks run at once.
inline int n_multiprocessors() {
    int device = 0, count = 0;
    REP_FAST_CUDA_CHECK(cudaGetDevice(&device));
    REP_FAST_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

#ifdef REP_FAST_CUDA_ON_CPU

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, Arguments&&... arguments) {
    std::tuple<Parameters...> passed(std::forward<Arguments>(arguments)...);
    cuda_on_cpu::run_grid(name, shape.grid, shape.block, shape.shared_bytes, [&] { std::apply(kernel, passed); },
                          {.is_for_hopper = shape.is_for_hopper, .is_cooperative = shape.is_cooperative});
}

template <class... Parameters>
int blocks_at_once(void (*)(Parameters...), int, std::size_t) {
    return static_cast<int>(cuda_on_cpu::kResidentBlocks);
}

template <class Layout>
Layout& shared_as() {
    return *static_cast<Layout*>(cuda_on_cpu::shared_memory());
}

#else

// The arguments are converted to the kernel's parameters, the shared memory is allowed for, and a launch that the
// device refuses throws. Nothing is synchronised: errors of the running kernel appear where the caller waits.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, Arguments&&... arguments) {
    constexpr std::size_t kWithoutAsking = 48 * 1024;
    const auto* function = reinterpret_cast<const void*>(kernel);
    if (shape.shared_bytes > kWithoutAsking) {
        REP_FAST_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(shape.shared_bytes)));
    }
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = shape.stream;
    config.attrs = &attribute;
    config.numAttrs = shape.is_cooperative ? 1 : 0;
    std::tuple<Parameters...> passed(std::forward<Arguments>(arguments)...);
    std::apply(
        [&](auto&... parameters) {
            void* addresses[] = {const_cast<void*>(static_cast<const void*>(&parameters))..., nullptr};
            const cudaError_t status = cudaLaunchKernelExC(&config, function, addresses);
            REP_FAST_CHECK(status == cudaSuccess, "launch of " << name << " failed: " << cudaGetErrorName(status));
        },
        passed);
}

// How many blocks of a kernel run at once on the thread's device: a cooperative launch has no more. Shared memory up to
// 48 KiB.
template <class... Parameters>
int blocks_at_once(void (*kernel)(Parameters...), int n_threads, std::size_t shared_bytes) {
    int of_one = 0;
    REP_FAST_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_one, reinterpret_cast<const void*>(kernel),
                                                                      n_threads, shared_bytes));
    return of_one * n_multiprocessors();
}

// The block's dynamic shared memory as one struct; sizeof(Layout) is what the launch asks for. It begins where a tile
// with the 128-byte swizzle may.
template <class Layout>
__device__ Layout& shared_as() {
    extern __shared__ __align__(1024) unsigned char rep_fast_shared[];
    return *reinterpret_cast<Layout*>(rep_fast_shared);
}

#endif

}  // namespace rep_fast::cuda
