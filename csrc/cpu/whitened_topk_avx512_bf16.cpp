// AVX-512 bfloat16 body of whitened_topk's fast pass: keys are multiplied as they lie in the stream.
//
// vdpbf16ps adds two products of bfloat16 to a float32. A panel holds pairs of depth next to each other, [pair][16], so
// that one register has 16 queries' pairs and a key's pair is one broadcast of 32 bits. The register tile is that of
// the float32 body: 6 keys × 4 panels. With the low halves of the queries 4 more registers of queries pass through.
// Internal linkage only, no standard library: see core/dispatch.h.
#include <immintrin.h>

#include "cpu/score_tile_avx512.h"
#include "cpu/whitened_topk_kernels.h"

namespace rep_fast::avx512_bf16 {
namespace {

[[gnu::always_inline]] inline __m512 add_products(__m512 sum, __m512i keys, __m512i queries) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(keys), reinterpret_cast<__m512bh>(queries));
}

// Two neighbours of a row, at whatever address.
[[gnu::always_inline]] inline __m512i broadcast_pair(const BFloat16* keys) {
    int pair;
    __builtin_memcpy(&pair, keys, sizeof pair);
    return _mm512_set1_epi32(pair);
}

// One pair of depth of one half of the queries. keys: at the pair, row stride `stride`. Two base pointers and multiples
// of the strides keep all ten addresses in few registers.
template <int kPanels, bool kIsSingle>
[[gnu::always_inline]] inline void multiply_pair(__m512 (&sums)[kTileKeys][kPanels], const BFloat16* keys,
                                                 std::int64_t stride, const std::uint32_t* panels,
                                                 std::int64_t panel_stride) {
    __m512i queries[kPanels];
#pragma GCC unroll 4
    for (int panel = 0; panel < kPanels; ++panel) {
        queries[panel] = _mm512_loadu_si512(panels + panel * panel_stride);
    }
#pragma GCC unroll 6
    for (std::int64_t row = 0; row < kTileKeys; ++row) {
        const BFloat16* const from = (row < 3 ? keys : keys + 3 * stride) + row % 3 * stride;
        const __m512i key = kIsSingle ? _mm512_set1_epi32(from->bits) : broadcast_pair(from);
#pragma GCC unroll 4
        for (int panel = 0; panel < kPanels; ++panel) {
            sums[row][panel] = add_products(sums[row][panel], key, queries[panel]);
        }
    }
}

// scores[6, 16·kPanels] (+)= keys[6 rows, depth] · panels. The last pair of an odd depth has one element.
template <int kPanels, bool kHasLow>
void multiply_tile(const BFloat16* keys, std::int64_t stride, const Bf16Panels& panels, std::int64_t depth,
                   float* scores, std::int64_t score_stride, bool first) {
    __m512 sums[kTileKeys][kPanels];
    clear_tile(sums);
    const std::uint32_t* high = panels.high;
    const std::uint32_t* low = panels.low;
    for (const BFloat16* const end = keys + (depth & ~std::int64_t{1}); keys != end; keys += 2) {
        multiply_pair<kPanels, false>(sums, keys, stride, high, panels.stride);
        high += kPanelQueries;
        if (kHasLow) {
            // hidden from the compiler, so that it reads the pairs again: cheaper, from L1, than six more registers
            const BFloat16* again = keys;
            __asm__("" : "+r"(again));
            multiply_pair<kPanels, false>(sums, again, stride, low, panels.stride);
            low += kPanelQueries;
        }
    }
    if (depth % 2 != 0) {
        multiply_pair<kPanels, true>(sums, keys, stride, high, panels.stride);
        if (kHasLow) {
            multiply_pair<kPanels, true>(sums, keys, stride, low, panels.stride);
        }
    }
    store_tile(sums, scores, score_stride, first);
}

// The rows' next k-block into L2 while this one is multiplied: a stream of rows defeats the hardware's prefetcher.
[[gnu::always_inline]] inline void prefetch(const BFloat16* keys, std::int64_t stride, std::int64_t n) {
    for (std::int64_t row = 0; row < kTileKeys; ++row) {
        for (std::int64_t j = 0; j < n; j += 32) {  // a line each
            _mm_prefetch(reinterpret_cast<const char*>(keys + row * stride + j), _MM_HINT_T1);
        }
    }
}

template <int kPanels, bool kHasLow>
void multiply_group(const Bf16Keys& keys, const Bf16Panels& panels, bool prefetches, float* scores,
                    std::int64_t score_stride, bool first) {
    std::int64_t row = 0;
    for (; row + kTileKeys <= keys.n_rows; row += kTileKeys) {
        const BFloat16* const from = keys.first + row * keys.stride;
        if (prefetches) {
            prefetch(from + keys.depth, keys.stride, keys.n_after < keys.depth ? keys.n_after : keys.depth);
        }
        multiply_tile<kPanels, kHasLow>(from, keys.stride, panels, keys.depth, scores + row * score_stride,
                                        score_stride, first);
    }
    if (row < keys.n_rows) {
        BFloat16 rest[kTileKeys * kBlockDepth];  // the last rows; scores beyond them are not looked at
        for (std::int64_t i = 0; i < kTileKeys; ++i) {
            const std::int64_t number = row + i < keys.n_rows ? row + i : keys.n_rows - 1;
            __builtin_memcpy(rest + i * kBlockDepth, keys.first + number * keys.stride,
                             static_cast<std::size_t>(keys.depth) * sizeof(BFloat16));
        }
        multiply_tile<kPanels, kHasLow>(rest, kBlockDepth, panels, keys.depth, scores + row * score_stride,
                                        score_stride, first);
    }
}

template <bool kHasLow>
void multiply_panels(const Bf16Keys& keys, const Bf16Panels& panels, std::int64_t n_panels, float* scores,
                     std::int64_t score_stride, bool first) {
    for_panel_groups(n_panels, [&]<int kPanels>(std::int64_t panel) {
        const std::int64_t offset = panel * panels.stride;
        const Bf16Panels from = {panels.high + offset, kHasLow ? panels.low + offset : nullptr, panels.stride};
        multiply_group<kPanels, kHasLow>(keys, from, panel == 0, scores + panel * kPanelQueries, score_stride, first);
    });
}

void multiply(const Bf16Keys& keys, const Bf16Panels& panels, std::int64_t n_panels, float* scores,
              std::int64_t score_stride, bool first) {
    if (panels.low != nullptr) {
        multiply_panels<true>(keys, panels, n_panels, scores, score_stride, first);
    } else {
        multiply_panels<false>(keys, panels, n_panels, scores, score_stride, first);
    }
}

// Σ k² of a row in float32, within the bounds `Bf16Products::square` states.
float square(const BFloat16* keys, std::int64_t n) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    std::int64_t j = 0;
    for (; j + 128 <= n; j += 128) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
            const __m512i pairs = _mm512_loadu_si512(keys + j + 32 * part);
            sums[part] = add_products(sums[part], pairs, pairs);
        }
    }
    for (; j < n; j += 32) {
        const std::int64_t rest = n - j;
        const __mmask32 there = rest >= 32 ? 0xffffffffu : (1u << rest) - 1u;
        const __m512i pairs = _mm512_maskz_loadu_epi16(there, keys + j);
        sums[0] = add_products(sums[0], pairs, pairs);
    }
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
    for (int half = 8; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) {
            lanes[lane] += lanes[lane + half];
        }
    }
    return lanes[0];
}

}  // namespace

constinit const Bf16Products kBf16Products = {.multiply = multiply, .square = square};

}  // namespace rep_fast::avx512_bf16
