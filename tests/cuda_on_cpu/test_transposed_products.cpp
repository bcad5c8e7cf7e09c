// The models of wgmma with transposed operands and of stores for the asynchronous proxy: do they compute what is
// documented, and does what is left out show?
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/async_proxy.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma_transposed.cuh"
#include "cuda/tensor_map.cuh"
#include "execution_errors.h"
#include "moment_problem.h"
#include "tests.h"

namespace {

using rep_fast::BFloat16;
using rep_fast::Float16;
using rep_fast::cuda::launch;
using rep_fast::cuda::LaunchShape;
using rep_fast::cuda::make_tensor_map;
using rep_fast::cuda::shared_as;
namespace ptx = rep_fast::cuda::ptx;

constexpr int kStages = 2;
constexpr int kLines = 32;  // of a stage
constexpr std::uint32_t kBoxBytes = kLines * ptx::kBoxRowBytes;
constexpr int kBoxWidth = 64;

LaunchShape one_block(unsigned n_threads, std::size_t shared_bytes) {
    return {dim3(1), dim3(n_threads), shared_bytes, nullptr, true};
}

// ---- wgmma -------------------------------------------------------------------------------------------------------

template <int kColumns>
struct TransposedShared {
    static constexpr int kBoxes = 1 + kColumns / kBoxWidth;  // the first is a's
    alignas(1024) unsigned char boxes[kStages][kBoxes][kBoxBytes];
    std::uint64_t landed;
};

enum class Left { kNothing, kOutWait, kOutFence, kOutNextColumns, kOutAlignment };

template <class Key>
void multiply(float (&sums)[64], std::uint64_t a, std::uint64_t b) {
    ptx::wgmma_m64n128k16_transposed(sums, a, b, true, Key{});
}
template <class Key>
void multiply(float (&sums)[96], std::uint64_t a, std::uint64_t b) {
    ptx::wgmma_m64n192k16_transposed(sums, a, b, true, Key{});
}

template <int kColumns>
void bring_boxes(const ptx::TensorMap& a, const ptx::TensorMap& b, TransposedShared<kColumns>& shared) {
    ptx::mbarrier_init(&shared.landed, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&shared.landed, sizeof(shared.boxes));
    for (int stage = 0; stage < kStages; ++stage) {
        ptx::copy_box(shared.boxes[stage][0], &a, &shared.landed, 0, stage * kLines);
        for (int box = 1; box < TransposedShared<kColumns>::kBoxes; ++box) {
            ptx::copy_box(shared.boxes[stage][box], &b, &shared.landed, (box - 1) * kBoxWidth, stage * kLines);
        }
    }
}

// out [64, kColumns] = 1 + aᵀ b, a group of products per stage.
template <class Key, int kColumns, Left kLeft>
__global__ void multiply_transposed(const ptx::TensorMap a, const ptx::TensorMap b, float* out) {
    auto& shared = shared_as<TransposedShared<kColumns>>();
    if (threadIdx.x == 0) {
        bring_boxes(a, b, shared);
    }
    __syncthreads();
    ptx::mbarrier_try_wait_parity(&shared.landed, 0);
    float sums[kColumns / 2];
    for (float& sum : sums) {
        sum = 1.0f;
    }
    if (kLeft != Left::kOutFence) {
        ptx::wgmma_fence();
    }
    constexpr std::uint32_t kNextColumns = kLeft == Left::kOutNextColumns ? 0 : kBoxBytes;
    constexpr std::uint32_t kShift = kLeft == Left::kOutAlignment ? 32 : 0;
    for (int stage = 0; stage < kStages; ++stage) {
        for (std::uint32_t line = 0; line < kLines; line += ptx::kTransposedDepth) {
            const std::uint32_t offset = line * ptx::kBoxRowBytes + kShift;
            multiply<Key>(
                sums, ptx::transposed_matrix_at(ptx::shared_address(shared.boxes[stage][0]) + offset, kNextColumns),
                ptx::transposed_matrix_at(ptx::shared_address(shared.boxes[stage][1]) + offset, kNextColumns));
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>(sums);
    }
    if (kLeft != Left::kOutWait) {
        ptx::wgmma_wait<0>(sums);
    }
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (unsigned place = 0; place < kColumns / 2; ++place) {
        const unsigned row = 16 * warp + lane / 4 + place / 2 % 2 * 8;
        out[row * kColumns + place / 4 * 8 + 2 * (lane % 4) + place % 2] = sums[place];
    }
    ptx::wgmma_wait<0>(sums);
}

// Whole numbers, k along the lines; the last lines and columns of the boxes are cut off.
template <class Key>
struct Factors {
    std::int64_t n_lines = 61, n_rows = 60, n_columns;
    std::vector<Key> a, b;
    explicit Factors(std::int64_t columns)
        : n_columns(columns - 3),
          a(static_cast<std::size_t>(n_lines * 64)),
          b(static_cast<std::size_t>(n_lines * columns)) {
        unsigned state = 1;
        for (auto* const values : {&a, &b}) {
            for (Key& value : *values) {
                state = state * 1664525u + 1013904223u;
                value = key_of<Key>(static_cast<float>(static_cast<int>(state >> 28) - 8));
            }
        }
    }
    [[nodiscard]] float wanted(std::int64_t row, std::int64_t column, std::int64_t b_stride) const {
        float sum = 1.0f;
        for (std::int64_t k = 0; row < n_rows && column < n_columns && k < n_lines; ++k) {
            sum += to_float(a[static_cast<std::size_t>(k * 64 + row)]) *
                   to_float(b[static_cast<std::size_t>(k * b_stride + column)]);
        }
        return sum;
    }
};

template <class Key, int kColumns, Left kLeft>
std::vector<float> product(const Factors<Key>& factors) {
    std::vector<float> out(64 * kColumns, -1.0f);
    launch("multiply_transposed", multiply_transposed<Key, kColumns, kLeft>,
           one_block(128, sizeof(TransposedShared<kColumns>)),
           make_tensor_map({factors.a.data(), factors.n_lines, factors.n_rows, 64}, kLines),
           make_tensor_map({factors.b.data(), factors.n_lines, factors.n_columns, kColumns}, kLines), out.data());
    return out;
}

template <class Key, int kColumns>
void test_products() {
    const Factors<Key> factors(kColumns);
    for (std::uint64_t seed = 0; seed < 2; ++seed) {
        cuda_on_cpu::set_seed(seed);
        const auto out = product<Key, kColumns, Left::kNothing>(factors);
        for (std::int64_t place = 0; place < 64 * kColumns; ++place) {
            EXPECT(out[static_cast<std::size_t>(place)] ==
                   factors.wanted(place / kColumns, place % kColumns, kColumns));
        }
    }
    for (const float value : product<Key, kColumns, Left::kOutWait>(factors)) {
        EXPECT(std::isnan(value));
    }
    const auto wrong = [&](auto left) {
        return error_of([&] { static_cast<void>(product<Key, kColumns, decltype(left)::value>(factors)); });
    };
    EXPECT(holds(wrong(std::integral_constant<Left, Left::kOutFence>{}), "no wgmma.fence"));
    EXPECT(holds(wrong(std::integral_constant<Left, Left::kOutAlignment>{}), "multiples of 1024"));
    // without the offset the later columns are the first ones again
    const auto repeated = product<Key, kColumns, Left::kOutNextColumns>(factors);
    EXPECT(repeated[64] == repeated[0] && repeated[64] != factors.wanted(0, 64, kColumns));
}

// ---- stores for the asynchronous proxy ---------------------------------------------------------------------------

template <bool kFences>
__global__ void store_and_look(unsigned* out) {
    auto& shared = shared_as<uint4>();
    if (threadIdx.x == 0) {
        shared = uint4{9, 9, 9, 9};
        ptx::store_16_shared(&shared, uint4{1, 2, 3, 4});
        if (kFences) {
            ptx::fence_async_proxy();
        }
    }
    __syncthreads();
    *out = shared.z;
}

__global__ void store_beside() {
    ptx::store_16_shared(static_cast<unsigned char*>(cuda_on_cpu::shared_memory()) + 8, uint4{0, 0, 0, 0});
}

void test_stores_are_there_behind_the_fence() {
    unsigned seen = 0;
    launch("look", store_and_look<true>, one_block(1, sizeof(uint4)), &seen);
    EXPECT(seen == 3);
    EXPECT(holds(error_of([&] { launch("look", store_and_look<false>, one_block(1, sizeof(uint4)), &seen); }),
                 "before its asynchronous work was waited for"));
    EXPECT(seen == 9);
    EXPECT(holds(error_of([&] { launch("beside", store_beside, one_block(1, 32)); }), "not a multiple of the size"));
}

}  // namespace

void test_transposed_products() {
    test_products<BFloat16, 128>();
    test_products<BFloat16, 192>();
    test_products<Float16, 128>();
    test_products<Float16, 192>();
    test_stores_are_there_behind_the_fence();
}
