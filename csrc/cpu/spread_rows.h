// A sample of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace rep_fast {

// At most `count` row numbers, spread evenly over n.
inline std::vector<std::int64_t> spread_rows(std::int64_t n, std::int64_t count) {
    std::vector<std::int64_t> rows;
    count = std::min(n, count);
    for (std::int64_t i = 0; i < count; ++i) {
        rows.push_back(i * n / count);
    }
    return rows;
}

}  // namespace rep_fast
