// Rounding to the 16-bit floats, against every number of theirs.
#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/number.cuh"
#include "guarded.h"
#include "tests.h"

namespace {

using rep_fast::BFloat16;
using rep_fast::Float16;
using rep_fast::cuda::narrowed;
using rep_fast::cuda::widened;

// Every finite number rounds to itself; between it and the next one the nearer is taken, halfway the even one.
template <class T>
void test_rounding(std::uint16_t infinity) {
    for (std::uint16_t bits = 0; bits < infinity; ++bits) {
        const T lower{bits}, upper{static_cast<std::uint16_t>(bits + 1)};
        const float low = widened(lower);
        // the step to infinity is as long as the one before
        const float step =
            upper.bits == infinity ? low - widened(T{static_cast<std::uint16_t>(bits - 1)}) : widened(upper) - low;
        const float middle = low + step / 2;
        for (const float sign : {1.0f, -1.0f}) {
            const auto sign_bit = static_cast<std::uint16_t>(sign < 0 ? 0x8000u : 0u);
            EXPECT(narrowed<T>(sign * low).bits == (lower.bits | sign_bit));
            EXPECT(narrowed<T>(sign * middle).bits == ((bits % 2 == 0 ? lower : upper).bits | sign_bit));
            const float below = std::nextafter(middle, 0.0f), above = std::nextafter(middle, 2 * middle);
            EXPECT(narrowed<T>(sign * below).bits == (lower.bits | sign_bit));
            EXPECT(narrowed<T>(sign * above).bits == (upper.bits | sign_bit));
        }
    }
    const float infinite = std::numeric_limits<float>::infinity();
    EXPECT(narrowed<T>(infinite).bits == infinity && narrowed<T>(-infinite).bits == (infinity | 0x8000u));
    for (const std::uint32_t nan : {0x7f800001u, 0xffffffffu, 0x7fc00000u}) {
        EXPECT(std::isnan(widened(narrowed<T>(__builtin_bit_cast(float, nan)))));
    }
}

}  // namespace

void test_number() {
    test_rounding<Float16>(0x7c00);
    test_rounding<BFloat16>(0x7f80);
}
