// What the processor can do at most: rates of multiply-add instructions from registers, and of memory.
#pragma once

#include <cstdint>

#include "core/dispatch.h"

namespace rep_fast {

// Multiply-adds counted as two operations each.
enum class Product : int { kFloat32 = 0, kBf16 = 1, kInt8 = 2 };
enum class Transfer : int { kRead = 0, kCopy = 1 };

// Operations per second of n_threads threads together over about `seconds`; 0 where the level has no such instruction.
double product_rate(Product product, CpuLevel level, int n_threads, double seconds);

// Bytes per second (a copy counts reads and writes) over n_bytes of memory, which should exceed every cache.
double transfer_rate(Transfer transfer, std::int64_t n_bytes, int n_threads, double seconds);

// Enough independent sums to hide the latency of two instructions per cycle.
inline constexpr int kCeilingSums = 12;

// kCeilingSums multiply-adds per round; returns a number that depends on all of them.
struct CeilingLoop {
    float (*run)(std::int64_t rounds) = nullptr;
    std::int64_t operations_per_round = 0;
};

struct CeilingKernels {
    CeilingLoop float32;
    CeilingLoop bf16;
    CeilingLoop int8;
};

const DispatchTable<CeilingKernels>& ceilings_table();

namespace avx2 {
extern const CeilingKernels kCeilings;
}
namespace avx512 {
extern const CeilingLoop kFloat32Ceiling;
}
namespace avx512_bf16 {
extern const CeilingLoop kBf16Ceiling;
extern const CeilingLoop kInt8Ceiling;
}  // namespace avx512_bf16

}  // namespace rep_fast
