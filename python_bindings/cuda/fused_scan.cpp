#include "cuda/fused_scan.h"

#include "core/matrix_view.h"
#include "cuda/bindings.h"
#include "cuda/device_args.h"
#include "cuda/selection_args.h"

namespace rep_fast::python {
namespace {

struct StepTensors {
    const py::object &values, &steps, &margins, &query_steps;
};

// The queries' side of the product, int8 where the keys are in whole steps.
void take_factor(DeviceArgs& args, const py::object& factor, int n_parts, bool is_in_steps, cuda::FusedScan& scan) {
    const auto take = [&](const auto& parts) {
        scan.factor = parts.data;
        scan.factor_stride = parts.row_stride;
        scan.n_parts = n_parts;
        scan.selection.n_queries = parts.rows / n_parts;
    };
    if (is_in_steps) {
        take(args.take(factor, "factor").matrix<const std::int8_t>());
    } else {
        take(args.take(factor, "factor").matrix<const BFloat16>());
    }
}

void take_steps(DeviceArgs& args, const StepTensors& given, cuda::FusedScan& scan) {
    const auto values = args.take(given.values, "key_values").matrix<const std::int8_t>();
    REP_FAST_CHECK(values.row_stride == values.cols && values.cols == scan.factor_stride,
                   "key_values and factor must be contiguous and of one width, got row strides "
                       << values.row_stride << " and " << scan.factor_stride);
    const auto of_keys = [&](const py::object& tensor, const char* name) {
        const auto numbers = args.take(tensor, name).vector<const float>();
        REP_FAST_CHECK(std::ssize(numbers) == scan.selection.keys.n_keys && values.rows == scan.selection.keys.n_keys,
                       name << " and key_values must be one per key, got " << numbers.size() << " and " << values.rows);
        return numbers.data();
    };
    scan.steps = {values.data, values.cols, of_keys(given.steps, "key_steps"), of_keys(given.margins, "key_margins"),
                  args.vector<const float>(given.query_steps, "query_steps")};
}

struct ScratchTensors {
    const py::object &limits, &counts, &candidates;
};

void take_scratch(DeviceArgs& args, const ScratchTensors& given, cuda::FusedScan& scan) {
    const std::int64_t n_queries = scan.selection.n_queries;
    const auto lists = args.take(given.candidates, "candidates").matrix<std::int32_t>();
    REP_FAST_CHECK(lists.row_stride == lists.cols && lists.rows == n_queries,
                   "candidates must be contiguous and a row per query, got " << lists.rows << " rows, row stride "
                                                                             << lists.row_stride);
    const auto limits = args.take(given.limits, "limits").matrix<float>();  // four numbers each
    REP_FAST_CHECK(limits.row_stride == 4 && limits.cols == 4 && limits.rows >= cuda::padded_queries(n_queries),
                   "limits must be (" << cuda::padded_queries(n_queries) << ", 4) and contiguous, got " << limits.rows
                                      << " × " << limits.cols);
    const auto counts = args.take(given.counts, "counts").vector<std::int32_t>();
    REP_FAST_CHECK(std::ssize(counts) == n_queries, "counts must be one per query, got " << counts.size());
    scan.scratch = {reinterpret_cast<cuda::QueryLimit*>(limits.data), counts.data(), lists.data, lists.cols};
}

bool can_fuse(const py::object& keys, const py::object& factor, int n_parts) {
    DeviceArgs args;
    cuda::FusedScan scan;
    scan.selection.keys = chunk_arg(args, keys, "keys");
    take_factor(args, factor, n_parts, false, scan);
    return cuda::can_fuse(scan);
}

// With key_values the product is one of rows in whole steps.
void scan_fused(const py::object& keys, std::int64_t first_row, std::int64_t first_id, const py::object& factor,
                int n_parts, const py::object& counters, const py::object& limits, const py::object& counts,
                const py::object& candidates, const py::object& queries, const py::object& margins,
                const py::object& slacks, const py::object& token_ids, const py::object& sequence_starts,
                const py::object& last_tokens, const py::object& lookback, std::int64_t window,
                const py::object& indptr, const py::object& subjects, const py::object& scores, const py::object& ids,
                std::uintptr_t stream, const py::object& key_values, const py::object& key_steps,
                const py::object& key_margins, const py::object& query_steps) {
    DeviceArgs args;
    cuda::FusedScan scan;
    scan.selection.keys = chunk_arg(args, keys, "keys");
    scan.selection.first_row = first_row;
    scan.selection.first_id = first_id;
    take_factor(args, factor, n_parts, !key_values.is_none(), scan);
    if (!key_values.is_none()) {
        take_steps(args, {key_values, key_steps, key_margins, query_steps}, scan);
    }
    take_queries(args, {queries, margins, slacks, scores, ids}, scan.selection);
    take_rules(args, {token_ids, sequence_starts, last_tokens, lookback, window, indptr, subjects}, scan.selection);
    auto* const bad_rows = args.vector<std::int64_t>(counters, "counters");
    scan.counters = {nullptr, bad_rows, bad_rows + 1};
    take_scratch(args, {limits, counts, candidates}, scan);
    const Launching launching(args);
    cuda::scan_fused(scan, stream_arg(stream));
}

}  // namespace

void bind_cuda_fused_scan(py::module_& m) {
    m.attr("fused_tile_keys") = cuda::kFusedTileKeys;
    m.def(
        "fused_tile_queries", [](std::int64_t n) { return cuda::choose_fused_tile(n).queries; }, py::arg("n_queries"));
    m.def("padded_queries", &cuda::padded_queries, py::arg("n_queries"));
    m.def("can_fuse", &can_fuse, py::kw_only(), py::arg("keys"), py::arg("factor"), py::arg("n_parts"));
    m.def("scan_fused", &scan_fused, py::kw_only(), py::arg("keys"), py::arg("first_row"), py::arg("first_id"),
          py::arg("factor"), py::arg("n_parts"), py::arg("counters"), py::arg("limits"), py::arg("counts"),
          py::arg("candidates"), py::arg("queries"), py::arg("margins"), py::arg("slacks"), py::arg("token_ids"),
          py::arg("sequence_starts"), py::arg("last_tokens"), py::arg("lookback"), py::arg("window"), py::arg("indptr"),
          py::arg("subjects"), py::arg("scores"), py::arg("ids"), py::arg("stream"), py::arg("key_values") = py::none(),
          py::arg("key_steps") = py::none(), py::arg("key_margins") = py::none(), py::arg("query_steps") = py::none());
}

}  // namespace rep_fast::python
