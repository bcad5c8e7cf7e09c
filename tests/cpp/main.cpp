// rep_fast_tests [expected level]: runs every test at every instruction set of the machine. With an argument it also
// checks that this machine (or emulator) is seen as having exactly that level.
#include <cstdio>

#include "check.h"
#include "tests.h"

int main(int argc, char** argv) {
    using namespace rep_fast;
    const CpuLevel machine = machine_cpu_level();
    if (argc > 1 && machine != parse_cpu_level(argv[1])) {
        std::fprintf(stderr, "expected the level %s, found %s\n", argv[1], cpu_level_name(machine));
        return 1;
    }
    tests::test_core();
    tests::test_candidates();
    for (int level = 0; level <= static_cast<int>(machine); ++level) {
        tests::test_whitened_topk(static_cast<CpuLevel>(level));
        tests::test_pass_choice(static_cast<CpuLevel>(level));
        tests::test_dither(static_cast<CpuLevel>(level));
        tests::test_ceilings(static_cast<CpuLevel>(level));
        tests::test_gated_adapter(static_cast<CpuLevel>(level));
        tests::test_accumulate_moment(static_cast<CpuLevel>(level));
        tests::test_packed_scores(static_cast<CpuLevel>(level));
        tests::test_spd_solver(static_cast<CpuLevel>(level));
        std::printf("%s: passed\n", cpu_level_name(static_cast<CpuLevel>(level)));
    }
    return 0;
}
