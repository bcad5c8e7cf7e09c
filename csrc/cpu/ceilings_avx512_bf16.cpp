// Products of bfloat16 pairs and of int8 quadruples, summed in 16 lanes. Internal linkage only, no standard library:
// see core/dispatch.h.
#include <immintrin.h>

#include "cpu/ceilings.h"

namespace rep_fast::avx512_bf16 {
namespace {

// The operands come from memory so that the compiler cannot fold the products.
float run_bf16(std::int64_t rounds) {
    __m512 sums[kCeilingSums];
    for (int i = 0; i < kCeilingSums; ++i) {
        sums[i] = _mm512_set1_ps(static_cast<float>(i));
    }
    __m512i a = _mm512_set1_epi32(0x3f803f80);
    __m512i b = _mm512_set1_epi32(0x3a803a80);
    __asm__ volatile("" : "+v"(a), "+v"(b));
    for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int i = 0; i < kCeilingSums; ++i) {
            sums[i] = _mm512_dpbf16_ps(sums[i], reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
        }
    }
    __m512 total = sums[0];
    for (int i = 1; i < kCeilingSums; ++i) {
        total = _mm512_add_ps(total, sums[i]);
    }
    return _mm512_cvtss_f32(total);
}

float run_int8(std::int64_t rounds) {
    __m512i sums[kCeilingSums];
    for (int i = 0; i < kCeilingSums; ++i) {
        sums[i] = _mm512_set1_epi32(i);
    }
    __m512i a = _mm512_set1_epi32(0x01020304);
    __m512i b = _mm512_set1_epi32(0x0201ff02);
    __asm__ volatile("" : "+v"(a), "+v"(b));
    for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int i = 0; i < kCeilingSums; ++i) {
            sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
        }
    }
    __m512i total = sums[0];
    for (int i = 1; i < kCeilingSums; ++i) {
        total = _mm512_add_epi32(total, sums[i]);
    }
    alignas(64) std::int32_t lanes[16];
    _mm512_store_si512(lanes, total);
    return static_cast<float>(lanes[0]);
}

}  // namespace

constinit const CeilingLoop kBf16Ceiling = {run_bf16, kCeilingSums * 32 * 2};
constinit const CeilingLoop kInt8Ceiling = {run_int8, kCeilingSums * 64 * 2};

}  // namespace rep_fast::avx512_bf16
