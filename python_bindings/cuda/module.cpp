// The module rep_fast._C_cuda: names only. Importing it calls nothing of CUDA, so it imports on machines without a
// driver. The tests build it a second time, with the executor in the device's place.
#include <pybind11/pybind11.h>

#include "core/error.h"
#include "cuda/bindings.h"

namespace py = pybind11;

#ifdef REP_FAST_CUDA_ON_CPU
PYBIND11_MODULE(_C_cuda_on_cpu, m) {
#else
PYBIND11_MODULE(_C_cuda, m) {
#endif
    m.doc() = "CUDA kernels of rep_fast; call them through rep_fast.ops, which checks the arguments.";
    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            std::rethrow_exception(thrown);
        } catch (const rep_fast::Error& error) {
            py::set_error(PyExc_ValueError, error.what());
        }
    });
    m.attr("bodies") = py::list();  // names of the ops that have one
    rep_fast::python::bind_cuda_accumulate_moment(m);
    rep_fast::python::bind_cuda_fused_scan(m);
    rep_fast::python::bind_cuda_gated_adapter(m);
    rep_fast::python::bind_cuda_packed_scores(m);
    rep_fast::python::bind_cuda_spd_solver(m);
    rep_fast::python::bind_cuda_whitened_topk(m);
}
