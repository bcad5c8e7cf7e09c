#include "cuda/gated_adapter.h"

#include <string>
#include <vector>

#include "core/matrix_view.h"
#include "cuda/bindings.h"
#include "cuda/device_args.h"

namespace rep_fast::python {
namespace {

const void* weight_vector(DeviceArgs& args, const py::handle& tensor, DType dtype, const char* name) {
    const auto object = py::reinterpret_borrow<py::object>(tensor);
    if (dtype == DType::kBFloat16) {
        return args.vector<const BFloat16>(object, name);
    }
    return args.vector<const float>(object, name);
}

RowsArg weight_matrix(DeviceArgs& args, const py::handle& tensor, DType dtype, const char* name) {
    const RowsArg weight = args.rows(py::reinterpret_borrow<py::object>(tensor), name);
    REP_FAST_CHECK(weight.dtype == dtype, name << " is " << dtype_name(weight.dtype) << ", the first weight "
                                               << dtype_name(dtype) << "; pass weights of one dtype");
    return weight;
}

// One adapter or several, all weights of one dtype.
struct AdaptersArg {
    // weights: a, b, w1, b1, w2, b2 of each adapter.
    AdaptersArg(DeviceArgs& args, const py::list& weights, const py::list& thresholds) {
        REP_FAST_CHECK(weights.size() == 6 * thresholds.size() && thresholds.size() > 0,
                       weights.size() << " weights for " << thresholds.size()
                                      << " adapters, there must be 6 of each, and one adapter at least");
        dtype = args.rows(weights[0], "a").dtype;
        for (std::size_t i = 0; i < thresholds.size(); ++i) {
            const RowsArg a = weight_matrix(args, weights[6 * i], dtype, "a");
            const RowsArg b = weight_matrix(args, weights[6 * i + 1], dtype, "b");
            const RowsArg w1 = weight_matrix(args, weights[6 * i + 2], dtype, "w1");
            adapters.push_back({.a = a.data,
                                .b = b.data,
                                .w1 = w1.data,
                                .b1 = weight_vector(args, weights[6 * i + 3], dtype, "b1"),
                                .w2 = weight_vector(args, weights[6 * i + 4], dtype, "w2"),
                                .b2 = weight_vector(args, weights[6 * i + 5], dtype, "b2"),
                                .a_stride = a.row_stride,
                                .b_stride = b.row_stride,
                                .w1_stride = w1.row_stride,
                                .n_hidden = static_cast<std::int32_t>(w1.rows),
                                .rank = static_cast<std::int32_t>(a.rows),
                                .threshold = thresholds[i].cast<float>()});
        }
    }

    std::vector<cuda::AdapterOnDevice> adapters;
    DType dtype = DType::kFloat32;
};

cuda::Composition composition_arg(const std::string& name) {
    if (name == "chain") {
        return cuda::Composition::kChain;
    }
    return name == "argmax" ? cuda::Composition::kArgmax : cuda::Composition::kSum;
}

// Without its outputs.
cuda::GatedAdapterCall call_of(const RowsArg& keys, const AdaptersArg& chosen, const std::string& compose) {
    cuda::GatedAdapterCall call;
    call.adapters = chosen.adapters;
    call.weight_dtype = chosen.dtype;
    call.composition = composition_arg(compose);
    call.keys = keys.data;
    call.key_dtype = keys.dtype;
    call.n_tokens = keys.rows;
    call.key_dim = keys.cols;
    call.row_stride = keys.row_stride;
    return call;
}

std::size_t scratch_of(const py::object& keys, const py::list& weights, const py::list& thresholds,
                       const std::string& compose) {
    DeviceArgs args;
    const RowsArg rows = args.rows(keys, "keys");
    const AdaptersArg chosen(args, weights, thresholds);
    return cuda::scratch_bytes(call_of(rows, chosen, compose));
}

void run_adapters(const py::object& keys, const py::list& weights, const py::list& thresholds,
                  const std::string& compose, bool decides, const py::object& adapted, const py::object& logits,
                  const py::object& opened, const py::object& tickets, const py::object& scratch,
                  std::uintptr_t stream) {
    DeviceArgs args;
    const RowsArg rows = args.rows(keys, "keys");
    const AdaptersArg chosen(args, weights, thresholds);
    cuda::GatedAdapterCall call = call_of(rows, chosen, compose);
    const RowsArg out = args.rows(adapted, "adapted");
    REP_FAST_CHECK(
        out.dtype == rows.dtype && out.rows == rows.rows && out.row_stride == rows.cols,
        "adapted must be " << rows.rows << " × " << rows.cols << ' ' << dtype_name(rows.dtype) << " and contiguous");
    call.adapted = const_cast<void*>(out.data);
    call.logits = args.take(logits, "logits").matrix<float>().data;
    call.opened = args.take(opened, "opened").matrix<bool>().data;
    const auto counters = args.take(tickets, "tickets").vector<std::int32_t>();
    REP_FAST_CHECK(std::ssize(counters) >= std::ssize(call.adapters) + cuda::kMoreTickets,
                   "tickets must be one per adapter and " << cuda::kMoreTickets << " more, got " << counters.size());
    call.tickets = counters.data();
    call.scratch = args.vector<std::int64_t>(scratch, "scratch");
    const Launching launching(args);
    decides ? cuda::gated_adapter(call, stream_arg(stream)) : cuda::apply_open(call, stream_arg(stream));
}

void run_gate_products(const py::object& products, const py::list& weights, double threshold, const py::object& logits,
                       const py::object& opened, std::uintptr_t stream) {
    DeviceArgs args;
    py::list thresholds;
    thresholds.append(threshold);
    const AdaptersArg chosen(args, weights, thresholds);
    const auto view = args.take(products, "products").matrix<const float>();
    const cuda::GateProductsCall call = {.products = view.data,
                                         .n_tokens = view.rows,
                                         .row_stride = view.row_stride,
                                         .adapter = chosen.adapters.front(),
                                         .weight_dtype = chosen.dtype,
                                         .logits = args.vector<float>(logits, "logits"),
                                         .opened = args.vector<bool>(opened, "opened")};
    const Launching launching(args);
    cuda::gate_products(call, stream_arg(stream));
}

}  // namespace

void bind_cuda_gated_adapter(py::module_& m) {
    m.attr("bodies").cast<py::list>().append("gated_adapter");
    m.attr("more_gate_tickets") = cuda::kMoreTickets;
    m.def("gated_adapter_scratch", &scratch_of, py::kw_only(), py::arg("keys"), py::arg("weights"),
          py::arg("thresholds"), py::arg("compose"));
    m.def("gated_adapter", &run_adapters, py::kw_only(), py::arg("keys"), py::arg("weights"), py::arg("thresholds"),
          py::arg("compose"), py::arg("decides"), py::arg("adapted"), py::arg("logits"), py::arg("opened"),
          py::arg("tickets"), py::arg("scratch"), py::arg("stream"));
    m.def("gate_products", &run_gate_products, py::kw_only(), py::arg("products"), py::arg("weights"),
          py::arg("threshold"), py::arg("logits"), py::arg("opened"), py::arg("stream"));
}

}  // namespace rep_fast::python
