// The queries of whitened_topk in panels, with what the error bound of the pass needs to know of them.
//
// float32: a chain of c additions differs from the true score by at most γ‖k‖‖w‖ + (underflow), where
// γ = c·2⁻²⁴/(1 − c·2⁻²⁴), by Cauchy–Schwarz on Σ|k_j w_j|.
// bfloat16: the queries are replaced by ŵ = high, or high + low, which costs ‖k‖‖w − ŵ‖ more, and the instruction
// flushes subnormal numbers, which costs 2⁻¹²⁶ per operation and per unit of Σ|k_j| + Σ|ŵ_j|.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/matrix_view.h"
#include "cpu/whitened_topk.h"
#include "cpu/whitened_topk_kernels.h"

namespace rep_fast {

// The nearest float32 that is not above, or not below, the value.
float round_down(double value);
float round_up(double value);

// γ of the longest chain in a pass over keys of this width.
double accumulation_error(ScanPass pass, std::int64_t key_dim);

// A query's two halves: high is the nearest bfloat16, low the nearest to the rest.
struct Bf16Halves {
    BFloat16 high;
    BFloat16 low;
};
Bf16Halves bf16_halves(float query);

class PackedQueries {
  public:
    PackedQueries(MatrixView<const float> queries, ScanPass pass, int n_threads);

    ScanPass pass() const { return pass_; }
    std::int64_t n_padded() const { return n_panels_ * kPanelQueries; }
    // float32 pass: panels from this one on, row `depth` of them.
    const float* panel(std::int64_t number, std::int64_t depth) const;
    std::int64_t panel_stride() const { return kPanelQueries * queries_.cols; }
    // bfloat16 passes: the same; depth is even.
    Bf16Panels bf16_panels(std::int64_t number, std::int64_t depth) const;

    // n_padded of them: each query's share of the margin, rounded up.
    const float* margins() const { return margins_.data(); }
    float underflow() const { return underflow_; }
    bool is_finite(std::int64_t query) const { return std::isfinite(norms_[static_cast<std::size_t>(query)]); }

    // The key's share of the margin, from Σ k². Infinite (everything survives) where a float32 partial sum might
    // overflow.
    float key_norm(double square) const;
    // What the true score is not below, or NaN, from the pass's and the key's share; Float32Products::select has the
    // other bound.
    double least_score(float score, std::int64_t query, float key_norm) const;

  private:
    std::int64_t pairs_stride() const { return kPanelQueries * ((queries_.cols + 1) / 2); }
    void pack_float32(std::int64_t panel);
    void pack_bf16(std::int64_t panel);
    void set_margin(std::int64_t query, double square, double packed_norms, double rest_square);

    MatrixView<const float> queries_;
    ScanPass pass_;
    std::int64_t n_panels_;
    AlignedBuffer buffer_;
    float* panels_ = nullptr;
    std::vector<std::uint32_t> high_;
    std::vector<std::uint32_t> low_;
    std::vector<double> norms_;
    std::vector<float> margins_;
    float underflow_ = 0.0f;
    double largest_norm_ = 0.0;
};

}  // namespace rep_fast
