// The module rep_fast._C: names only. Each op's binding stands in the file of its name.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "core/cpu_level.h"
#include "core/error.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    using rep_fast::CpuLevel;
    m.doc() = "Native kernels of rep_fast; call them through rep_fast.ops, which checks the arguments.";

    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            std::rethrow_exception(thrown);
        } catch (const rep_fast::Error& error) {
            py::set_error(PyExc_ValueError, error.what());
        }
    });

    // Levels cross the border as the enum's number, the row of every dispatch table.
    m.def("machine_level", [] { return static_cast<int>(rep_fast::machine_cpu_level()); });
    m.def("resolve_level", [](const std::string& cap) { return static_cast<int>(rep_fast::resolve_cpu_level(cap)); });
    m.def("level_name", [](int level) {
        REP_FAST_CHECK(level >= 0 && level < rep_fast::kCpuLevels, "level " << level << " is unknown");
        return rep_fast::cpu_level_name(static_cast<CpuLevel>(level));
    });

    // op → for every level the level whose body runs there
    m.attr("body_levels") = py::dict();
    rep_fast::python::bind_packed_scores(m);
    rep_fast::python::bind_gated_adapter(m);
    rep_fast::python::bind_accumulate_moment(m);
    rep_fast::python::bind_spd_solver(m);
    rep_fast::python::bind_whitened_topk(m);
    rep_fast::python::bind_ceilings(m);
}
