// rep_fast_cuda_on_cpu_tests [past-the-end]: runs the CUDA kernels' source on the CPU.
#include <cstdio>
#include <cstring>

#include "tests.h"

int main(int argc, char** argv) {
    if (argc > 1 && std::strcmp(argv[1], "past-the-end") == 0) {
        write_past_the_end_of_shared_memory();
        return 0;
    }
    test_executor();
    test_accumulate_moment();
    test_accumulate_moment_sm90a();
    test_hopper_instructions();
    test_fused_scan();
    test_fused_scan_int8();
    test_gated_adapter();
    test_gated_adapter_choice();
    test_number();
    test_packed_scores();
    test_quantised_rows();
    test_transposed_products();
    test_triangular_solve();
    test_whitened_topk();
    std::printf("cuda on cpu: passed\n");
    return 0;
}
