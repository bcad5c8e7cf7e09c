// Dot products of a block of keys with a block of weight rows, both row-major as they come.
//
// V is a Simd struct of internal linkage, so every instantiation has internal linkage too. Depth is taken in blocks of
// kDotBytes: lane i of a sum takes the products of its block in ascending order, the lanes are folded at the block's
// end, and the blocks' sums are added in order. The bits depend neither on how many tokens or rows are multiplied
// together, nor on which of the two ways below is taken:
// * few tokens: rows are read where they lie, kDotHidden streams of memory at once;
// * more: kDotHidden rows are widened to float32 once, into a strip that stays in the first-level cache (24 KB of it
//   beside 9 KB of keys), while all tokens pass and the next strip is fetched.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace rep_fast {

// Bytes of a key that one block of depth holds, as multiplied: 768 float32.
inline constexpr std::int64_t kDotBytes = 3072;
template <class K>
inline constexpr std::int64_t kDotDepth = kDotBytes / static_cast<std::int64_t>(sizeof(K));
// Up to this many tokens weights are read where they lie.
inline constexpr std::int64_t kDirectTokens = 3;
// Keys are padded with zeros to a multiple of this, and so are the columns of `products`.
inline constexpr std::int64_t kDotPadding = 32;
inline constexpr std::int64_t kMaxDotHidden = 8;

// products[t, h] (+)= Σ_k keys[t, k] · weights[h, k] over one block of depth. K: as multiplied; W: as stored.
template <class K, class W>
struct DotBlock {
    const K* keys;  // [n_tokens, depth padded with zeros to kDotPadding]
    std::int64_t key_stride;
    std::int64_t n_tokens;
    const W* weights;  // [n_hidden, depth]
    std::int64_t weight_stride;
    std::int64_t n_hidden;
    std::int64_t depth;  // at most kDotDepth<K>
    const W* ahead;      // the rows that will be asked for next, fetched meanwhile; null: none
    K* strip;            // scratch, kMaxDotHidden · kDotDepth<K>
    float* products;     // [n_tokens, n_hidden padded to kMaxDotHidden]
    std::int64_t product_stride;
    bool first;  // overwrite instead of adding
};

// The last n < kElements elements, zeros after them.
template <class V, class T>
[[gnu::always_inline]] inline typename V::Vector load_tail(const T* from, std::int64_t n) {
    T lanes[V::kElements] = {};
    for (std::int64_t i = 0; i < n; ++i) {
        lanes[i] = from[i];
    }
    return V::load(lanes);
}

// n elements in V's precision, and zeros up to a multiple of kDotPadding.
template <class V, class T>
[[gnu::always_inline]] inline void widen_row(const T* from, std::int64_t n, typename V::Element* to) {
    std::int64_t k = 0;
    for (; k + V::kElements <= n; k += V::kElements) {
        V::store(to + k, V::load(from + k));
    }
    if (k < n) {
        V::store(to + k, load_tail<V>(from + k, n - k));
        k += V::kElements;
    }
    for (; k % kDotPadding != 0; k += V::kElements) {
        V::store(to + k, V::zero());
    }
}

// One register tile. Every vector of depth also fetches one of each of kAhead rows, into the cache that kLocality says.
template <class V, int kTokens, int kAhead, int kLocality, class K, class W, class A>
[[gnu::always_inline]] inline void dot_tile(const K* keys, std::int64_t key_stride, const W* rows,
                                            std::int64_t row_stride, std::int64_t depth, const A* ahead,
                                            std::int64_t ahead_stride, float* products, std::int64_t product_stride,
                                            bool first) {
    typename V::Vector sums[kTokens][V::kDotHidden];
    for (int t = 0; t < kTokens; ++t) {
        for (int h = 0; h < V::kDotHidden; ++h) {
            sums[t][h] = V::zero();
        }
    }
    std::int64_t k = 0;
    for (; k + V::kElements <= depth; k += V::kElements) {
        typename V::Vector key[kTokens];
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
            key[t] = V::load(keys + t * key_stride + k);
        }
#pragma GCC unroll 8
        for (int h = 0; h < V::kDotHidden; ++h) {
            const typename V::Vector weight = V::once(V::load(rows + h * row_stride + k));
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t) {
                sums[t][h] = V::multiply_add(key[t], weight, sums[t][h]);
            }
        }
        for (int row = 0; row < kAhead; ++row) {
            __builtin_prefetch(ahead + row * ahead_stride + k, 0, kLocality);
        }
    }
    if (k < depth) {
        for (int h = 0; h < V::kDotHidden; ++h) {
            const typename V::Vector weight = load_tail<V>(rows + h * row_stride + k, depth - k);
            for (int t = 0; t < kTokens; ++t) {
                sums[t][h] = V::multiply_add(V::load(keys + t * key_stride + k), weight, sums[t][h]);
            }
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        V::fold(sums[t], products + t * product_stride, first);
    }
}

inline constexpr int kNear = 3;    // prefetch into the first-level cache
inline constexpr int kNearby = 2;  // into the second-level cache
// Bytes ahead at which rows are fetched while they are multiplied where they lie: 11 to 13 instead of 10 to 12 GB/s.
inline constexpr std::int64_t kFetchBytes = 1024;

// kDotHidden rows where they lie, up to kDirectTokens tokens.
template <class V, class K, class W>
[[gnu::always_inline]] inline void dot_rows(const DotBlock<K, W>& block, std::int64_t h0) {
    const W* const rows = block.weights + h0 * block.weight_stride;
    const W* const ahead = rows + kFetchBytes / static_cast<std::int64_t>(sizeof(W));
    float* const products = block.products + h0;
    std::int64_t t = 0;
    for (; t + V::kDotTokens <= block.n_tokens; t += V::kDotTokens) {
        dot_tile<V, V::kDotTokens, V::kDotHidden, kNear>(
            block.keys + t * block.key_stride, block.key_stride, rows, block.weight_stride, block.depth, ahead,
            block.weight_stride, products + t * block.product_stride, block.product_stride, block.first);
    }
    for (; t < block.n_tokens; ++t) {
        dot_tile<V, 1, V::kDotHidden, kNear>(block.keys + t * block.key_stride, block.key_stride, rows,
                                             block.weight_stride, block.depth, ahead, block.weight_stride,
                                             products + t * block.product_stride, block.product_stride, block.first);
    }
}

// Fetches a block of rows line by line, row by row.
template <class W>
struct RowsAhead {
    const W* row;  // null: nothing to fetch
    std::int64_t stride;
    std::int64_t lines_per_row;
    std::int64_t n_rows;
    std::int64_t line = 0;

    [[gnu::always_inline]] inline void fetch(std::int64_t n_lines) {
        constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(W));
        for (; n_lines > 0 && n_rows > 0; --n_lines) {
            __builtin_prefetch(row + line * kLine, 0, kNearby);
            if (++line == lines_per_row) {
                line = 0;
                row += stride;
                --n_rows;
            }
        }
    }
};

// The strip against all tokens. The next strip's rows are fetched meanwhile, at the pace of the tiles: requests that
// come faster than memory answers hold up the loads of keys. With few tiles every vector of depth fetches of kAhead
// rows, with many (kAhead 0) each begins with its share.
template <class V, int kAhead, class K, class W>
[[gnu::always_inline]] inline void dot_strip(const DotBlock<K, W>& block, std::int64_t h0, const W* ahead) {
    constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(W));
    const std::int64_t depth = (block.depth + V::kElements - 1) / V::kElements * V::kElements;
    RowsAhead<W> rows_ahead{.row = ahead,
                            .stride = block.weight_stride,
                            .lines_per_row = (block.depth + kLine - 1) / kLine,
                            .n_rows = ahead == nullptr ? 0 : V::kDotHidden};
    const std::int64_t share = rows_ahead.lines_per_row * V::kDotHidden * V::kDotTokens / block.n_tokens + 1;
    float* const products = block.products + h0;
    std::int64_t t = 0;
    for (std::int64_t row = 0; t + V::kDotTokens <= block.n_tokens; t += V::kDotTokens, row += kAhead) {
        const K* const keys = block.keys + t * block.key_stride;
        float* const out = products + t * block.product_stride;
        if (kAhead > 0 && row < rows_ahead.n_rows) {
            dot_tile<V, V::kDotTokens, kAhead, kNearby>(keys, block.key_stride, block.strip, kDotDepth<K>, depth,
                                                        ahead + row * block.weight_stride, block.weight_stride, out,
                                                        block.product_stride, block.first);
            continue;
        }
        if (kAhead == 0) {
            rows_ahead.fetch(share);
        }
        dot_tile<V, V::kDotTokens, 0, kNearby>(keys, block.key_stride, block.strip, kDotDepth<K>, depth, ahead, 0, out,
                                               block.product_stride, block.first);
    }
    for (; t < block.n_tokens; ++t) {
        dot_tile<V, 1, 0, kNearby>(block.keys + t * block.key_stride, block.key_stride, block.strip, kDotDepth<K>,
                                   depth, ahead, 0, products + t * block.product_stride, block.product_stride,
                                   block.first);
    }
}

template <class V, class K, class W>
[[gnu::always_inline]] inline void dot_block(const DotBlock<K, W>& block) {
    std::int64_t h = 0;
    if (block.n_tokens <= kDirectTokens) {
        for (; h + V::kDotHidden <= block.n_hidden; h += V::kDotHidden) {
            dot_rows<V>(block, h);
        }
    }
    for (; h < block.n_hidden; h += V::kDotHidden) {
        for (std::int64_t row = h; row < h + V::kDotHidden; ++row) {
            K* const to = block.strip + (row - h) * kDotDepth<K>;
            const std::int64_t n = row < block.n_hidden ? block.depth : 0;
            widen_row<V>(block.weights + row * block.weight_stride, n, to);
            if (n == 0) {
                for (std::int64_t k = 0; k < block.depth; k += V::kElements) {
                    V::store(to + k, V::zero());
                }
            }
        }
        const bool inside = h + 2 * V::kDotHidden <= block.n_hidden;
        const W* const ahead = inside ? block.weights + (h + V::kDotHidden) * block.weight_stride : block.ahead;
        if (block.n_tokens < 4 * V::kDotTokens) {
            dot_strip<V, V::kDotHidden / 2>(block, h, ahead);
        } else if (block.n_tokens < 16 * V::kDotTokens) {
            dot_strip<V, 2>(block, h, ahead);
        } else {
            dot_strip<V, 0>(block, h, ahead);
        }
    }
}

}  // namespace rep_fast
