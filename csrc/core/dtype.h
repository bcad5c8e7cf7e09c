// Element types a tensor may have at the border, and the two 16-bit floats as storage.
#pragma once

#include <cstdint>
#include <type_traits>

namespace rep_fast {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16, kInt64, kInt32, kInt8, kBool };

// Storage only: kernels convert on load and never compute in 16 bits.
struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

constexpr const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::kFloat32:
            return "float32";
        case DType::kFloat64:
            return "float64";
        case DType::kBFloat16:
            return "bfloat16";
        case DType::kFloat16:
            return "float16";
        case DType::kInt64:
            return "int64";
        case DType::kInt32:
            return "int32";
        case DType::kInt8:
            return "int8";
        case DType::kBool:
            return "bool";
    }
    return "unknown";
}

// dtype_of<T>: the DType of an element type, const or not.
template <class T>
inline constexpr DType dtype_of = dtype_of<std::remove_const_t<T>>;
template <>
inline constexpr DType dtype_of<float> = DType::kFloat32;
template <>
inline constexpr DType dtype_of<double> = DType::kFloat64;
template <>
inline constexpr DType dtype_of<BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType dtype_of<Float16> = DType::kFloat16;
template <>
inline constexpr DType dtype_of<std::int64_t> = DType::kInt64;
template <>
inline constexpr DType dtype_of<std::int32_t> = DType::kInt32;
template <>
inline constexpr DType dtype_of<std::int8_t> = DType::kInt8;
template <>
inline constexpr DType dtype_of<bool> = DType::kBool;

// Exact widening. always_inline, and the builtin in place of std::bit_cast: a copy compiled for a wider instruction set
// must never be the one the linker keeps.
[[gnu::always_inline]] inline float to_float(float value) {
    return value;
}
[[gnu::always_inline]] inline float to_float(BFloat16 value) {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(value.bits) << 16);
}
[[gnu::always_inline]] inline float to_float(Float16 value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // infinity and NaN keep their payload
        return __builtin_bit_cast(float, sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    }
    if (magnitude < 0x400u) {  // zero and subnormals: magnitude · 2⁻²⁴ is exact in float
        return __builtin_bit_cast(float,
                                  sign | __builtin_bit_cast(std::uint32_t, static_cast<float>(magnitude) * 0x1p-24f));
    }
    return __builtin_bit_cast(float, sign | ((magnitude << 13) + 0x38000000u));
}

}  // namespace rep_fast
