// Products of bfloat16 pairs and of int8 quadruples, summed in 16 lanes. Internal linkage only, no standard library:
// see core/dispatch.h.
#include <immintrin.h>

#include "cpu/ceiling_loop.h"

namespace rep_fast::avx512_bf16 {
namespace {

// The same in every lane, and unknown to the compiler, so that it cannot fold the products.
[[gnu::always_inline]] inline __m512i hidden(int bits) {
    __m512i lanes = _mm512_set1_epi32(bits);
    __asm__ volatile("" : "+v"(lanes));
    return lanes;
}

struct Bf16Pairs {
    using Sum = __m512;

    [[gnu::always_inline]] static inline Sum start(int i) { return _mm512_set1_ps(static_cast<float>(i)); }
    [[gnu::always_inline]] inline Sum operator()(Sum sum) const {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    [[gnu::always_inline]] static inline Sum add(Sum x, Sum y) { return _mm512_add_ps(x, y); }
    [[gnu::always_inline]] static inline float first(Sum sum) { return _mm512_cvtss_f32(sum); }

    __m512i a = hidden(0x3f803f80);
    __m512i b = hidden(0x3a803a80);
};

struct Int8Quads {
    using Sum = __m512i;

    [[gnu::always_inline]] static inline Sum start(int i) { return _mm512_set1_epi32(i); }
    [[gnu::always_inline]] inline Sum operator()(Sum sum) const { return _mm512_dpbusd_epi32(sum, a, b); }
    [[gnu::always_inline]] static inline Sum add(Sum x, Sum y) { return _mm512_add_epi32(x, y); }
    [[gnu::always_inline]] static inline float first(Sum sum) {
        alignas(64) std::int32_t lanes[16];
        _mm512_store_si512(lanes, sum);
        return static_cast<float>(lanes[0]);
    }

    __m512i a = hidden(0x01020304);
    __m512i b = hidden(0x0201ff02);
};

}  // namespace

constinit const CeilingLoop kBf16Ceiling = {run_ceiling<Bf16Pairs>, kCeilingSums * 32 * 2};
constinit const CeilingLoop kInt8Ceiling = {run_ceiling<Int8Quads>, kCeilingSums * 64 * 2};

}  // namespace rep_fast::avx512_bf16
