// Which pass of whitened_topk rules pairs out at the least cost, decided before the scan from its error bound.
#pragma once

#include "cpu/product_rates.h"
#include "cpu/query_packings.h"
#include "cpu/whitened_topk.h"
#include "cpu/whitened_topk_kernels.h"

namespace rep_fast {

// A pass that lets more than this share of the pairs through is not worth its speed.
inline constexpr double kLargestSurvivorShare = 0.02;

struct PassChoice {
    ScanPass first = ScanPass::kFloat32;
    ScanPass second = ScanPass::kFloat32;  // what the int8 pass gives way to when too much survives after all
};

// Whether a pass can run on these keys with these kernels.
bool has_pass(const WhitenedTopkKernels& kernels, ScanPass pass, const KeyMatrix& keys);

// The fastest pass whose margin lets little more survive than must, by a sample of pairs. int8: at most
// kLargestSurvivorShare of them reach the k-th best, taken from the state or else from a normal distribution of scores.
// bfloat16: the median over queries of margin / standard deviation is at most one half. Either is looked at only where
// `rates` says that it leads clearly. Every pass gives the same result, so rates and sample decide speed alone.
//
// rates: called where the answer depends on it, so that nothing is measured for keys or a pass that leave no choice.
PassChoice choose_pass(const ScanInput& input, const ScanState& state, const WhitenedTopkKernels& kernels,
                       QueryPackings& packings, ProductRates (*rates)() = product_rates);

}  // namespace rep_fast
