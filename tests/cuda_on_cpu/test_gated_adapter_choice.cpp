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

// More than travel with a launch; only the first and one of the last open.
void test_many_adapters() {
    Problem problem({2, 8, std::vector<std::int64_t>(35, 1), std::vector<std::int64_t>(35, 1)}, 5);
    for (std::size_t i = 0; i < 35; ++i) {
        problem.adapters[i].threshold = i == 0 || i == 33 ? -50.0f : 50.0f;
    }
    EXPECT(expect_reference(problem, run(problem, Composition::kChain), Composition::kChain) == 2);
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
    test_ties();
}
