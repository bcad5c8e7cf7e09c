#include "cuda/whitened_topk.h"

#include "core/matrix_view.h"
#include "cuda/bindings.h"
#include "cuda/device_args.h"
#include "cuda/quantised_rows.h"
#include "cuda/selection_args.h"

namespace rep_fast::python {
namespace {

void measure_keys(const py::object& keys, std::int64_t first_id, const py::object& norms, const py::object& counters,
                  std::uintptr_t stream) {
    DeviceArgs args;
    const cuda::KeyChunk chunk = chunk_arg(args, keys, "keys");
    auto* const counts = args.vector<std::int64_t>(counters, "counters");
    const cuda::KeyNorms found = {args.vector<float>(norms, "norms"), counts, counts + 1};
    const Launching launching(args);
    cuda::measure_keys(chunk, first_id, found, stream_arg(stream));
}

void draw_dither(std::uint64_t seed, std::uint64_t whose, const py::object& dither, std::uintptr_t stream) {
    DeviceArgs args;
    const auto drawn = args.take(dither, "dither").vector<std::int32_t>();
    const Launching launching(args);
    cuda::draw_dither(seed, whose, drawn.data(), std::ssize(drawn), stream_arg(stream));
}

// counters: None where rows that are not finite are not counted.
void quantise_rows(const py::object& rows, const py::object& columns, double constant, std::int64_t first_id,
                   const py::object& values, const py::object& steps, const py::object& margins,
                   const py::object& counters, std::uintptr_t stream) {
    DeviceArgs args;
    const cuda::KeyChunk chunk = chunk_arg(args, rows, "keys");
    const auto bytes = args.take(values, "values").matrix<std::int8_t>();
    REP_FAST_CHECK(bytes.row_stride == bytes.cols, "values must be contiguous, got row stride " << bytes.row_stride);
    auto* const counts = args.optional_vector<std::int64_t>(counters, "counters");
    const cuda::QuantisedRows found = {bytes.data,
                                       bytes.cols,
                                       args.vector<float>(steps, "steps"),
                                       args.vector<float>(margins, "margins"),
                                       counts,
                                       counts == nullptr ? nullptr : counts + 1};
    const auto* const of_columns = args.vector<const std::int32_t>(columns, "columns");
    const Launching launching(args);
    cuda::quantise_rows(chunk, of_columns, constant, first_id, found, stream_arg(stream));
}

// With key_steps and query_steps the approximate scores are sums of quantised rows, and the norms their margins.
void select_hits(const py::object& keys, const py::object& norms, std::int64_t first_row, std::int64_t first_id,
                 const py::object& approximate, const py::object& queries, const py::object& margins,
                 const py::object& slacks, const py::object& token_ids, const py::object& sequence_starts,
                 const py::object& last_tokens, const py::object& lookback, std::int64_t window,
                 const py::object& indptr, const py::object& subjects, const py::object& scores, const py::object& ids,
                 std::uintptr_t stream, const py::object& key_steps, const py::object& query_steps) {
    DeviceArgs args;
    cuda::Selection selection;
    selection.keys = chunk_arg(args, keys, "keys");
    const auto* const of_keys = args.vector<const float>(norms, "norms");
    selection.first_row = first_row;
    selection.first_id = first_id;
    if (key_steps.is_none()) {
        const auto products = args.take(approximate, "approximate").matrix<const float>();
        selection.key_norms = of_keys;
        selection.approximate = products.data;
        selection.approximate_stride = products.row_stride;
    } else {
        const auto sums = args.take(approximate, "approximate").matrix<const std::int32_t>();
        selection.int8 = {sums.data, sums.row_stride, args.vector<const float>(key_steps, "key_steps"), of_keys,
                          args.vector<const float>(query_steps, "query_steps")};
    }
    take_queries(args, {queries, margins, slacks, scores, ids}, selection);
    take_rules(args, {token_ids, sequence_starts, last_tokens, lookback, window, indptr, subjects}, selection);
    const Launching launching(args);
    cuda::select_hits(selection, stream_arg(stream));
}

}  // namespace

void bind_cuda_whitened_topk(py::module_& m) {
    m.attr("bodies").cast<py::list>().append("whitened_topk");
    m.attr("largest_k") = cuda::largest_k();
    m.def("measure_keys", &measure_keys, py::kw_only(), py::arg("keys"), py::arg("first_id"), py::arg("norms"),
          py::arg("counters"), py::arg("stream"));
    m.attr("quantised_multiple") = cuda::kQuantisedMultiple;
    m.def("draw_dither", &draw_dither, py::kw_only(), py::arg("seed"), py::arg("whose"), py::arg("dither"),
          py::arg("stream"));
    m.def("quantise_rows", &quantise_rows, py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("constant"),
          py::arg("first_id"), py::arg("values"), py::arg("steps"), py::arg("margins"), py::arg("counters"),
          py::arg("stream"));
    m.def("select_hits", &select_hits, py::kw_only(), py::arg("keys"), py::arg("norms"), py::arg("first_row"),
          py::arg("first_id"), py::arg("approximate"), py::arg("queries"), py::arg("margins"), py::arg("slacks"),
          py::arg("token_ids"), py::arg("sequence_starts"), py::arg("last_tokens"), py::arg("lookback"),
          py::arg("window"), py::arg("indptr"), py::arg("subjects"), py::arg("scores"), py::arg("ids"),
          py::arg("stream"), py::arg("key_steps") = py::none(), py::arg("query_steps") = py::none());
}

}  // namespace rep_fast::python
