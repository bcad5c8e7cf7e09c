// AVX-512 bfloat16 body of accumulate_moment: pairs of tokens by vdpbf16ps, whose products are exact and whose
// additions round to float32 and flush subnormal operands and results. Internal linkage only, no standard library: see
// core/dispatch.h.
#include <immintrin.h>

#include "cpu/accumulate_moment.h"
#include "cpu/panel_product.h"

namespace rep_fast::avx512_bf16 {
namespace {

struct Pairs {
    using Element = std::uint32_t;
    using Factor = __m512i;
    using Vector = __m512;
    static constexpr int kLanes = 16;
    static constexpr int kPanelRows = 8;
    static constexpr int kPanelVectors = 3;

    [[gnu::always_inline]] static inline Vector zero() { return _mm512_setzero_ps(); }
    [[gnu::always_inline]] static inline Factor load(const std::uint32_t* from) { return _mm512_loadu_si512(from); }
    [[gnu::always_inline]] static inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
    [[gnu::always_inline]] static inline Factor broadcast(const std::uint32_t* from) {
        return _mm512_set1_epi32(static_cast<int>(*from));
    }
    [[gnu::always_inline]] static inline void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
    [[gnu::always_inline]] static inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
    [[gnu::always_inline]] static inline Vector multiply_add(Factor a, Factor b, Vector c) {
        return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
};

void product(const std::uint32_t* a, const std::uint32_t* b, std::int64_t n_pairs, float* tile, bool first) {
    panel_product<Pairs>(a, b, n_pairs, tile, first);
}

}  // namespace

constinit const MomentPairProduct kMomentPairProduct = product;

}  // namespace rep_fast::avx512_bf16
