// AVX-512 VNNI body of whitened_topk's int8 pass: keys are quantised as they are read, then multiplied in int32.
//
// vpdpbusd adds four products of an unsigned and a signed byte to an int32. Keys are the unsigned side, stored as
// q + 128; the sums start at −128·Σq of the query, which takes the 128 out again. A panel holds quads of depth next to
// each other, [quad][16 queries][4]. The register tile is that of the float32 body: 6 keys × 4 panels.
// Internal linkage only, no standard library: see core/dispatch.h.
#include <immintrin.h>

#include "cpu/score_tile_avx512.h"
#include "cpu/whitened_topk_kernels.h"

namespace rep_fast::avx512_bf16 {
namespace {

constexpr std::int64_t kVector = 16;
static_assert(kQuantisedMultiple == 4 * kVector, "four vectors are packed into one of bytes");

[[gnu::always_inline]] inline __mmask16 first_lanes(std::int64_t n) {
    return n >= kVector ? __mmask16{0xffff} : n <= 0 ? __mmask16{0} : static_cast<__mmask16>((1u << n) - 1u);
}

// n keys as float32, zeros behind them.
[[gnu::always_inline]] inline __m512 load_keys(const float* keys, __mmask16 there) {
    return _mm512_maskz_loadu_ps(there, keys);
}
[[gnu::always_inline]] inline __m512 load_keys(const BFloat16* keys, __mmask16 there) {
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(there, keys));
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, wide, 16));
}
[[gnu::always_inline]] inline __m512 load_keys(const Float16* keys, __mmask16 there) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(there, keys));
}

[[gnu::always_inline]] inline std::int32_t largest_lane(__m512i lanes) {
    alignas(64) std::int32_t values[kVector];
    _mm512_store_si512(values, lanes);
    std::int32_t largest = values[0];
    for (const std::int32_t value : values) {
        largest = value > largest ? value : largest;
    }
    return largest;
}

template <class T>
float largest(const T* keys, const float* scales, std::int64_t n) {
    // without its sign a float32 orders as an integer, NaN above infinity
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i found[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (std::int64_t j = 0; j < n; j += kQuantisedMultiple) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
            const std::int64_t at = j + part * kVector;
            const __mmask16 there = first_lanes(n - at);
            const __m512 scaled = _mm512_mul_ps(load_keys(keys + at, there), _mm512_loadu_ps(scales + at));
            const __m512i bits = _mm512_and_si512(_mm512_castps_si512(scaled), magnitude);
            found[part] = _mm512_maskz_max_epi32(0xffff, found[part], bits);
        }
    }
    const __m512i left = _mm512_maskz_max_epi32(0xffff, found[0], found[1]);
    const __m512i right = _mm512_maskz_max_epi32(0xffff, found[2], found[3]);
    return __builtin_bit_cast(float, largest_lane(_mm512_maskz_max_epi32(0xffff, left, right)));
}

// 16 of (round(key · scale · per_step) + dither) >> 16, plus 128.
template <class T>
[[gnu::always_inline]] inline __m512i quantised(const T* keys, const float* scales, const std::int32_t* dither,
                                                __m512 per_step, __mmask16 there) {
    const __m512 scaled = _mm512_mul_ps(load_keys(keys, there), _mm512_loadu_ps(scales));
    const __m512i fixed = _mm512_maskz_cvtps_epi32(0xffff, _mm512_mul_ps(scaled, per_step));
    const __m512i dithered = _mm512_add_epi32(fixed, _mm512_loadu_si512(dither));
    return _mm512_add_epi32(_mm512_maskz_srai_epi32(0xffff, dithered, 16), _mm512_set1_epi32(128));
}

template <class T>
std::int64_t quantise(const T* keys, const float* scales, const std::int32_t* dither, float per_step, std::int64_t n,
                      std::uint8_t* out) {
    const __m512 steps = _mm512_set1_ps(per_step);
    // packing works in lanes of 128 bits: dword 4l + i holds four of vector i's elements 4l …
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i middle = _mm512_set1_epi8(static_cast<char>(0x80));
    __m512i squares = _mm512_setzero_si512();
    for (std::int64_t j = 0; j < n; j += kQuantisedMultiple) {
        __m512i parts[4];
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
            const std::int64_t at = j + part * kVector;
            parts[part] = quantised(keys + at, scales + at, dither + at, steps, first_lanes(n - at));
        }
        const __m512i low = _mm512_packus_epi32(parts[0], parts[1]);
        const __m512i high = _mm512_packus_epi32(parts[2], parts[3]);
        const __m512i bytes = _mm512_maskz_permutexvar_epi32(0xffff, order, _mm512_packus_epi16(low, high));
        _mm512_storeu_si512(out + j, bytes);
        const __m512i magnitudes = _mm512_abs_epi8(_mm512_xor_si512(bytes, middle));  // at most 127: signed and not
        squares = _mm512_dpbusd_epi32(squares, magnitudes, magnitudes);
    }
    alignas(64) std::int32_t lanes[kVector];
    _mm512_store_si512(lanes, squares);
    std::int64_t total = 0;
    for (const std::int32_t lane : lanes) {
        total += lane;
    }
    return total;
}

// Four neighbours of a row.
[[gnu::always_inline]] inline __m512i broadcast_quad(const std::uint8_t* keys) {
    int quad;
    __builtin_memcpy(&quad, keys, sizeof quad);
    return _mm512_set1_epi32(quad);
}

// sums[6, 16·kPanels] (+)= keys[6 rows, 4·n_quads] · panels. Two base pointers and multiples of the strides keep all
// ten addresses in few registers.
template <int kPanels>
void multiply_tile(const Int8Keys& keys, std::int64_t row, const std::uint32_t* panels, std::int64_t panel_stride,
                   std::int32_t* sums, std::int64_t sum_stride, const std::int32_t* starts) {
    __m512i tile[kTileKeys][kPanels];
    for (auto& own : tile) {
        for (__m512i& sum : own) {
            sum = _mm512_setzero_si512();
        }
    }
    const std::uint8_t* from = keys.first + row * keys.stride;
    const std::uint8_t* behind = from + 3 * keys.stride;
    for (const std::uint8_t* const end = from + keys.depth; from < end; from += 4, behind += 4) {
        __m512i queries[kPanels];
#pragma GCC unroll 4
        for (int panel = 0; panel < kPanels; ++panel) {
            queries[panel] = _mm512_loadu_si512(panels + panel * panel_stride);
        }
        panels += kPanelQueries;
#pragma GCC unroll 6
        for (std::int64_t i = 0; i < kTileKeys; ++i) {
            const __m512i key = broadcast_quad((i < 3 ? from : behind) + i % 3 * keys.stride);
#pragma GCC unroll 4
            for (int panel = 0; panel < kPanels; ++panel) {
                tile[i][panel] = _mm512_dpbusd_epi32(tile[i][panel], key, queries[panel]);
            }
        }
    }
#pragma GCC unroll 6
    for (std::int64_t i = 0; i < kTileKeys; ++i) {
#pragma GCC unroll 4
        for (int panel = 0; panel < kPanels; ++panel) {
            std::int32_t* const out = sums + i * sum_stride + panel * kPanelQueries;
            const __m512i before = _mm512_loadu_si512(starts != nullptr ? starts + panel * kPanelQueries : out);
            _mm512_storeu_si512(out, _mm512_add_epi32(before, tile[i][panel]));
        }
    }
}

template <int kPanels>
void multiply_group(const Int8Keys& keys, const std::uint32_t* panels, std::int64_t panel_stride, std::int32_t* sums,
                    std::int64_t sum_stride, const std::int32_t* starts) {
    for (std::int64_t row = 0; row < keys.n_rows; row += kTileKeys) {
        multiply_tile<kPanels>(keys, row, panels, panel_stride, sums + row * sum_stride, sum_stride, starts);
    }
}

void multiply(const Int8Keys& keys, const std::uint32_t* panels, std::int64_t n_panels, std::int64_t panel_stride,
              std::int32_t* sums, std::int64_t sum_stride, const std::int32_t* starts) {
    for_panel_groups(n_panels, [&]<int kPanels>(std::int64_t panel) {
        const std::int32_t* const start = starts != nullptr ? starts + panel * kPanelQueries : nullptr;
        multiply_group<kPanels>(keys, panels + panel * panel_stride, panel_stride, sums + panel * kPanelQueries,
                                sum_stride, start);
    });
}

std::int64_t select(const std::int32_t* sums, const Int8Margins& margins, const float* thresholds, std::int64_t n,
                    float* bounds, std::int32_t* survivors) {
    const __m512 key_step = _mm512_set1_ps(margins.key_step);
    const __m512 key_norm = _mm512_set1_ps(margins.key_norm);
    const __m512 rest = _mm512_set1_ps(margins.underflow);
    std::int64_t count = 0;
    for (std::int64_t q = 0; q < n; q += kVector) {
        const __m512 sum = _mm512_maskz_cvtepi32_ps(0xffff, _mm512_loadu_si512(sums + q));
        const __m512 by_step = _mm512_fmadd_ps(key_step, sum, key_norm);
        const __m512 of_query = _mm512_fmadd_ps(key_step, _mm512_loadu_ps(margins.of_queries + q), rest);
        const __m512 bound = _mm512_fmadd_ps(by_step, _mm512_loadu_ps(margins.query_steps + q), of_query);
        _mm512_storeu_ps(bounds + q, bound);
        unsigned alive = _mm512_cmp_ps_mask(bound, _mm512_loadu_ps(thresholds + q), _CMP_NLT_UQ);
        for (; alive != 0; alive &= alive - 1) {
            survivors[count++] = static_cast<std::int32_t>(q) + __builtin_ctz(alive);
        }
    }
    return count;
}

}  // namespace

constinit const Int8Products kInt8Products = {.rows = {.f32 = {largest<float>, quantise<float>},
                                                       .bf16 = {largest<BFloat16>, quantise<BFloat16>},
                                                       .f16 = {largest<Float16>, quantise<Float16>}},
                                              .multiply = multiply,
                                              .select = select};

}  // namespace rep_fast::avx512_bf16
