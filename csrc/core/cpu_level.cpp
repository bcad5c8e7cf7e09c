#include "core/cpu_level.h"

#include <cpuid.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "core/error.h"

namespace rep_fast {
namespace {

constexpr std::array<const char*, kCpuLevels> kNames = {"portable", "avx2", "avx512", "avx512_bf16"};

struct CpuId {
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuId cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
    CpuId id;
    __get_cpuid_count(leaf, subleaf, &id.eax, &id.ebx, &id.ecx, &id.edx);  // leaves zeros when the leaf is unknown
    return id;
}

constexpr bool has(std::uint32_t word, std::initializer_list<int> bits) {
    return std::all_of(bits.begin(), bits.end(), [word](int bit) { return (word >> bit & 1u) != 0; });
}

// XCR0: which registers the operating system saves. Only to be read where CPUID reports OSXSAVE.
std::uint32_t saved_registers() {
    std::uint32_t eax = 0;
    std::uint32_t edx = 0;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return eax;
}

}  // namespace

const char* cpu_level_name(CpuLevel level) {
    return kNames[static_cast<std::size_t>(level)];
}

CpuLevel parse_cpu_level(std::string_view name) {
    const auto found = std::find(kNames.begin(), kNames.end(), name);
    REP_FAST_CHECK(found != kNames.end(),
                   "instruction set '" << name << "' is unknown; use portable, avx2, avx512 or avx512_bf16");
    return static_cast<CpuLevel>(found - kNames.begin());
}

CpuLevel machine_cpu_level() {
    const CpuId basic = cpuid(1, 0);
    constexpr int kFma = 12, kOsxsave = 27, kAvx = 28, kF16c = 29;
    if (!has(basic.ecx, {kFma, kOsxsave, kAvx, kF16c}) || !has(saved_registers(), {1, 2})) {
        return CpuLevel::kPortable;
    }
    const CpuId extended = cpuid(7, 0);
    constexpr int kAvx2Bit = 5;
    if (!has(extended.ebx, {kAvx2Bit})) {
        return CpuLevel::kPortable;
    }
    constexpr int kF = 16, kDq = 17, kCd = 28, kBw = 30, kVl = 31;
    if (!has(extended.ebx, {kF, kDq, kCd, kBw, kVl}) || !has(saved_registers(), {5, 6, 7})) {
        return CpuLevel::kAvx2;
    }
    constexpr int kBf16Bit = 5, kVnniBit = 11;
    const bool has_dots = has(cpuid(7, 1).eax, {kBf16Bit}) && has(extended.ecx, {kVnniBit});
    return has_dots ? CpuLevel::kAvx512Bf16 : CpuLevel::kAvx512;
}

CpuLevel resolve_cpu_level(std::string_view cap) {
    // asked once: CPUID leaves the guest on a virtual machine, which costs more than a small op
    static const CpuLevel machine = machine_cpu_level();
    return cap.empty() ? machine : std::min(machine, parse_cpu_level(cap));
}

}  // namespace rep_fast
