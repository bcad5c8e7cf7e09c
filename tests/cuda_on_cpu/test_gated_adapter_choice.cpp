// Whose turn it is with a token: many adapters, the largest logit, ties.
#include <cstdint>
#include <cstring>
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
    second.threshold = first.threshold;
    for (const auto part : {&Adapter::a, &Adapter::b, &Adapter::w1, &Adapter::b1, &Adapter::w2, &Adapter::b2}) {
        std::memcpy((second.*part).bytes.data(), (first.*part).bytes.data(), (first.*part).bytes.size());
    }
    const Found both = run(problem, Composition::kArgmax);
    EXPECT(both.logits[0] == both.logits[1] && both.opened[0] && !both.opened[1]);
    first.threshold = second.threshold = both.logits[0];
    const Found none = run(problem, Composition::kArgmax);
    EXPECT(!none.opened[0] && !none.opened[1]);
}

}  // namespace

void test_gated_adapter_choice() {
    test_many_adapters();
    test_the_largest_of_many();
    test_ties();
}
