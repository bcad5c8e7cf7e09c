// Rows in whole steps of eight bits, rounded by a random dither: what the scan's integer product multiplies. The proof
// of its bound is in cpu/dither.h, and the numbers here are that file's, bit for bit; steps alone are float32, which is
// half a unit of the two that A may be off by.
#pragma once

#include <cstdint>

#include "cuda/whitened_topk.h"

namespace rep_fast::cuda {

// Widths of quantised rows are padded with zeros to a multiple of this many bytes, which the library's products want.
inline constexpr std::int64_t kQuantisedMultiple = 16;

// size n: the dither of cpu/dither.h; `whose` is a DitherOf.
void draw_dither(std::uint64_t seed, std::uint64_t whose, std::int32_t* dither, std::int64_t n, void* stream);

struct QuantisedRows {
    std::int8_t* values = nullptr;  // [n_rows, padded width], contiguous, 8-byte aligned
    std::int64_t padded_width = 0;
    float* steps = nullptr;  // [n_rows]; 0 where a row has none, and then its values are not written
    // [n_rows]: constant · ‖step · values‖, rounded up; infinite for a finite row whose scaled entries are not, NaN for
    // a row that is not finite.
    float* margins = nullptr;
    std::int64_t* n_nonfinite = nullptr;      // [1] += rows that are not finite; nullptr: not counted
    std::int64_t* first_nonfinite = nullptr;  // [1] the lowest id among them
};

// columns: [padded width], aligned to 16 bytes, a column's scale, a power of two, as float32 whose last 16 bits hold
// its dither; zeros behind the width. first_id: of row 0.
void quantise_rows(const KeyChunk& rows, const std::int32_t* columns, double constant, std::int64_t first_id,
                   const QuantisedRows& found, void* stream);

}  // namespace rep_fast::cuda
