// AVX-512 body of gated_adapter's products of bfloat16 keys with bfloat16 weights, neither of them widened.
//
// vdpbf16ps adds two exact products to a float32 lane, so a vector holds 32 elements of depth; everything else is the
// tile of dot_block.h. The instruction flushes subnormal operands and results to zero. Internal linkage only, no
// standard library: see core/dispatch.h.
#include <immintrin.h>

#include "cpu/gated_adapter.h"
#include "cpu/simd_avx512.h"

namespace rep_fast::avx512_bf16 {
namespace {

struct Pairs {
    using Vector = __m512;
    using Element = BFloat16;
    static constexpr int kElements = 32;
    static constexpr int kDotTokens = avx512::Simd::kDotTokens;
    static constexpr int kDotHidden = avx512::Simd::kDotHidden;

    [[gnu::always_inline]] static inline Vector zero() { return _mm512_setzero_ps(); }
    [[gnu::always_inline]] static inline Vector load(const BFloat16* from) { return _mm512_loadu_ps(from); }
    [[gnu::always_inline]] static inline Vector once(Vector value) { return avx512::Simd::once(value); }
    [[gnu::always_inline]] static inline void store(BFloat16* to, Vector value) { _mm512_storeu_ps(to, value); }
    [[gnu::always_inline]] static inline Vector multiply_add(Vector a, Vector b, Vector c) {
        return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    [[gnu::always_inline]] static inline void fold(const Vector (&sums)[kDotHidden], float* to, bool first) {
        avx512::Simd::fold(sums, to, first);
    }
};

void dots(const DotBlock<BFloat16, BFloat16>& block) {
    dot_block<Pairs>(block);
}

void copy(const BFloat16* from, std::int64_t n, BFloat16* to) {
    widen_row<Pairs>(from, n, to);
}

}  // namespace

constinit const Bf16Dots kBf16Dots = {.dots = dots, .copy = copy};

}  // namespace rep_fast::avx512_bf16
