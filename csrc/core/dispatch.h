// Dispatch tables: which body of an op runs at which instruction-set level.
//
// How an op is added (stem = the op's name, the same everywhere):
//   csrc/cpu/<op>.h          the public function (plain views and sizes, CpuLevel, thread count), and
//                            struct <Op>Kernels: one function pointer per level-dependent piece of work
//   csrc/cpu/<op>.cpp        the driver (blocks, queue, heaps), the bodies of namespace portable, and the table; a
//                            large driver leaves the bodies to <op>_portable.cpp and its parts to files named by idea
//   csrc/cpu/<op>_avx2.cpp   the bodies of namespace rep_fast::avx2, compiled with -mavx2 -mfma -mf16c. It holds
//                            intrinsics and internal-linkage functions, its entry points in rep_fast::avx2 and nothing
//                            else: no standard containers or algorithms, no inline template that is not always_inline
//                            (tests/cpp/run_checks.sh looks at the symbols)
//   csrc/cpu/<op>_avx512.cpp the same for rep_fast::avx512, where it wins: -mavx512{f,bw,cd,dq,vl} beside AVX2's
//   csrc/cpu/<op>_avx512_bf16.cpp likewise with -mavx512bf16
//   python_bindings/<op>.cpp bind_<op>(module), listed in module.cpp
//   tests/cpp/test_<op>.cpp  test_<op>(), listed in main.cpp
// CMake finds the files; nothing else has to be told.
//
// A table has one row per CpuLevel, and every row is filled: where a level has no body of its own the row repeats the
// next lower body, and `level` says whose body it is, so that rep_fast.backend() can name what really runs.
#pragma once

#include <array>

#include "core/cpu_level.h"

namespace rep_fast {

template <class Kernels>
struct Body {
    CpuLevel level;  // whose body stands in this row
    Kernels kernels;
};

template <class Kernels>
using DispatchTable = std::array<Body<Kernels>, kCpuLevels>;

// Table of an op with a portable, an AVX2 and an AVX-512 body. Others write their rows out (whitened_topk).
template <class Kernels>
constexpr DispatchTable<Kernels> table_up_to_avx512(const Kernels& portable, const Kernels& avx2,
                                                    const Kernels& avx512) {
    return {{{CpuLevel::kPortable, portable},
             {CpuLevel::kAvx2, avx2},
             {CpuLevel::kAvx512, avx512},
             {CpuLevel::kAvx512, avx512}}};
}

template <class Kernels>
const Body<Kernels>& at_level(const DispatchTable<Kernels>& table, CpuLevel level) {
    return table[static_cast<std::size_t>(level)];
}

}  // namespace rep_fast
