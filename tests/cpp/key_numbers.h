// Numbers of any type that keys may have.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <random>
#include <type_traits>
#include <vector>

#include "core/dtype.h"

namespace rep_fast::tests {

// float32 as it is, bfloat16 cut off, float16 with its exponent kept in range.
template <class T>
T as_key(float value) {
    if constexpr (std::is_same_v<T, float>) {
        return value;
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        return {static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16)};
    } else {  // 2⁻¹⁴ to 2¹⁵ by the bits
        const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
        const auto exponent = std::clamp(static_cast<int>(bits >> 23 & 0xffu) - 112, 1, 30);
        return {static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | static_cast<unsigned>(exponent) << 10 |
                                           (bits >> 13 & 0x3ffu))};
    }
}

// Of deviation `size` (float16: around 1 whatever it is). Exactly as long as it must be, so that the address sanitizer
// sees every read beyond.
template <class T>
std::vector<T> random_numbers(std::int64_t count, std::mt19937& generator, float size = 1.0f) {
    std::vector<T> numbers(static_cast<std::size_t>(count));
    std::normal_distribution<float> normal(0.0f, size);
    for (T& number : numbers) {
        const float value = normal(generator);
        if constexpr (std::is_same_v<T, float>) {
            number = value;
        } else if constexpr (std::is_same_v<T, BFloat16>) {
            number.bits = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
        } else {  // sign, an exponent around 2⁰, random fraction
            number.bits = static_cast<std::uint16_t>((generator() & 0x83ffu) | (13u + generator() % 4u) << 10);
        }
    }
    return numbers;
}

}  // namespace rep_fast::tests
