// What of a selection does not depend on where its scores come from, from tensors. None switches a rule off.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "core/matrix_view.h"
#include "cuda/device_args.h"
#include "cuda/whitened_topk.h"

namespace rep_fast::python {

inline cuda::KeyChunk chunk_arg(DeviceArgs& args, const py::object& tensor, const char* name) {
    const RowsArg keys = args.rows(tensor, name);
    return {keys.data, keys.dtype, keys.rows, keys.cols, keys.row_stride};
}

struct RuleTensors {
    const py::object &token_ids, &sequence_starts, &last_tokens, &lookback;
    std::int64_t window;
    const py::object &indptr, &subjects;
};

inline void take_rules(DeviceArgs& args, const RuleTensors& given, cuda::Selection& selection) {
    const auto length = [](const py::object& tensor) {
        return tensor.is_none() ? 0 : tensor.attr("numel")().cast<std::int64_t>();
    };
    const auto vector = [&args](const py::object& tensor, const char* name) {
        return args.optional_vector<const std::int64_t>(tensor, name);
    };
    selection.last_token = {.token_ids = vector(given.token_ids, "token_ids"),
                            .sequence_starts = vector(given.sequence_starts, "starts"),
                            .n_sequences = length(given.sequence_starts),
                            .last_tokens = vector(given.last_tokens, "last_tokens"),
                            .lookback = vector(given.lookback, "lookback"),
                            .n_lookback = length(given.lookback),
                            .window = given.window};
    selection.pairs = {.indptr = vector(given.indptr, "indptr"), .subjects = vector(given.subjects, "subjects")};
}

struct QueryTensors {
    const py::object &queries, &margins, &slacks, &scores, &ids;
};

inline void take_queries(DeviceArgs& args, const QueryTensors& given, cuda::Selection& selection) {
    const auto weights = args.take(given.queries, "queries").matrix<const float>();
    selection.queries = weights.data;
    selection.query_stride = weights.row_stride;
    selection.n_queries = weights.rows;
    selection.query_margins = args.vector<const float>(given.margins, "margins");
    selection.query_slacks = args.vector<const float>(given.slacks, "slacks");
    const auto best = args.take(given.scores, "scores").matrix<double>();
    selection.scores = best.data;
    selection.ids = args.take(given.ids, "ids").matrix<std::int64_t>().data;
    selection.k = best.cols;
}

}  // namespace rep_fast::python
