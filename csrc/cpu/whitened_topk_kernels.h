// What whitened_topk does at each instruction-set level: shapes of its register tiles and packed operands, one function
// pointer per piece of work, and the table of them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dispatch.h"
#include "core/dtype.h"

namespace rep_fast {

// Queries are packed in panels, the last one padded with zeros: [panel][key_dim][kPanelQueries] float32, or as
// `Bf16Panels` says.
inline constexpr std::int64_t kPanelQueries = 16;
// Keys are widened to float32 and multiplied in tiles of this many rows.
inline constexpr std::int64_t kTileKeys = 6;
// Depth of one k-block: the panels of a register tile stay near (16 KiB in AVX2's, 64 KiB at most), and chains of
// additions in float32 are no longer than it, or twice it with high and low halves.
inline constexpr std::int64_t kBlockDepth = 256;
// Row stride of a widened block: off the power of two, so that the rows of a tile do not share cache sets.
inline constexpr std::int64_t kWidenedStride = kBlockDepth + 16;
// The float64 score adds product j into lane j mod kExactLanes, then folds the lanes in halves: one order everywhere.
inline constexpr std::int64_t kExactLanes = 16;

// size n: widens keys[0..n) to float32 and returns Σ keys², in float64: infinite or NaN exactly when a key is.
template <class T>
using WidenKeys = double (*)(const T* keys, std::int64_t n, float* widened);
// size n: the float64 score of one pair. Products of two float32 are exact in float64, so only the order matters.
// `next`, the row asked for afterwards (any row where there is none), is fetched meanwhile: rows of survivors lie
// anywhere.
template <class T>
using ExactScore = double (*)(const T* key, const float* query, std::int64_t n, const T* next);

template <class T>
struct RowKernels {
    WidenKeys<T> widen;
    ExactScore<T> exact_score;
};

// The same kernels for each type a key may have.
template <template <class> class Kernels>
struct ForKeyTypes {
    Kernels<float> f32;
    Kernels<BFloat16> bf16;
    Kernels<Float16> f16;

    template <class T>
    [[gnu::always_inline]] const Kernels<T>& of() const {
        if constexpr (std::is_same_v<T, float>) {
            return f32;
        } else if constexpr (std::is_same_v<T, BFloat16>) {
            return bf16;
        } else {
            return f16;
        }
    }
};

struct Float32Products {
    // scores[n_tiles · kTileKeys, n_panels · kPanelQueries] (+)= keys[·, depth] · queries[depth, ·].
    // keys: row stride kWidenedStride; panel p starts at panels + p · panel_stride; scores: row stride score_stride;
    // `first` overwrites instead of adding.
    void (*multiply)(const float* keys, std::int64_t n_tiles, const float* panels, std::int64_t n_panels,
                     std::int64_t panel_stride, std::int64_t depth, float* scores, std::int64_t score_stride,
                     bool first);
    // bounds[q] = scores[q] + key_norm · margins[q] + underflow, what the true score is not above. Writes every q in
    // [0, n) for which NOT (bounds[q] < thresholds[q]), ascending, and returns how many; NaN survives. n is a multiple
    // of kPanelQueries.
    std::int64_t (*select)(const float* scores, const float* margins, const float* thresholds, float key_norm,
                           float underflow, std::int64_t n, float* bounds, std::int32_t* survivors);
};

// One k-block of rows as they lie in the stream.
struct Bf16Keys {
    const BFloat16* first;
    std::int64_t stride;
    std::int64_t n_rows;
    std::int64_t depth;
    std::int64_t n_after;  // elements of each row behind the block
};

// Queries as bfloat16: panel p holds pairs of depth, [pair][kPanelQueries], at p · stride; the low halves likewise, or
// null. An odd depth ends with a pair whose second element is zero.
struct Bf16Panels {
    const std::uint32_t* high;
    const std::uint32_t* low;
    std::int64_t stride;
};

struct Bf16Products {
    // As Float32Products::multiply, for n_rows rounded up to kTileKeys: products of bfloat16 are exact, every addition
    // rounds to float32 and flushes subnormal operands and results.
    void (*multiply)(const Bf16Keys& keys, const Bf16Panels& panels, std::int64_t n_panels, float* scores,
                     std::int64_t score_stride, bool first);
    // Σ k² with the same additions, at most n/16 + 8 in a chain; not finite if a key is not.
    float (*square)(const BFloat16* keys, std::int64_t n);
};

// A k-block of quantised rows; n_rows up to the next multiple of kTileKeys can be read, depth is a multiple of 4.
struct Int8Keys {
    const std::uint8_t* first;
    std::int64_t stride;
    std::int64_t n_rows;
    std::int64_t depth;
};

// What a key and the queries add to a score before it is compared, see PackedQueries::int8_margins.
struct Int8Margins {
    float key_step;
    float key_norm;
    float underflow;
    const float* of_queries;
    const float* query_steps;
};

// Quantised rows end at a multiple of this many bytes; scales and dither too, with zeros behind the width.
inline constexpr std::int64_t kQuantisedMultiple = 64;

template <class T>
struct QuantiseKernels {
    // Largest |x_j · scales_j| of n; infinite or NaN exactly when one is.
    float (*largest)(const T* row, const float* scales, std::int64_t n);
    // out[j] = 128 + ((round(x_j · scales_j · per_step) + dither_j) >> 16), zeros of x behind n; returns Σ (out −
    // 128)².
    std::int64_t (*quantise)(const T* row, const float* scales, const std::int32_t* dither, float per_step,
                             std::int64_t n, std::uint8_t* out);
};

struct Int8Products {
    ForKeyTypes<QuantiseKernels> rows;
    // As Float32Products::multiply on quads of depth, [panel][quad][kPanelQueries][4] signed bytes against rows of
    // unsigned ones; the first k-block adds to starts[n_panels · kPanelQueries], later ones (null) to the sums. Exact.
    void (*multiply)(const Int8Keys& keys, const std::uint32_t* panels, std::int64_t n_panels,
                     std::int64_t panel_stride, std::int32_t* sums, std::int64_t sum_stride,
                     const std::int32_t* starts);
    // As Float32Products::select with bounds[q] = query_steps[q] · (key_step · sums[q] + key_norm)
    // + key_step · of_queries[q] + underflow.
    std::int64_t (*select)(const std::int32_t* sums, const Int8Margins& margins, const float* thresholds,
                           std::int64_t n, float* bounds, std::int32_t* survivors);
};

struct WhitenedTopkKernels {
    ForKeyTypes<RowKernels> rows;
    Float32Products float32;
    const Bf16Products* bf16_products = nullptr;  // where the level has them
    const Int8Products* int8_products = nullptr;  // likewise
};

const DispatchTable<WhitenedTopkKernels>& whitened_topk_table();

namespace portable {
extern const WhitenedTopkKernels kWhitenedTopk;
}
namespace avx2 {
extern const WhitenedTopkKernels kWhitenedTopk;
}
namespace avx512 {
extern const ForKeyTypes<RowKernels> kRows;
extern const Float32Products kFloat32Products;
}  // namespace avx512
namespace avx512_bf16 {
extern const Bf16Products kBf16Products;
extern const Int8Products kInt8Products;
}  // namespace avx512_bf16

}  // namespace rep_fast
