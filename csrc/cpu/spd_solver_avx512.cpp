// AVX-512 body of spd_solver. Internal linkage only, no standard library: see core/dispatch.h.
#include "cpu/simd_avx512.h"
#include "cpu/spd_solver.h"
#include "cpu/subtract_tile.h"

namespace rep_fast::avx512 {
namespace {

void subtract_float32(const Subtraction<float>& task, std::int64_t n_cols) {
    subtract<Simd>(task, n_cols);
}

void subtract_float64(const Subtraction<double>& task, std::int64_t n_cols) {
    subtract<Simd64>(task, n_cols);
}

void widen(const float* from, std::int64_t n, double* to) {
    std::int64_t i = 0;
    for (; i + Simd64::kLanes <= n; i += Simd64::kLanes) {
        Simd64::store(to + i, Simd64::widen(from + i));
    }
    for (; i < n; ++i) {
        to[i] = static_cast<double>(from[i]);
    }
}

}  // namespace

constinit const SpdSolverKernels kSpdSolver = {
    .float32 = subtract_of<Simd>(subtract_float32), .float64 = subtract_of<Simd64>(subtract_float64), .widen = widen};

}  // namespace rep_fast::avx512
