// The queries of whitened_topk quantised for the int8 pass, with what the keys are quantised with and the margins of
// its scores (dither.h).
//
// A score is Σq_K q_W, exact, times the two steps in float32: five roundings of at most ‖k_q‖‖w_q‖, and w_q is at most
// 127·s_W·√M long.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "core/matrix_view.h"
#include "cpu/dither.h"
#include "cpu/whitened_topk_kernels.h"

namespace rep_fast {

// Σ q_K q_W, and every partial sum with 128 added to q_K, fits an int32 up to this width.
inline constexpr std::int64_t kLargestInt8Width = 65536;

// What the true score of a query is not below, or NaN; Int8Products::select has the other bound.
double least_score(std::int32_t sum, std::int64_t query, const Int8Margins& margins);

class DitheredQueries {
  public:
    // column_scales: size key_dim.
    DitheredQueries(MatrixView<const float> queries, const Int8Products& products,
                    std::span<const double> column_scales, const DitherOptions& options, int n_threads);

    std::int64_t n_padded() const { return n_panels_ * kPanelQueries; }
    bool is_finite(std::int64_t query) const { return std::isfinite(norms_[static_cast<std::size_t>(query)]); }
    // Panels from this one on, at `depth`, a multiple of 4.
    const std::uint32_t* panel(std::int64_t number, std::int64_t depth) const {
        return panels_.data() + number * panel_stride() + depth / 4 * kPanelQueries;
    }
    std::int64_t panel_stride() const { return kPanelQueries * ((key_dim_ + 3) / 4); }
    // −128·Σq of each query from this panel on.
    const std::int32_t* starts(std::int64_t panel) const { return starts_.data() + panel * kPanelQueries; }

    // What keys are quantised with: key_dim of each, and zeros up to a multiple of kQuantisedMultiple.
    const float* key_scales() const { return key_scales_.data(); }
    const std::int32_t* key_dither() const { return key_dither_.data(); }

    // Margins of one key's scores with the queries from `first` on, from its step and Σq². Infinite (everything
    // survives) where float32 might overflow on the way.
    Int8Margins margins(std::int64_t first, double step, std::int64_t square) const;
    // Of a key that could not be quantised: infinite.
    Int8Margins no_margins(std::int64_t first) const;

  private:
    void pack(MatrixView<const float> queries, const Int8Products& products, std::span<const double> column_scales,
              std::int64_t panel);
    // One query, [padded width].
    void quantise(const float* query, const Int8Products& products, std::span<const double> column_scales,
                  std::int64_t number, std::uint8_t* quantised);

    std::int64_t key_dim_;
    std::int64_t n_panels_;
    double constant_;                  // c of dither.h with the roundings' share, per unit of ‖w‖ or ‖k_q‖
    std::vector<float> query_scales_;  // d
    std::vector<float> key_scales_;    // 1/d
    std::vector<std::int32_t> query_dither_;
    std::vector<std::int32_t> key_dither_;
    std::vector<std::uint32_t> panels_;
    std::vector<std::int32_t> starts_;
    std::vector<float> steps_;    // s_W
    std::vector<float> margins_;  // per unit of s_K
    std::vector<double> norms_;   // ‖w‖, not finite where the query is not
    double largest_norm_ = 0.0;   // of w_q
};

}  // namespace rep_fast
