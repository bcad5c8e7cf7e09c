#include "cuda/accumulate_moment.h"

#include "core/matrix_view.h"
#include "cuda/bindings.h"
#include "cuda/device_args.h"

namespace rep_fast::python {
namespace {

cuda::MomentKeys keys_arg(DeviceArgs& args, const py::object& tensor) {
    const RowsArg keys = args.rows(tensor, "keys");
    return {keys.data, keys.dtype, keys.rows, keys.cols, keys.row_stride};
}

// counters: tokens that count, tokens with a NaN or infinity, the first of those.
void count_tokens(const py::object& keys, const py::object& mask, const py::object& counts, const py::object& counters,
                  std::uintptr_t stream) {
    DeviceArgs args;
    const cuda::MomentKeys rows = keys_arg(args, keys);
    const bool* const is_wanted = args.optional_vector<const bool>(mask, "mask");
    auto* const numbers = args.vector<std::int64_t>(counters, "counters");
    const cuda::TokenCounts found = {args.vector<bool>(counts, "counts"), numbers, numbers + 1, numbers + 2};
    const Launching launching(args);
    cuda::count_tokens(rows, is_wanted, 0, found, stream_arg(stream));
}

void run_accumulate(const py::object& keys, const py::object& counts, const py::object& total, std::uintptr_t stream) {
    DeviceArgs args;
    const cuda::MomentKeys rows = keys_arg(args, keys);
    const bool* const is_counted = args.optional_vector<const bool>(counts, "counts");
    const auto sum = args.take(total, "total").matrix<double>();
    REP_FAST_CHECK(sum.rows == rows.key_dim && sum.cols == rows.key_dim,
                   "total is " << sum.rows << " × " << sum.cols << ", the keys are " << rows.key_dim << " wide");
    const Launching launching(args);
    cuda::accumulate_moment(rows, is_counted, sum.data, sum.row_stride, stream_arg(stream));
}

}  // namespace

void bind_cuda_accumulate_moment(py::module_& m) {
    m.attr("bodies").cast<py::list>().append("accumulate_moment");
    m.def("count_tokens", &count_tokens, py::kw_only(), py::arg("keys"), py::arg("mask"), py::arg("counts"),
          py::arg("counters"), py::arg("stream"));
    m.def("accumulate_moment", &run_accumulate, py::kw_only(), py::arg("keys"), py::arg("counts"), py::arg("total"),
          py::arg("stream"));
}

}  // namespace rep_fast::python
