// AVX-512 body of whitened_topk's float32 products and of its selection; rows are widened and scored again by AVX2's.
//
// Register tile of 6 keys × 4 panels of 16 queries: 24 accumulators, 4 loads of queries and 1 broadcast of 32
// registers; per k-step 24 FMA stand against 10 loads. Three panels where the number of panels does not divide by four:
// 18 sums still cover the latency of both FMA ports. Internal linkage only, no standard library: see core/dispatch.h.
#include <immintrin.h>

#include "cpu/score_selection.h"
#include "cpu/simd_avx512.h"
#include "cpu/whitened_topk_kernels.h"

namespace rep_fast::avx512 {
namespace {

static_assert(kPanelQueries == 16 && kTileKeys == 6, "the register tile is written for 6 keys and vectors of 16");

// scores[6, 16·kPanels] (+)= keys[6, depth] · panels[depth, ·].
template <int kPanels>
void multiply_tile(const float* keys, const float* panels, std::int64_t panel_stride, std::int64_t depth, float* scores,
                   std::int64_t score_stride, bool first) {
    __m512 sums[kTileKeys][kPanels];
    for (auto& row : sums) {
        for (__m512& sum : row) {
            sum = _mm512_setzero_ps();
        }
    }
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
#pragma GCC unroll 6
    for (std::int64_t row = 0; row < kTileKeys; ++row) {
#pragma GCC unroll 4
        for (int panel = 0; panel < kPanels; ++panel) {
            float* const out = scores + row * score_stride + panel * kPanelQueries;
            const __m512 sum = sums[row][panel];
            _mm512_storeu_ps(out, first ? sum : _mm512_add_ps(_mm512_loadu_ps(out), sum));
        }
    }
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
    for (std::int64_t panel = 0; panel < n_panels;) {
        const float* const from = panels + panel * panel_stride;
        float* const to = scores + panel * kPanelQueries;
        switch (panels_at_once(n_panels - panel)) {
            case 4:
                multiply_group<4>(keys, n_tiles, from, panel_stride, depth, to, score_stride, first);
                panel += 4;
                break;
            case 3:
                multiply_group<3>(keys, n_tiles, from, panel_stride, depth, to, score_stride, first);
                panel += 3;
                break;
            case 2:
                multiply_group<2>(keys, n_tiles, from, panel_stride, depth, to, score_stride, first);
                panel += 2;
                break;
            default:
                multiply_group<1>(keys, n_tiles, from, panel_stride, depth, to, score_stride, first);
                panel += 1;
        }
    }
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
