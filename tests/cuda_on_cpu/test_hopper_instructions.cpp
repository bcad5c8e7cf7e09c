// The models of mbarrier, of the copy engine's boxes and of wgmma: do they compute what is documented, and does every
// wait that is left out show?
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/ptx/wgmma_int8.cuh"
#include "cuda/tensor_map.cuh"
#include "execution_errors.h"
#include "key_numbers.h"
#include "tests.h"

namespace {

using rep_fast::BFloat16;
using rep_fast::cuda::BoxedMatrix;
using rep_fast::cuda::launch;
using rep_fast::cuda::LaunchShape;
using rep_fast::cuda::make_tensor_map;
using rep_fast::cuda::shared_as;
using rep_fast::tests::as_key;
namespace ptx = rep_fast::cuda::ptx;

constexpr int kRounds = 7;
constexpr int kReaders = 64;

LaunchShape one_block(unsigned n_threads, std::size_t shared_bytes) {
    return {dim3(1), dim3(n_threads), shared_bytes, nullptr, true};
}

// ---- mbarrier ----------------------------------------------------------------------------------------------------

struct HandOver {
    std::uint64_t filled, emptied;
    int value;
};

// The last thread hands one number after the other to all others through one place.
template <bool kReaderWaits, bool kWriterWaits>
__global__ void hand_over(int* out) {
    auto& shared = shared_as<HandOver>();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&shared.filled, 1);
        ptx::mbarrier_init(&shared.emptied, kReaders);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    for (unsigned round = 0; round < kRounds; ++round) {
        if (threadIdx.x == kReaders) {
            if (kWriterWaits) {
                ptx::mbarrier_try_wait_parity(&shared.emptied, (round & 1u) ^ 1u);
            }
            shared.value = 100 + static_cast<int>(round);
            ptx::mbarrier_arrive(&shared.filled);
        } else {
            if (kReaderWaits) {
                ptx::mbarrier_try_wait_parity(&shared.filled, round & 1u);
            }
            out[round * kReaders + threadIdx.x] = shared.value;
            ptx::mbarrier_arrive(&shared.emptied);
        }
    }
}

template <bool kReaderWaits, bool kWriterWaits>
bool hands_over(std::uint64_t seed) {
    cuda_on_cpu::set_seed(seed);
    std::vector<int> out(kRounds * kReaders, -1);
    launch("hand_over", hand_over<kReaderWaits, kWriterWaits>, one_block(kReaders + 1, sizeof(HandOver)), out.data());
    bool is_right = true;
    for (std::size_t place = 0; place < out.size(); ++place) {
        is_right &= out[place] == 100 + static_cast<int>(place / kReaders);
    }
    return is_right;
}

__global__ void arrive_too_often() {
    auto& barrier = shared_as<std::uint64_t>();
    ptx::mbarrier_init(&barrier, 2);
    ptx::mbarrier_arrive_expect_tx(&barrier, 64);
    ptx::mbarrier_arrive(&barrier);
    ptx::mbarrier_arrive(&barrier);  // the phase is not complete before 64 bytes have landed
}

__global__ void wait_for_nobody() {
    auto& barrier = shared_as<std::uint64_t>();
    ptx::mbarrier_init(&barrier, 1);
    ptx::mbarrier_try_wait_parity(&barrier, 1);  // the phase before the first counts as complete
    ptx::mbarrier_try_wait_parity(&barrier, 0);
}

void test_phases_hand_over() {
    bool is_reader_seen = false, is_writer_seen = false;
    for (std::uint64_t seed = 0; seed < 10; ++seed) {
        EXPECT((hands_over<true, true>(seed)));
        // who does not wait may also run ahead of the phases, and the other waits for ever
        is_reader_seen |= holds(error_of([&] { is_reader_seen |= !hands_over<false, true>(seed); }), "nobody can go");
        is_writer_seen |= holds(error_of([&] { is_writer_seen |= !hands_over<true, false>(seed); }), "nobody can go");
    }
    EXPECT(is_reader_seen);
    EXPECT(is_writer_seen);
}

void test_misuse_of_barriers_is_found() {
    const auto shape = one_block(1, 64);
    EXPECT(holds(error_of([&] { launch("often", arrive_too_often, shape); }), "more arrivals"));
    EXPECT(holds(error_of([&] { launch("nobody", wait_for_nobody, shape); }), "waits for a condition"));
}

// ---- boxes -------------------------------------------------------------------------------------------------------

constexpr int kBoxRows = 24;
constexpr int kBoxColumns = ptx::kBoxColumns<std::uint16_t>;

struct BoxShared {
    alignas(1024) unsigned char box[kBoxRows * ptx::kBoxRowBytes];
    std::uint64_t landed;
};

template <bool kWaits>
__global__ void bring_box(const ptx::TensorMap map, int column, int row, std::uint16_t* out) {
    auto& shared = shared_as<BoxShared>();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&shared.landed, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(&shared.landed, sizeof(shared.box));
        ptx::copy_box(shared.box, &map, &shared.landed, column, row);
    }
    __syncthreads();
    if (kWaits) {
        ptx::mbarrier_try_wait_parity(&shared.landed, 0);
    }
    for (unsigned place = threadIdx.x; place < kBoxRows * kBoxColumns; place += blockDim.x) {
        out[place] = *reinterpret_cast<const std::uint16_t*>(shared.box + ptx::swizzled(2 * place));
    }
    ptx::mbarrier_try_wait_parity(&shared.landed, 0);
}

__global__ void forget_box(const ptx::TensorMap map) {
    auto& shared = shared_as<BoxShared>();
    ptx::mbarrier_init(&shared.landed, 1);
    ptx::copy_box(shared.box, &map, &shared.landed, 0, 0);
}

struct Numbers {
    std::int64_t n_rows = 40, n_columns = 75, stride = 80;
    std::vector<std::uint16_t> values;

    Numbers() {
        for (std::int64_t place = 0; place < n_rows * stride; ++place) {
            values.push_back(place % stride < n_columns ? static_cast<std::uint16_t>(place + 1) : 0xffffu);
        }
    }
    [[nodiscard]] BoxedMatrix matrix() const { return {values.data(), n_rows, n_columns, stride}; }
    [[nodiscard]] std::uint16_t at(std::int64_t row, std::int64_t column) const {
        const bool is_inside = row < n_rows && column < n_columns;
        return is_inside ? values[static_cast<std::size_t>(row * stride + column)] : std::uint16_t{0};
    }
};

template <bool kWaits>
bool brings_box(const Numbers& numbers, int column, int row) {
    std::vector<std::uint16_t> out(kBoxRows * kBoxColumns, 7);
    launch("bring_box", bring_box<kWaits>, one_block(64, sizeof(BoxShared)),
           make_tensor_map(numbers.matrix(), kBoxRows), column, row, out.data());
    bool is_right = true;
    for (std::size_t place = 0; place < out.size(); ++place) {
        is_right &= out[place] == numbers.at(row + static_cast<std::int64_t>(place / kBoxColumns),
                                             column + static_cast<std::int64_t>(place % kBoxColumns));
    }
    return is_right;
}

void test_boxes_land_swizzled() {
    const Numbers numbers;
    bool is_missing_wait_seen = false;
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
        cuda_on_cpu::set_seed(seed);
        for (const int row : {0, 3, 30, 39, 64}) {
            for (const int column : {0, 64, 128}) {
                EXPECT(brings_box<true>(numbers, column, row));
            }
        }
        is_missing_wait_seen |= !brings_box<false>(numbers, 0, 3);
    }
    EXPECT(is_missing_wait_seen);
    EXPECT(holds(error_of([&] {
                     launch("forget", forget_box, one_block(1, sizeof(BoxShared)),
                            make_tensor_map(numbers.matrix(), kBoxRows));
                 }),
                 "before its asynchronous copies had landed"));
}

// Down a column of 16-byte pieces, eight rows lie in eight different quarters of the banks; and no byte is lost.
void test_the_swizzle_is_one_to_one_and_free_of_conflicts() {
    std::vector<bool> is_taken(2048, false);
    for (std::uint32_t offset = 0; offset < 2048; ++offset) {
        EXPECT(!is_taken[ptx::swizzled(offset)]);
        is_taken[ptx::swizzled(offset)] = true;
        EXPECT(ptx::swizzled(ptx::swizzled(offset)) == offset);
    }
    for (std::uint32_t piece = 0; piece < 8; ++piece) {
        unsigned banks = 0;
        for (std::uint32_t row = 0; row < 8; ++row) {
            banks |= 1u << ptx::swizzled(row * 128 + piece * 16) % 128 / 16;
        }
        EXPECT(banks == 0xffu);
    }
}

void test_matrices_the_engine_does_not_take() {
    const Numbers numbers;
    EXPECT(has_tensor_map(numbers.matrix()));
    BoxedMatrix other = numbers.matrix();
    other.data = numbers.values.data() + 1;
    EXPECT(!has_tensor_map(other));
    other = numbers.matrix();
    other.row_stride = 75;
    EXPECT(!has_tensor_map(other));
    other = numbers.matrix();
    other.element_bytes = 1;  // of the same numbers half a row on, and that is no multiple of 16 bytes
    other.row_stride = 88;
    EXPECT(!has_tensor_map(other));
    other = numbers.matrix();
    other.row_stride = 0;  // an expanded row
    EXPECT(!has_tensor_map(other));
    other = numbers.matrix();
    other.n_rows = std::int64_t{1} << 31;
    EXPECT(!has_tensor_map(other));
}

// ---- wgmma -------------------------------------------------------------------------------------------------------

constexpr int kStages = 3;

template <int kColumns>
struct ProductShared {
    alignas(1024) unsigned char a[kStages][64 * ptx::kBoxRowBytes];
    unsigned char b[kStages][kColumns * ptx::kBoxRowBytes];
    std::uint64_t landed;
};

enum class Left { kNothing, kOutWait, kOutFence };

void multiply(float (&sums)[64], std::uint64_t a, std::uint64_t b, bool accumulates) {
    ptx::wgmma_m64n128k16(sums, a, b, accumulates);
}
void multiply(float (&sums)[128], std::uint64_t a, std::uint64_t b, bool accumulates) {
    ptx::wgmma_m64n256k16(sums, a, b, accumulates);
}
void multiply(std::int32_t (&sums)[64], std::uint64_t a, std::uint64_t b, bool accumulates) {
    ptx::wgmma_m64n128k32(sums, a, b, accumulates);
}
void multiply(std::int32_t (&sums)[128], std::uint64_t a, std::uint64_t b, bool accumulates) {
    ptx::wgmma_m64n256k32(sums, a, b, accumulates);
}

// What is multiplied, and what its sums are.
struct OfBFloat16 {
    using Element = BFloat16;
    using Sum = float;
    static BFloat16 element(int whole) { return as_key<BFloat16>(static_cast<float>(whole)); }
    static bool is_hidden(float sum) { return std::isnan(sum); }
};
struct OfInt8 {
    using Element = std::int8_t;
    using Sum = std::int32_t;
    static std::int8_t element(int whole) { return static_cast<std::int8_t>(whole); }
    static bool is_hidden(std::int32_t sum) { return sum == 0x5a5a5a5a; }
};

// out [64, kColumns] = 1 + a bᵀ, a group of products per stage.
template <class Of, int kColumns, Left kLeft>
__global__ void multiply_tiles(const ptx::TensorMap a, const ptx::TensorMap b, typename Of::Sum* out) {
    auto& shared = shared_as<ProductShared<kColumns>>();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&shared.landed, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(&shared.landed, sizeof(shared.a) + sizeof(shared.b));
        for (int stage = 0; stage < kStages; ++stage) {
            const int column = stage * ptx::kBoxColumns<typename Of::Element>;
            ptx::copy_box(shared.a[stage], &a, &shared.landed, column, 0);
            ptx::copy_box(shared.b[stage], &b, &shared.landed, column, 0);
        }
    }
    __syncthreads();
    ptx::mbarrier_try_wait_parity(&shared.landed, 0);
    typename Of::Sum sums[kColumns / 2];
    for (auto& sum : sums) {
        sum = 1;
    }
    if (kLeft != Left::kOutFence) {
        ptx::wgmma_fence();
    }
    for (int stage = 0; stage < kStages; ++stage) {
        for (std::uint32_t bytes = 0; bytes < ptx::kBoxRowBytes; bytes += ptx::kProductBytes) {
            const std::uint32_t a_at = ptx::shared_address(shared.a[stage]) + bytes;
            const std::uint32_t b_at = ptx::shared_address(shared.b[stage]) + bytes;
            multiply(sums, ptx::matrix_at(a_at), ptx::matrix_at(b_at), true);
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

template <class Of>
struct Factors {
    using Element = typename Of::Element;
    // the last box is cut off
    std::int64_t width = 2 * ptx::kBoxColumns<Element> + 22, stride = width + 10;
    std::vector<int> a, b;

    explicit Factors(int n_columns)
        : a(static_cast<std::size_t>(64 * width)), b(static_cast<std::size_t>(n_columns * width)) {
        unsigned state = 1;
        for (auto* const values : {&a, &b}) {
            for (int& value : *values) {
                state = state * 1664525u + 1013904223u;
                value = static_cast<int>(state >> 28) - 8;
            }
        }
    }
    [[nodiscard]] int wanted(std::int64_t row, std::int64_t column) const {
        int sum = 1;
        for (std::int64_t j = 0; j < width; ++j) {
            sum += a[static_cast<std::size_t>(row * width + j)] * b[static_cast<std::size_t>(column * width + j)];
        }
        return sum;
    }
    // Rows where the copy engine takes them, with numbers behind their width.
    [[nodiscard]] std::vector<Element> padded(const std::vector<int>& values) const {
        std::vector<Element> rows(values.size() / static_cast<std::size_t>(width) * static_cast<std::size_t>(stride),
                                  Of::element(3));
        for (std::size_t place = 0; place < values.size(); ++place) {
            const auto row = static_cast<std::int64_t>(place) / width,
                       column = static_cast<std::int64_t>(place) % width;
            rows[static_cast<std::size_t>(row * stride + column)] = Of::element(values[place]);
        }
        return rows;
    }
};

template <class Of, int kColumns, Left kLeft>
std::vector<typename Of::Sum> product(const Factors<Of>& factors) {
    std::vector<typename Of::Sum> out(64 * kColumns, typename Of::Sum{-1});
    const auto a = factors.padded(factors.a), b = factors.padded(factors.b);
    const auto map = [&](const auto& values, int rows) {
        return make_tensor_map(
            {values.data(), rows, factors.width, factors.stride, static_cast<int>(sizeof(typename Of::Element))}, rows);
    };
    launch("multiply_tiles", multiply_tiles<Of, kColumns, kLeft>, one_block(128, sizeof(ProductShared<kColumns>)),
           map(a, 64), map(b, kColumns), out.data());
    return out;
}

template <class Of, int kColumns>
void test_products() {
    const Factors<Of> factors(kColumns);
    for (std::uint64_t seed = 0; seed < 3; ++seed) {
        cuda_on_cpu::set_seed(seed);
        const auto out = product<Of, kColumns, Left::kNothing>(factors);
        for (std::int64_t place = 0; place < 64 * kColumns; ++place) {
            const auto wanted = static_cast<typename Of::Sum>(factors.wanted(place / kColumns, place % kColumns));
            EXPECT(out[static_cast<std::size_t>(place)] == wanted);
        }
    }
    for (const auto value : product<Of, kColumns, Left::kOutWait>(factors)) {
        EXPECT(Of::is_hidden(value));
    }
    const auto unfenced = [&] { static_cast<void>(product<Of, kColumns, Left::kOutFence>(factors)); };
    EXPECT(holds(error_of(unfenced), "no wgmma.fence"));
}

}  // namespace

void test_hopper_instructions() {
    test_phases_hand_over();
    test_misuse_of_barriers_is_found();
    test_boxes_land_swizzled();
    test_the_swizzle_is_one_to_one_and_free_of_conflicts();
    test_matrices_the_engine_does_not_take();
    test_products<OfBFloat16, 128>();
    test_products<OfBFloat16, 256>();
    test_products<OfInt8, 128>();
    test_products<OfInt8, 256>();
}
