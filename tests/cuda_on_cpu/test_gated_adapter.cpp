// Gates and projections against a float64 walk over the adapters, token by token.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "cuda/gated_adapter.h"
#include "executor.h"
#include "gated_problem.h"
#include "tests.h"

namespace {

using namespace rep_fast::tests;
using rep_fast::DType;
namespace cuda = rep_fast::cuda;
using cuda::Composition;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr Composition kAll[] = {Composition::kChain, Composition::kArgmax, Composition::kSum};

void test_tokens_are_adapted() {
    const Case cases[] = {
        {1, 1, {1}, {1}},
        {1, 40, {9}, {3}, DType::kBFloat16, DType::kBFloat16},
        {5, 37, {4, 5}, {33, 2}, DType::kFloat32, DType::kFloat32, 3},
        {17, 24, {8}, {2}, DType::kFloat16, DType::kBFloat16, 8},   // two tiles of tokens
        {2, 2059, {5}, {2}, DType::kBFloat16, DType::kFloat32, 5},  // a second round of columns, and a rest
        {1, 8, {300}, {1}},                                         // more tiles of hidden rows than a warp has lanes
        {2, 8, {140}, {2}},
        {100, 3, {2}, {1}},                                    // pieces of scratch longer than their alignment
        {3, 12, {5}, {2}, DType::kFloat32, DType::kBFloat16},  // 16-byte accesses to keys, but not to W1
    };
    unsigned seed = 1;
    for (const Case& shape : cases) {
        Problem problem(shape, ++seed);
        cuda_on_cpu::set_seed(seed);
        EXPECT(expect_reference(problem, run(problem, Composition::kChain), Composition::kChain) > 0);
    }
}

// Four adapters: some token moves more often than whole launches are made for.
void test_compositions() {
    const Case shape = {6, 16, {3, 8, 2, 5}, {2, 1, 3, 2}, DType::kBFloat16, DType::kFloat32};
    for (const Composition composition : kAll) {
        for (const bool with_products : {false, true}) {
            Problem problem(shape, 3);
            for (Adapter& adapter : problem.adapters) {
                adapter.threshold -= 1.0f;
            }
            const int most = expect_reference(problem, run(problem, composition, with_products), composition);
            EXPECT(most >= (composition == Composition::kArgmax ? 1 : 3));
        }
    }
}

// More tokens than a block's warps, more hidden rows than a warp's lanes.
void test_products_of_a_library() {
    const Case cases[] = {{11, 16, {40, 3}, {2, 2}, DType::kBFloat16, DType::kBFloat16},
                          {17, 8, {33}, {1}, DType::kFloat32, DType::kFloat32}};
    for (const Case& shape : cases) {
        Problem problem(shape, 7);
        EXPECT(expect_reference(problem, run(problem, Composition::kChain, true), Composition::kChain) > 0);
    }
}

// Of more tokens than a block has threads the last one alone moves a third time.
void test_late_moves_of_many_tokens() {
    constexpr std::int64_t kTokens = 257;
    for (const Composition composition : {Composition::kChain, Composition::kSum}) {
        Problem problem({kTokens, 1, {1, 1, 1}, {1, 1, 1}}, 2);
        problem.keys.set(kTokens - 1, 0, 8.0f);
        for (Adapter& adapter : problem.adapters) {
            adapter.w1.set(0, 0, 1.0f);
            adapter.b1.set(0, 0, 0.0f);
            adapter.w2.set(0, 0, 1.0f);
            adapter.b2.set(0, 0, 0.0f);
            adapter.a.set(0, 0, 0.5f);
            adapter.b.set(0, 0, 0.5f);
            adapter.threshold = 6.0f;
        }
        const Found found = run(problem, composition);
        EXPECT(expect_reference(problem, found, composition) == 3);
        EXPECT(std::ranges::count(found.opened, true) == 3);
    }
}

// What lies in scratch before a call means nothing: also not zeros, which name the first adapter.
void test_scratch_needs_no_values() {
    for (const Composition composition : kAll) {
        for (const bool with_products : {false, true}) {
            Problem problem({3, 12, {3, 4, 2}, {2, 1, 2}, DType::kBFloat16, DType::kFloat32}, 11);
            const Found found = run(problem, composition, with_products, 0);
            EXPECT(expect_reference(problem, found, composition) > 0);
        }
    }
}

// The third move, which one block makes, turns the decision of the last gate for a token at least. With seven tokens
// the last share of their logits is written by one warp and read by others, in an order that no later tile makes good;
// with a gate between that never opens, another lane than the one that decides reads the decision.
void test_late_moves_decide_again() {
    struct Late {
        std::int64_t n_tokens;
        std::vector<std::int64_t> hidden, rank;
    };
    const Late cases[] = {
        {9, {3, 8, 2, 5}, {2, 1, 3, 2}}, {7, {3, 8, 2, 5}, {2, 1, 3, 2}}, {7, {3, 8, 2, 1, 5}, {2, 1, 3, 1, 2}}};
    for (const Late& late : cases) {
        Problem problem({late.n_tokens, 16, late.hidden, late.rank}, 6);
        Adapter& last = problem.adapters.back();
        double widest = 0.0;  // between the last gate's logits before and after the third move
        for (std::int64_t token = 0; token < late.n_tokens; ++token) {
            Moving moving = problem.native(token);
            double before = 0.0;
            for (std::size_t i = 0; i < 3; ++i) {
                problem.adapters[i].threshold = -50.0f;
                before = problem.decide(last, moving).logit;
                const Moving source = moving;
                problem.move(problem.adapters[i], source, moving);
            }
            const double after = problem.decide(last, moving).logit;
            if (std::abs(after - before) > widest) {
                widest = std::abs(after - before);
                problem.adapters[3].threshold = 50.0f;
                last.threshold = static_cast<float>((before + after) / 2);
            }
        }
        for (std::uint64_t seed = 0; seed < 4; ++seed) {
            cuda_on_cpu::set_seed(seed);
            EXPECT(expect_reference(problem, run(problem, Composition::kChain), Composition::kChain) >= 3);
        }
    }
}

void test_shut_gates_leave_bits_alone() {
    Problem problem({3, 19, {6}, {2}, DType::kBFloat16, DType::kFloat32}, 8);
    const std::uint16_t odd[] = {0x7fc1, 0x8000, 0xffff, 0x7f81};
    std::memcpy(problem.keys.bytes.data() + 19 * 2, odd, sizeof(odd));  // NaNs with payloads in the second row
    for (const float threshold : {1e4f, kInfinity}) {
        problem.adapters[0].threshold = threshold;
        for (const Composition composition : kAll) {
            const Found found = run(problem, composition);
            EXPECT(std::memcmp(found.adapted.data(), problem.keys.bytes.data(), 3 * 19 * 2) == 0);
            EXPECT(!found.opened[0] && !found.opened[1] && !found.opened[2] && std::isnan(found.logits[1]));
        }
    }
    problem.adapters[0].threshold = -kInfinity;  // opens whatever the logit is
    const Found always = run(problem, Composition::kChain);
    EXPECT(always.opened[0] && always.opened[1] && always.opened[2]);
}

void test_bits_do_not_depend_on_the_order_of_blocks() {
    Problem problem({3, 40, {30, 9}, {2, 2}, DType::kFloat16, DType::kBFloat16}, 4);
    const Found first = run(problem, Composition::kChain);
    for (std::uint64_t seed = 0; seed < 3; ++seed) {
        cuda_on_cpu::set_seed(seed);
        const Found again = run(problem, Composition::kChain);
        EXPECT(std::memcmp(first.adapted.data(), again.adapted.data(), first.adapted.size()) == 0);
        EXPECT(first.logits == again.logits);
    }
}

std::string error_of(const cuda::GatedAdapterCall& call) {
    try {
        cuda::gated_adapter(call, nullptr);
    } catch (const rep_fast::Error& error) {
        return error.what();
    }
    return "";
}

void test_errors_name_what_is_wrong() {
    Problem problem({1, 4, {2}, {1}}, 1);
    Found found = room_for(problem);
    std::vector<cuda::AdapterOnDevice> adapters;
    cuda::GatedAdapterCall call = call_for(problem, Composition::kChain, adapters, found);
    call.key_dtype = DType::kFloat64;
    EXPECT(error_of(call).find("got float64") != std::string::npos);
    call.key_dtype = DType::kFloat32;
    call.weight_dtype = DType::kFloat16;
    EXPECT(error_of(call).find("got float16") != std::string::npos);
    call.weight_dtype = DType::kFloat32;
    adapters[0].rank = 0;
    EXPECT(error_of(call).find("needs hidden rows and a rank, got 2 and 0") != std::string::npos);
    adapters[0].rank = 1;
    adapters[0].n_hidden = 0;
    EXPECT(error_of(call).find("needs hidden rows and a rank, got 0 and 1") != std::string::npos);
    call.adapters = {};
    EXPECT(error_of(call).find("no adapter given") != std::string::npos);
}

}  // namespace

void test_gated_adapter() {
    test_tokens_are_adapted();
    test_compositions();
    test_products_of_a_library();
    test_late_moves_decide_again();
    test_late_moves_of_many_tokens();
    test_scratch_needs_no_values();
    test_shut_gates_leave_bits_alone();
    test_bits_do_not_depend_on_the_order_of_blocks();
    test_errors_name_what_is_wrong();
}
