// Pairs waiting to be scored again, and the thresholds that rule them out.
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/candidates.h"
#include "cpu/running_hits.h"
#include "scan_checks.h"
#include "tests.h"

namespace rep_fast::tests {
namespace {

constexpr float kInfinite = std::numeric_limits<float>::infinity();

struct Visit {
    std::int64_t query, row, next;
    bool operator==(const Visit&) const = default;
};

// Queries 0 and 2 of three, bounds in no order, one unknown.
Candidates some_candidates() {
    Candidates candidates(3, 2);
    candidates.add(2, 10, 1.0f);
    candidates.add(0, 11, 5.0f);
    candidates.add(2, 12, std::numeric_limits<float>::quiet_NaN());
    candidates.add(0, 13, 7.0f);
    candidates.add(0, 14, -1.0f);
    candidates.add(2, 15, 3.0f);
    return candidates;
}

std::vector<Visit> visited(Candidates& candidates, std::int64_t n, float lowest = -kInfinite) {
    std::vector<Visit> found;
    candidates.visit_best(n, [&](const Candidates::Pair& pair, std::int64_t next) {
        if (pair.bound < lowest) {
            return false;
        }
        found.push_back({pair.query, pair.row, next});
        return true;
    });
    return found;
}

void test_best_bounds_come_first() {
    Candidates candidates = some_candidates();
    const std::int64_t room = candidates.room();
    EXPECT((visited(candidates, 2) == std::vector<Visit>{{0, 13, 11}, {0, 11, 14}, {2, 12, 15}, {2, 15, 10}}));
    EXPECT(candidates.room() == room + 4);
    EXPECT((visited(candidates, 2) == std::vector<Visit>{{0, 14, 14}, {2, 10, 10}}));
    EXPECT(candidates.room() == room + 6 && visited(candidates, 2).empty());
}

void test_what_is_refused_waits() {
    Candidates candidates = some_candidates();
    const std::int64_t room = candidates.room();
    EXPECT((visited(candidates, 9, 4.0f) == std::vector<Visit>{{0, 13, 11}, {0, 11, 14}, {2, 12, 15}}));
    EXPECT(candidates.room() == room + 3);
    std::int64_t n = 0;
    candidates.drain([&](const Candidates::Pair&, std::int64_t) { return ++n < 2; });
    EXPECT(n == 2 && candidates.room() == room + 6);  // the last of query 0, one of query 2, and nothing is left
}

void test_pairs_below_thresholds_are_dropped() {
    Candidates candidates = some_candidates();
    const std::int64_t room = candidates.room();
    const float thresholds[] = {5.0f, kInfinite, 1.5f};
    candidates.drop_below(thresholds);
    EXPECT(candidates.room() == room + 2);
    EXPECT((visited(candidates, 9) == std::vector<Visit>{{0, 13, 11}, {0, 11, 11}, {2, 12, 15}, {2, 15, 15}}));
}

// Thresholds rise by hits or by lower bounds of pairs that wait, whichever says more.
void test_expected_scores_raise_thresholds() {
    State state(2, 2);
    state.scores[0] = 9.0;
    state.scores[1] = 4.0;
    state.ids[0] = 1;
    state.ids[1] = 2;
    RunningHits hits(state.view, kPanelQueries);
    EXPECT(hits.thresholds()[0] == 4.0f && hits.thresholds()[1] == -kInfinite && hits.thresholds()[2] == kInfinite);
    hits.expect(0, 3.0f);
    EXPECT(hits.thresholds()[0] == 4.0f);
    hits.expect(0, 5.0f);
    EXPECT(hits.thresholds()[0] == 5.0f);  // 9, 5
    hits.expect(0, 20.0f);
    EXPECT(hits.thresholds()[0] == 9.0f);
    hits.expect(1, -2.0f);
    EXPECT(hits.thresholds()[1] == -kInfinite);
    hits.expect(1, -3.0f);
    EXPECT(hits.thresholds()[1] == -3.0f);
    hits.take(1, {.score = -1.0, .id = 5});
    EXPECT(hits.thresholds()[1] == -3.0f);
    hits.take(1, {.score = -1.5, .id = 6});
    EXPECT(hits.thresholds()[1] == -1.5f);
}

}  // namespace

void test_candidates() {
    test_best_bounds_come_first();
    test_what_is_refused_waits();
    test_pairs_below_thresholds_are_dropped();
    test_expected_scores_raise_thresholds();
}

}  // namespace rep_fast::tests
