// One function per op, each defined in the file of the op's name and called by module.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace rep_fast::python {

void bind_cuda_accumulate_moment(pybind11::module_& m);
void bind_cuda_fused_scan(pybind11::module_& m);
void bind_cuda_gated_adapter(pybind11::module_& m);
void bind_cuda_packed_scores(pybind11::module_& m);
void bind_cuda_spd_solver(pybind11::module_& m);
void bind_cuda_whitened_topk(pybind11::module_& m);

}  // namespace rep_fast::python
