// Whose turn it is with a token: many adapters, the largest logit, ties.
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "cuda/gated_adapter.h"
#include "executor.h"
#include "gated_problem.h"
#include "tests.h"

namespace {

using namespace rep_fast::tests;
namespace cuda = rep_fast::cuda;
using cuda::Composition;

// As many as travel with a launch, more, and more than two tables hold; only the first and one of the last open.
void test_many_adapters() {
    for (const std::size_t n : {32u, 33u, 35u, 70u}) {
        Problem problem({2, 8, std::vector<std::int64_t>(n, 1), std::vector<std::int64_t>(n, 1)}, 5);
        for (std::size_t i = 0; i < n; ++i) {
            problem.adapters[i].threshold = i == 0 || i == n - 2 ? -50.0f : 50.0f;
        }
        EXPECT(expect_reference(problem, run(problem, Composition::kChain), Composition::kChain) == 2);
    }
}

// All are open. The largest logit is one a lane meets second, or is shared by the two that one lane meets, or by two of
// which the earlier is met by a later lane.
void test_the_largest_of_many() {
    const std::vector<std::size_t> cases[] = {{33}, {1, 33}, {5, 32}, {3, 34}};
    for (const std::vector<std::size_t>& largest : cases) {
        Problem problem({2, 8, std::vector<std::int64_t>(35, 1), std::vector<std::int64_t>(35, 1)}, 5);
        for (Adapter& adapter : problem.adapters) {
            adapter.threshold = -50.0f;
        }
        for (const std::size_t i : largest) {
            problem.adapters[i].w2.set(0, 0, 0.0f);
            problem.adapters[i].b2.set(0, 0, 30.0f);
        }
        const Found found = run(problem, Composition::kArgmax);
        EXPECT(expect_reference(problem, found, Composition::kArgmax) == 1 && found.opened[largest[0] * 2]);
    }
}

// A logit that equals its threshold is shut; equal logits: the first adapter acts.
void test_ties() {
    Problem problem({1, 8, {4, 4}, {2, 2}}, 9);
    Adapter &first = problem.adapters[0], &second = problem.adapters[1];
    for (const auto part : {&Adapter::a, &Adapter::b, &Adapter::w1, &Adapter::b1, &Adapter::w2, &Adapter::b2}) {
        std::memcpy((second.*part).bytes.data(), (first.*part).bytes.data(), (first.*part).bytes.size());
        (second.*part).values = (first.*part).values;
    }
    const float threshold = first.threshold;
    for (const bool with_products : {false, true}) {
        first.threshold = second.threshold = threshold;
        const Found both = run(problem, Composition::kArgmax, with_products);
        EXPECT(both.logits[0] == both.logits[1] && both.opened[0] && !both.opened[1]);
        first.threshold = second.threshold = both.logits[0];
        const Found none = run(problem, Composition::kArgmax, with_products);
        EXPECT(!none.opened[0] && !none.opened[1]);
    }
}

// Gates without a threshold open on any logit. One of them acts, the first whose logit is NaN, if there is one.
void test_logits_that_are_not_finite() {
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
    const struct {
        std::size_t first;  // from here on the logits have this value
        float value;
    } cases[] = {{0, kNaN}, {2, kNaN}, {0, -kInfinity}};
    for (const auto& one : cases) {
        Problem problem({2, 8, {3, 2, 4, 1}, {2, 1, 1, 1}}, 12);
        for (std::size_t i = 0; i < problem.n_adapters(); ++i) {
            problem.adapters[i].threshold = -kInfinity;
            if (i >= one.first) {
                problem.adapters[i].b2.set(0, 0, one.value);
            }
        }
        const Found found = run(problem, Composition::kArgmax);
        for (std::size_t place = 0; place < found.opened.size(); ++place) {
            EXPECT(found.opened[place] == (place / 2 == one.first));
        }
    }
}

}  // namespace

void test_gated_adapter_choice() {
    test_many_adapters();
    test_the_largest_of_many();
    test_ties();
    test_logits_that_are_not_finite();
}
