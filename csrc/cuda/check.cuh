// REP_FAST_CUDA_CHECK(call): a failing call of the CUDA runtime becomes an Error with CUDA's own name for it.
#pragma once

#include <cuda_runtime.h>

#include "core/error.h"

#define REP_FAST_CUDA_CHECK(call)                                                                                    \
    do {                                                                                                             \
        const cudaError_t rep_fast_status = (call);                                                                  \
        REP_FAST_CHECK(rep_fast_status == cudaSuccess, #call << " failed: " << cudaGetErrorName(rep_fast_status)     \
                                                             << " (" << cudaGetErrorString(rep_fast_status) << ")"); \
    } while (false)
