// Certificate of whitened_topk's int8 pass: fixed-point rounding with a random dither, and how far its scores can be
// off.
//
// A row x is divided by column scales d (keys) or multiplied by them (queries), which leaves k·w as it is, and stored
// in steps of s as q = (A + U) >> 16 with A = round(2¹⁶x/s) and U uniform in [0, 2¹⁶): E q = A/2¹⁶ exactly. With one
// vector U for all keys and an independent one for all queries, and k_q = s_K·q the dequantised key,
// k·w − k_q·w_q = (k − k_q)·w + k_q·(w − w_q): two sums of independent terms, of widths s_K|w_j| and s_W|k_q,j|. By
// Hoeffding each is beyond c times its root of squares with probability at most 2·exp(−2c²), so that all 2NS of them
// together fail with probability at most δ for c = √(ln(4NS/δ)/2). The union bound asks nothing of the pairs; the
// data, the steps and the scales must not depend on U. A is off by less than two units, which adds
// 2⁻¹⁵(s_K‖w‖₁ + s_W‖k_q‖₁).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/key_matrix.h"

namespace rep_fast {

// What the int8 pass draws, and how sure its bound is.
struct DitherOptions {
    double delta = 1e-9;     // probability that the bound fails for any pair of the scan
    std::uint64_t seed = 0;  // of both dithers
    double n_keys = 0x1p40;  // of the whole scan, its other blocks and shards included

    bool operator==(const DitherOptions&) const = default;
};

// c above.
double dither_constant(const DitherOptions& options, std::int64_t n_queries);

// Whose dither.
enum class DitherOf : std::uint64_t { kKeys = 0, kQueries = 1 };

// size n: independent uniform integers in [0, 2¹⁶), the same for a seed wherever they are drawn.
std::vector<std::int32_t> draw_dither(std::uint64_t seed, DitherOf whose, std::int64_t n);

// Fixed point of a row whose largest magnitude is `largest`, finite.
struct FixedPoint {
    float per_step;  // 2¹⁶/s, rounded down so that no entry exceeds 127·2¹⁶: nothing is clipped
    double step;     // s, at least 2⁻⁶⁰: products of two steps are normal float32 numbers, and zero rows have one too
};
FixedPoint fixed_point(float largest);

// size M: powers of two d that bring each column's keys k/d and queries w·d to about the same size, from a sample of
// either. The spread of sizes over columns, which the steps would have to cover, is lost without any rounding.
std::vector<double> column_scales(const KeyMatrix& keys, MatrixView<const float> queries);

}  // namespace rep_fast
