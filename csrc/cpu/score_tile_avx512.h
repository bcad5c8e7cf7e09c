// What the AVX-512 register tiles of whitened_topk have in common: how panels are grouped, and how a tile ends. Only
// for files compiled for AVX-512; everything has internal linkage, so each including file has its own copy.
#pragma once

#include <immintrin.h>

#include "cpu/whitened_topk_kernels.h"

namespace rep_fast {
namespace {

static_assert(kPanelQueries == 16 && kTileKeys == 6, "the register tiles are written for 6 keys and vectors of 16");

// How many of n panels a register tile takes: 4 or 3 without a rest of 1 from 6 on, whose few sums would wait for each
// other.
[[gnu::always_inline]] inline std::int64_t panels_at_once(std::int64_t n) {
    return n % 4 == 0 ? 4 : (n >= 3 ? 3 : n);
}

// work.template operator()<kPanels>(panel) for groups of kPanels panels from number `panel` on.
template <class Work>
[[gnu::always_inline]] inline void for_panel_groups(std::int64_t n_panels, const Work& work) {
    for (std::int64_t panel = 0; panel < n_panels;) {
        const std::int64_t at_once = panels_at_once(n_panels - panel);
        switch (at_once) {
            case 4:
                work.template operator()<4>(panel);
                break;
            case 3:
                work.template operator()<3>(panel);
                break;
            case 2:
                work.template operator()<2>(panel);
                break;
            default:
                work.template operator()<1>(panel);
        }
        panel += at_once;
    }
}

template <int kPanels>
[[gnu::always_inline]] inline void clear_tile(__m512 (&sums)[kTileKeys][kPanels]) {
    for (auto& row : sums) {
        for (__m512& sum : row) {
            sum = _mm512_setzero_ps();
        }
    }
}

// scores[6, 16·kPanels] = sums, or += sums where these are not the first.
template <int kPanels>
[[gnu::always_inline]] inline void store_tile(const __m512 (&sums)[kTileKeys][kPanels], float* scores,
                                              std::int64_t score_stride, bool first) {
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

}  // namespace
}  // namespace rep_fast
