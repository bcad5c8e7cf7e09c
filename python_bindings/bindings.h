// One function per op, each defined in the file of the op's name and called by module.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include "core/dispatch.h"

namespace rep_fast::python {

void bind_packed_scores(pybind11::module_& m);
void bind_gated_adapter(pybind11::module_& m);
void bind_accumulate_moment(pybind11::module_& m);
void bind_spd_solver(pybind11::module_& m);
void bind_whitened_topk(pybind11::module_& m);
void bind_ceilings(pybind11::module_& m);

// Tells rep_fast.backend() which levels of an op have a body of their own.
template <class Kernels>
void register_bodies(pybind11::module_& m, const char* op, const DispatchTable<Kernels>& table) {
    pybind11::list levels;
    for (const auto& body : table) {
        levels.append(static_cast<int>(body.level));
    }
    m.attr("body_levels")[op] = levels;
}

}  // namespace rep_fast::python
