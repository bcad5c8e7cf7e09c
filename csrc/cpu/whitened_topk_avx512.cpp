// AVX-512 body of whitened_topk's float32 products and of its selection; rows are widened and scored again by AVX2's.
//
// Register tile of 6 keys × 4 panels of 16 queries: 24 accumulators, 4 loads of queries and 1 broadcast of 32
// registers; per k-step 24 FMA stand against 10 loads. Three panels where the number of panels does not divide by four:
// 18 sums still cover the latency of both FMA ports. Internal linkage only, no standard library: see core/dispatch.h.
#include <immintrin.h>

#include "cpu/score_selection.h"
#include "cpu/score_tile_avx512.h"
#include "cpu/simd_avx512.h"
#include "cpu/whitened_topk_kernels.h"

namespace rep_fast::avx512 {
namespace {

// scores[6, 16·kPanels] (+)= keys[6, depth] · panels[depth, ·].
template <int kPanels>
void multiply_tile(const float* keys, const float* panels, std::int64_t panel_stride, std::int64_t depth, float* scores,
                   std::int64_t score_stride, bool first) {
    __m512 sums[kTileKeys][kPanels];
    clear_tile(sums);
    for (std::int64_t j = 0; j < depth; ++j) {
        __m512 queries[kPanels];
#pragma GCC unroll 4
        for (int panel = 0; panel < kPanels; ++panel) {
            queries[panel] = _mm512_loadu_ps(panels + panel * panel_stride + j * kPanelQueries);
        }
#pragma GCC unroll 6
        for (std::int64_t row = 0; row < kTileKeys; ++row) {
            const __m512 key = _mm512_set1_ps(keys[row * kWidenedStride + j]);
#pragma GCC unroll 4
            for (int panel = 0; panel < kPanels; ++panel) {
                sums[row][panel] = _mm512_fmadd_ps(key, queries[panel], sums[row][panel]);
            }
        }
    }
    store_tile(sums, scores, score_stride, first);
}

template <int kPanels>
void multiply_group(const float* keys, std::int64_t n_tiles, const float* panels, std::int64_t panel_stride,
                    std::int64_t depth, float* scores, std::int64_t score_stride, bool first) {
    for (std::int64_t tile = 0; tile < n_tiles; ++tile) {
        multiply_tile<kPanels>(keys + tile * kTileKeys * kWidenedStride, panels, panel_stride, depth,
                               scores + tile * kTileKeys * score_stride, score_stride, first);
    }
}

void multiply_half(const float* keys, std::int64_t n_tiles, const float* panels, std::int64_t n_panels,
                   std::int64_t panel_stride, std::int64_t depth, float* scores, std::int64_t score_stride,
                   bool first) {
    for_panel_groups(n_panels, [&]<int kPanels>(std::int64_t panel) {
        multiply_group<kPanels>(keys, n_tiles, panels + panel * panel_stride, panel_stride, depth,
                                scores + panel * kPanelQueries, score_stride, first);
    });
}

// Half a k-block at a time: four panels of it, 32 KiB, stay in L1 while the keys pass.
void multiply(const float* keys, std::int64_t n_tiles, const float* panels, std::int64_t n_panels,
              std::int64_t panel_stride, std::int64_t depth, float* scores, std::int64_t score_stride, bool first) {
    constexpr std::int64_t kHalf = kBlockDepth / 2;
    for (std::int64_t begin = 0; begin < depth; begin += kHalf) {
        const std::int64_t n = depth - begin < kHalf ? depth - begin : kHalf;
        multiply_half(keys + begin, n_tiles, panels + begin * kPanelQueries, n_panels, panel_stride, n, scores,
                      score_stride, first && begin == 0);
    }
}

}  // namespace

constinit const Float32Products kFloat32Products = {.multiply = multiply, .select = select_scores<Simd>};

}  // namespace rep_fast::avx512
