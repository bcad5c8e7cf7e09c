// Gates of many tokens from a library's products, for every architecture.
//
// A warp per token reads its products once: 4·T·H bytes.
#include <cuda_runtime.h>

#include "core/error.h"
#include "cuda/gated_adapter.h"
#include "cuda/gated_adapter_steps.cuh"
#include "cuda/launch.cuh"

namespace rep_fast::cuda {
namespace {

template <class Weight>
__global__ void __launch_bounds__(kGateThreads) products_kernel(GateProductsCall call) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * kGateWarps + threadIdx.x / kLanes;
    if (token >= call.n_tokens) {
        return;  // the whole warp leaves
    }
    const auto* b1 = static_cast<const Weight*>(call.adapter.b1);
    const auto* w2 = static_cast<const Weight*>(call.adapter.w2);
    const float* products = call.products + token * call.row_stride;
    double sum = 0.0;
    for (int h = lane; h < call.adapter.n_hidden; h += kLanes) {
        sum += static_cast<double>(widened(w2[h]) * gelu(products[h] + widened(b1[h])));
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        const float b2 = widened(static_cast<const Weight*>(call.adapter.b2)[0]);
        const auto logit = static_cast<float>(static_cast<double>(b2) + sum);
        call.logits[token] = logit;
        call.opened[token] = is_open(logit, call.adapter.threshold);
    }
}

}  // namespace

void gate_products(const GateProductsCall& call, void* stream) {
    REP_FAST_CHECK(call.weight_dtype == DType::kFloat32 || call.weight_dtype == DType::kBFloat16,
                   "weights must be float32 or bfloat16, got " << dtype_name(call.weight_dtype));
    if (call.n_tokens == 0) {
        return;
    }
    const LaunchShape shape = {dim3(static_cast<unsigned>((call.n_tokens + kGateWarps - 1) / kGateWarps)),
                               dim3(kGateThreads), 0, static_cast<cudaStream_t>(stream)};
    if (call.weight_dtype == DType::kFloat32) {
        launch("gate_products", products_kernel<float>, shape, call);
    } else {
        launch("gate_products", products_kernel<BFloat16>, shape, call);
    }
}

}  // namespace rep_fast::cuda
