#include "cpu/whitened_topk.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>

#include "bindings.h"
#include "core/error.h"
#include "cpu/query_packings.h"
#include "cpu/whitened_topk_kernels.h"
#include "key_arg.h"
#include "tensor_arg.h"

namespace rep_fast::python {
namespace {

// "auto" leaves the choice to the scan.
std::optional<ScanPass> pass_arg(const std::string& name) {
    const auto* const found = std::find(kScanPassNames.begin(), kScanPassNames.end(), name);
    REP_FAST_CHECK(found != kScanPassNames.end() || name == "auto", "precision '" << name << "' is unknown");
    return found == kScanPassNames.end() ? std::nullopt
                                         : std::optional(static_cast<ScanPass>(found - kScanPassNames.begin()));
}

// Updates scores, ids and query_dropped; returns (non-finite keys, first of them or −1, pairs scored in float64, keys
// that each pass of kScanPassNames went over, keys by kPassReasons).
py::tuple scan(const py::object& keys, const py::object& queries, const py::object& scores, const py::object& ids,
               const py::object& query_dropped, std::int64_t first_id, const py::object& token_ids,
               const py::object& sequence_starts, const py::object& last_tokens, const py::object& lookback,
               std::int64_t window, const py::object& indptr, const py::object& subjects, const std::string& precision,
               double delta, std::uint64_t seed, QueryPackings* packings, int level, int n_threads) {
    const ScanInput input = {
        .keys = key_arg(keys, "keys"),
        .queries = TensorArg(queries, "queries").matrix<const float>(),
        .first_id = first_id,
        .last_token = {.token_ids = optional_vector<const std::int64_t>(token_ids, "token_ids"),
                       .sequence_starts = optional_vector<const std::int64_t>(sequence_starts, "sequence_starts"),
                       .last_tokens = optional_vector<const std::int64_t>(last_tokens, "last_tokens"),
                       .lookback = optional_vector<const std::int64_t>(lookback, "lookback"),
                       .window = window},
        .pairs = {.indptr = optional_vector<const std::int64_t>(indptr, "indptr"),
                  .subjects = optional_vector<const std::int64_t>(subjects, "subjects")},
        .pass = pass_arg(precision),
        .dither = {.delta = delta, .seed = seed}};
    const ScanState state = {.scores = TensorArg(scores, "scores").matrix<double>(),
                             .ids = TensorArg(ids, "ids").matrix<std::int64_t>(),
                             .query_dropped = TensorArg(query_dropped, "query_dropped").vector<bool>()};
    ScanReport report;
    {
        const py::gil_scoped_release unlocked;
        report = whitened_topk(input, state, static_cast<CpuLevel>(level), n_threads, packings);
    }
    return py::make_tuple(report.n_nonfinite_keys, report.first_nonfinite_key, report.n_rescored, report.pass_keys,
                          report.reason_keys);
}

}  // namespace

void bind_whitened_topk(py::module_& m) {
    register_bodies(m, "whitened_topk", whitened_topk_table());
    m.attr("scan_passes") = py::cast(kScanPassNames);
    m.attr("pass_reasons") = py::cast(kPassReasons);
    py::class_<QueryPackings>(m, "QueryPackings")
        .def(py::init([](const py::object& queries) {
                 return std::make_unique<QueryPackings>(TensorArg(queries, "queries").matrix<const float>());
             }),
             py::keep_alive<1, 2>(), py::arg("queries"));
    m.def("whitened_topk", &scan, py::kw_only(), py::arg("keys"), py::arg("queries"), py::arg("scores"), py::arg("ids"),
          py::arg("query_dropped"), py::arg("first_id"), py::arg("token_ids"), py::arg("sequence_starts"),
          py::arg("last_tokens"), py::arg("lookback"), py::arg("window"), py::arg("indptr"), py::arg("subjects"),
          py::arg("precision"), py::arg("delta"), py::arg("seed"), py::arg("packings").none(true), py::arg("level"),
          py::arg("n_threads"));
}

}  // namespace rep_fast::python
