// One function per test file, called by main.cpp.
#pragma once

void test_accumulate_moment();
void test_accumulate_moment_sm90a();
void test_executor();
void test_fused_scan();
void test_fused_scan_int8();
void test_gated_adapter();
void test_gated_adapter_choice();
void test_hopper_instructions();
void test_number();
void test_packed_scores();
void test_quantised_rows();
void test_transposed_products();
void test_triangular_solve();
void test_whitened_topk();
// Dies at an unreadable page; tests/cpp/run_checks.sh looks for that.
void write_past_the_end_of_shared_memory();
