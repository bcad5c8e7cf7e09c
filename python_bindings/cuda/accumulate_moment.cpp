#include "cuda/accumulate_moment.h"

#include "core/matrix_view.h"
#include "cuda/accumulate_moment_sm90a.h"
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

struct MomentArgs {
    cuda::MomentKeys keys;
    const bool* counts;
    MatrixView<double> total;
};

MomentArgs moment_args(DeviceArgs& args, const py::object& keys, const py::object& counts, const py::object& total) {
    const MomentArgs given = {keys_arg(args, keys), args.optional_vector<const bool>(counts, "counts"),
                              args.take(total, "total").matrix<double>()};
    REP_FAST_CHECK(given.total.rows == given.keys.key_dim && given.total.cols == given.keys.key_dim,
                   "total is " << given.total.rows << " × " << given.total.cols << ", the keys are "
                               << given.keys.key_dim << " wide");
    return given;
}

void run_accumulate(const py::object& keys, const py::object& counts, const py::object& total, std::uintptr_t stream) {
    DeviceArgs args;
    const MomentArgs given = moment_args(args, keys, counts, total);
    const Launching launching(args);
    cuda::accumulate_moment(given.keys, given.counts, given.total.data, given.total.row_stride, stream_arg(stream));
}

bool can_accumulate_by_wgmma(const py::object& keys) {
    DeviceArgs args;
    return cuda::can_accumulate_by_wgmma(keys_arg(args, keys));
}

void run_accumulate_by_wgmma(const py::object& keys, const py::object& counts, const py::object& total,
                             int tile_columns, std::uintptr_t stream) {
    DeviceArgs args;
    const MomentArgs given = moment_args(args, keys, counts, total);
    const Launching launching(args);
    cuda::accumulate_moment_by_wgmma(given.keys, given.counts, given.total.data, given.total.row_stride, tile_columns,
                                     stream_arg(stream));
}

}  // namespace

void bind_cuda_accumulate_moment(py::module_& m) {
    m.attr("bodies").cast<py::list>().append("accumulate_moment");
    m.def("count_tokens", &count_tokens, py::kw_only(), py::arg("keys"), py::arg("mask"), py::arg("counts"),
          py::arg("counters"), py::arg("stream"));
    m.def("accumulate_moment", &run_accumulate, py::kw_only(), py::arg("keys"), py::arg("counts"), py::arg("total"),
          py::arg("stream"));
    m.def("can_accumulate_by_wgmma", &can_accumulate_by_wgmma, py::kw_only(), py::arg("keys"));
    m.def("accumulate_moment_by_wgmma", &run_accumulate_by_wgmma, py::kw_only(), py::arg("keys"), py::arg("counts"),
          py::arg("total"), py::arg("tile_columns"), py::arg("stream"));
}

}  // namespace rep_fast::python
