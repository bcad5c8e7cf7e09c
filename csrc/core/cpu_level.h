// The instruction sets kernels are written for, found once and capped by name at every call.
#pragma once

#include <string_view>

namespace rep_fast {

// Ordered: a machine with one level has all the levels before it. The value is the row of every dispatch table.
enum class CpuLevel : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
inline constexpr int kCpuLevels = 4;

// portable, avx2 (AVX2 + FMA + F16C), avx512 (F, BW, CD, DQ, VL), avx512_bf16 (with VNNI, as every such processor).
const char* cpu_level_name(CpuLevel level);

// The level of that name; throws Error naming the known ones.
CpuLevel parse_cpu_level(std::string_view name);

// Highest level that both the processor and the operating system (saved registers) offer.
CpuLevel machine_cpu_level();

// The machine's level lowered to `cap`; an empty cap lowers nothing, a cap above the machine neither.
CpuLevel resolve_cpu_level(std::string_view cap);

}  // namespace rep_fast
