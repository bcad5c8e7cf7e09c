// torch.Tensor → matrix of keys or of weights, whichever floating type it has.
#pragma once

#include <string>

#include "core/key_matrix.h"
#include "tensor_arg.h"

namespace rep_fast::python {

inline KeyMatrix key_arg(const py::object& tensor, const char* name) {
    const TensorArg keys(tensor, name);
    switch (keys.dtype()) {
        case DType::kFloat32:
            return keys.matrix<const float>();
        case DType::kBFloat16:
            return keys.matrix<const BFloat16>();
        case DType::kFloat16:
            return keys.matrix<const Float16>();
        default:
            throw Error(std::string(name) + " must be float32, bfloat16 or float16, got " + dtype_name(keys.dtype()));
    }
}

inline WeightMatrix weight_arg(const py::object& tensor, const char* name) {
    const TensorArg weights(tensor, name);
    if (weights.dtype() == DType::kBFloat16) {
        return weights.matrix<const BFloat16>();
    }
    return weights.matrix<const float>();
}

}  // namespace rep_fast::python
