// One function per test file, called by main.cpp for every instruction set of the machine.
#pragma once

#include "core/cpu_level.h"

namespace rep_fast::tests {

void test_core();
void test_candidates();
void test_whitened_topk(CpuLevel level);
void test_pass_choice(CpuLevel level);
void test_dither(CpuLevel level);
void test_accumulate_moment(CpuLevel level);
void test_ceilings(CpuLevel level);
void test_gated_adapter(CpuLevel level);
void test_packed_scores(CpuLevel level);
void test_spd_solver(CpuLevel level);

}  // namespace rep_fast::tests
