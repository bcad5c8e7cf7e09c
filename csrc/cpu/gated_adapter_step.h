// One step of an adapter's training on the calibrated objective: loss and gradient, in float32.
//
// The definition is rep_fast/rep/objectives.py; the gradient is the one written out in rep_fast/rep/calibrated_step.py.
// With p = A k and ρ(k) = k·response, the projection B p enters only through p·(Bᵀresponse) and ‖B p‖² = pᵀ(BᵀB)p.
#pragma once

#include <cstdint>
#include <span>

#include "core/cpu_level.h"
#include "core/matrix_view.h"

namespace rep_fast {

struct AdapterView {
    MatrixView<const float> a;   // [rank, key_dim]
    MatrixView<const float> b;   // [key_dim, rank]
    MatrixView<const float> w1;  // [n_hidden, key_dim]
    std::span<const float> b1;   // n_hidden
    std::span<const float> w2;   // n_hidden
    float b2 = 0.0f;
};

struct AdapterGradient {
    MatrixView<float> a, b, w1;  // shapes as in AdapterView
    std::span<float> b1, w2;
    float* b2 = nullptr;
};

struct StepWeights {
    double response_target, response, shift, consistency, negative;
};

struct StepInput {
    MatrixView<const float> rows;      // [s + 1 + n, key_dim]: s positives, the anchor, n negatives
    MatrixView<const float> entering;  // [s + 1, key_dim], what A reads in place of the first s + 1 rows
    std::span<const float> response;   // key_dim
    AdapterView adapter;
    StepWeights weights;
};

// Overwrites `gradient`, returns the loss. s and n at least 1. Throws Error when sizes do not fit together.
double calibrated_step(const StepInput& input, const AdapterGradient& gradient, CpuLevel level, int n_threads);

}  // namespace rep_fast
