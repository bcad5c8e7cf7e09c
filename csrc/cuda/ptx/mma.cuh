// Products of 16-bit tiles by a warp (sm_80 and up): mma.sync.m16n8k16, and ldmatrix, which brings its operands from
// shared memory. With g = lane / 4 and t = lane % 4 a lane holds, two neighbours to a register,
//   a[0] row g, k 2t and 2t + 1;   a[1] row g + 8, same k;   a[2] row g, k 2t + 8 and 2t + 9;   a[3] row g + 8, same k
//   b[0] k 2t and 2t + 1, column g;   b[1] k 2t + 8 and 2t + 9, column g
//   c[0], c[1] row g, columns 2t and 2t + 1;   c[2], c[3] row g + 8, same columns.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "core/dtype.h"

namespace rep_fast::cuda::ptx {

#ifdef REP_FAST_CUDA_ON_CPU

namespace detail {

template <class T>
double half_of(unsigned word, int upper) {
    return static_cast<double>(to_float(T{static_cast<std::uint16_t>(word >> (16 * upper))}));
}

// Order and rounding of the sum are the device's own: here it is exact and then cut off, the least kind way.
inline float cut_off(double value) {
    const auto rounded = static_cast<float>(value);
    return std::abs(static_cast<double>(rounded)) > std::abs(value) ? std::nextafter(rounded, 0.0f) : rounded;
}

struct Operands {
    unsigned a[4], b[2];
};

template <class T>
void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const Operands mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    Operands all[cuda_on_cpu::kWarpSize];
    cuda_on_cpu::exchange_bytes(0xffffffffu, &mine, all, sizeof(Operands));
    const unsigned g = cuda_on_cpu::lane() / 4, t = cuda_on_cpu::lane() % 4;
    for (unsigned entry = 0; entry < 4; ++entry) {
        const unsigned column = 2 * t + entry % 2;
        double sum = static_cast<double>(c[entry]);
        for (unsigned k = 0; k < 16; ++k) {
            const unsigned holder = k % 8 / 2, upper = k % 2, is_late = k / 8;
            sum += half_of<T>(all[4 * g + holder].a[2 * is_late + entry / 2], static_cast<int>(upper)) *
                   half_of<T>(all[4 * column + holder].b[is_late], static_cast<int>(upper));
        }
        c[entry] = cut_off(sum);
    }
}

}  // namespace detail

inline void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], BFloat16) {
    detail::multiply<BFloat16>(c, a, b);
}
inline void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], Float16) {
    detail::multiply<Float16>(c, a, b);
}

inline void load_transposed(unsigned (&registers)[4], const void* row) {
    const cuda_on_cpu::WarpWords rows = cuda_on_cpu::exchange(0xffffffffu, reinterpret_cast<std::uintptr_t>(row));
    const unsigned g = cuda_on_cpu::lane() / 4, t = cuda_on_cpu::lane() % 4;
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
        registers[matrix] = 0;
        for (unsigned upper = 0; upper < 2; ++upper) {
            const std::uint64_t address = rows[8 * matrix + 2 * t + upper];
            if (address % 16 != 0) {
                throw cuda_on_cpu::ExecutionError("ldmatrix: a row's address is not a multiple of 16");
            }
            const unsigned element = reinterpret_cast<const std::uint16_t*>(address)[g];
            registers[matrix] |= element << (16 * upper);
        }
    }
}

#else

// mma.sync.aligned.m16n8k16.row.col: c += a b, products exact, sums in float32 in an order and with a rounding of the
// device's own (it cuts off). The last argument says what the registers hold.
__device__ inline void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], BFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], Float16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16: four 8 × 8 matrices of 16-bit elements; lanes 8 i … 8 i + 7 give the
// addresses (multiples of 16) of the rows of matrix i, of whose rows 2t and 2t + 1 every lane gets column g.
__device__ inline void load_transposed(unsigned (&registers)[4], const void* row) {
    const auto from = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(from)
                 : "memory");
}

#endif

}  // namespace rep_fast::cuda::ptx
