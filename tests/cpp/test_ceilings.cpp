#include <cstring>

#include "check.h"
#include "core/error.h"
#include "cpu/ceilings.h"
#include "tests.h"

namespace rep_fast::tests {

// Rates themselves are not tested: only that every loop runs, and that what is not there says so.
void test_ceilings(CpuLevel level) {
    const bool has_dots = level == CpuLevel::kAvx512Bf16;
    EXPECT(product_rate(Product::kFloat32, level, 2, 1e-3) > 0.0);
    EXPECT((product_rate(Product::kBf16, level, 1, 1e-3) > 0.0) == has_dots);
    EXPECT((product_rate(Product::kInt8, level, 1, 1e-3) > 0.0) == has_dots);
    const CeilingLoop& loop = at_level(ceilings_table(), level).kernels.float32;
    // x ← 0.999x + 0.001 leaves 1 where it is and comes near it from anywhere: twelve sums end at twelve
    EXPECT(loop.run(100'000) > 11.9f && loop.run(100'000) < 12.1f);
    for (const auto transfer : {Transfer::kRead, Transfer::kCopy}) {
        EXPECT(transfer_rate(transfer, 1 << 23, 2, 1e-3) > 0.0);
        try {
            transfer_rate(transfer, 1 << 20, 1, 1e-3);
            EXPECT(false);
        } catch (const Error& error) {
            EXPECT(std::strstr(error.what(), "at least 2 MiB") != nullptr);
        }
    }
}

}  // namespace rep_fast::tests
