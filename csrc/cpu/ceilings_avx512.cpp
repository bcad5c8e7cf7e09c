// Multiply-adds of 16 float32. Internal linkage only, no standard library: see core/dispatch.h.
#include "cpu/ceiling_loop.h"
#include "cpu/simd_avx512.h"

namespace rep_fast::avx512 {

constinit const CeilingLoop kFloat32Ceiling = kMultiplyAdd<Simd>;

}  // namespace rep_fast::avx512
