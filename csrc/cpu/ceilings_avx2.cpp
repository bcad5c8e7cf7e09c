// Multiply-adds of 8 float32. Internal linkage only, no standard library: see core/dispatch.h.
#include "cpu/ceiling_loop.h"
#include "cpu/simd_avx2.h"

namespace rep_fast::avx2 {

constinit const CeilingKernels kCeilings = {.float32 = kMultiplyAdd<Simd>, .bf16 = {}, .int8 = {}};

}  // namespace rep_fast::avx2
