#include "cpu/ceilings.h"

#include "bindings.h"

namespace py = pybind11;

namespace rep_fast::python {

void bind_ceilings(py::module_& m) {
    m.def(
        "product_rate",
        [](int product, int level, int n_threads, double seconds) {
            const py::gil_scoped_release unlocked;
            return product_rate(static_cast<Product>(product), static_cast<CpuLevel>(level), n_threads, seconds);
        },
        py::arg("product"), py::arg("level"), py::arg("n_threads"), py::arg("seconds"));
    m.def(
        "transfer_rate",
        [](int transfer, std::int64_t n_bytes, int n_threads, double seconds) {
            const py::gil_scoped_release unlocked;
            return transfer_rate(static_cast<Transfer>(transfer), n_bytes, n_threads, seconds);
        },
        py::arg("transfer"), py::arg("n_bytes"), py::arg("n_threads"), py::arg("seconds"));
}

}  // namespace rep_fast::python
