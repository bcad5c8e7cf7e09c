// Portable bodies of whitened_topk, for the baseline instruction set.
#include <array>
#include <cstring>

#include "cpu/score_selection.h"
#include "cpu/simd_portable.h"
#include "cpu/whitened_topk_kernels.h"

namespace rep_fast::portable {
namespace {

template <class T>
double widen(const T* keys, std::int64_t n, float* widened) {
    double square = 0.0;
    for (std::int64_t j = 0; j < n; ++j) {
        widened[j] = to_float(keys[j]);
        square += static_cast<double>(widened[j]) * static_cast<double>(widened[j]);
    }
    return square;
}

template <class T>
double exact_score(const T* key, const float* query, std::int64_t n, const T* next) {
    std::array<double, kExactLanes> lanes{};
    std::int64_t j = 0;
    for (; j + kExactLanes <= n; j += kExactLanes) {
        __builtin_prefetch(next + j, 0, 2);
        for (std::int64_t lane = 0; lane < kExactLanes; ++lane) {
            lanes[lane] += static_cast<double>(to_float(key[j + lane])) * static_cast<double>(query[j + lane]);
        }
    }
    for (std::int64_t lane = 0; j < n; ++j, ++lane) {
        lanes[lane] += static_cast<double>(to_float(key[j])) * static_cast<double>(query[j]);
    }
    for (std::int64_t half = kExactLanes / 2; half > 0; half /= 2) {
        for (std::int64_t lane = 0; lane < half; ++lane) {
            lanes[lane] += lanes[lane + half];
        }
    }
    return lanes[0];
}

// Four floats, the vector of the baseline instruction set. Written out because the compiler keeps a plain array of sums
// in memory: 2 instead of 17 GFlop/s.
using Float4 [[gnu::vector_size(16)]] = float;
constexpr std::int64_t kPanelVectors = kPanelQueries / 4;

Float4 load4(const float* from) {
    Float4 vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

// Two key rows against one panel: 8 sums, 4 queries and 2 keys fit the 16 baseline registers.
void multiply_rows(const float* keys, const float* panel, std::int64_t depth, float* scores, std::int64_t score_stride,
                   bool first) {
    Float4 sums[2][kPanelVectors] = {};
    for (std::int64_t j = 0; j < depth; ++j) {
#pragma GCC unroll 4
        for (std::int64_t part = 0; part < kPanelVectors; ++part) {
            const Float4 queries = load4(panel + j * kPanelQueries + 4 * part);
            sums[0][part] += keys[j] * queries;
            sums[1][part] += keys[kWidenedStride + j] * queries;
        }
    }
#pragma GCC unroll 2
    for (std::int64_t row = 0; row < 2; ++row) {
#pragma GCC unroll 4
        for (std::int64_t part = 0; part < kPanelVectors; ++part) {
            float* const out = scores + row * score_stride + 4 * part;
            const Float4 total = first ? sums[row][part] : load4(out) + sums[row][part];
            std::memcpy(out, &total, sizeof total);
        }
    }
}

void multiply(const float* keys, std::int64_t n_tiles, const float* panels, std::int64_t n_panels,
              std::int64_t panel_stride, std::int64_t depth, float* scores, std::int64_t score_stride, bool first) {
    static_assert(kTileKeys % 2 == 0);
    for (std::int64_t panel = 0; panel < n_panels; ++panel) {
        for (std::int64_t row = 0; row < n_tiles * kTileKeys; row += 2) {
            multiply_rows(keys + row * kWidenedStride, panels + panel * panel_stride, depth,
                          scores + row * score_stride + panel * kPanelQueries, score_stride, first);
        }
    }
}

}  // namespace

constinit const WhitenedTopkKernels kWhitenedTopk = {.rows = {.f32 = {widen<float>, exact_score<float>},
                                                              .bf16 = {widen<BFloat16>, exact_score<BFloat16>},
                                                              .f16 = {widen<Float16>, exact_score<Float16>}},
                                                     .float32 = {.multiply = multiply, .select = select_scores<Simd>}};

}  // namespace rep_fast::portable
