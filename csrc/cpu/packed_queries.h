// The queries of whitened_topk in panels, with what the error bound of its float32 pass needs to know of them.
//
// A float32 score of a chain of c additions differs from the true one by at most γ‖k‖‖w‖ + (underflow), where
// γ = c·2⁻²⁴/(1 − c·2⁻²⁴), by Cauchy–Schwarz on Σ|k_j w_j|.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/matrix_view.h"
#include "cpu/whitened_topk.h"

namespace rep_fast {

// The nearest float32 that is not above, or not below, the value.
float round_down(double value);
float round_up(double value);

class PackedQueries {
  public:
    PackedQueries(MatrixView<const float> queries, int n_threads);

    std::int64_t n_padded() const { return n_panels_ * kPanelQueries; }
    std::int64_t panel_stride() const { return kPanelQueries * queries_.cols; }
    const float* panel(std::int64_t number) const { return panels_ + number * panel_stride(); }
    // n_padded of them: each query's share of the margin, γ‖w‖ rounded up.
    const float* margins() const { return margins_.data(); }
    float underflow() const { return underflow_; }
    bool is_finite(std::int64_t query) const { return std::isfinite(norms_[static_cast<std::size_t>(query)]); }

    // The key's share of the margin, from Σ k². Infinite (everything survives) where a float32 partial sum might
    // overflow.
    float key_norm(double square) const;

  private:
    void pack(std::int64_t panel, double gamma);

    MatrixView<const float> queries_;
    std::int64_t n_panels_;
    AlignedBuffer buffer_;
    float* panels_;
    std::vector<double> norms_;
    std::vector<float> margins_;
    float underflow_ = 0.0f;
    double largest_norm_ = 0.0;
};

}  // namespace rep_fast
