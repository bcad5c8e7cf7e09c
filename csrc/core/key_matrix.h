// Keys and weights as they come: one of the floating types kernels widen on load.
#pragma once

#include <variant>

#include "core/dtype.h"
#include "core/matrix_view.h"

namespace rep_fast {

using KeyMatrix = std::variant<MatrixView<const float>, MatrixView<const BFloat16>, MatrixView<const Float16>>;
using WeightMatrix = std::variant<MatrixView<const float>, MatrixView<const BFloat16>>;

}  // namespace rep_fast
