// Which pass of whitened_topk rules pairs out at the least cost, decided before the scan from its error bound.
#pragma once

#include "cpu/scan_rates.h"
#include "cpu/whitened_topk.h"
#include "cpu/whitened_topk_kernels.h"

namespace rep_fast {

struct PassChoice {
    ScanPass first = ScanPass::kFloat32;
    ScanPass second = ScanPass::kFloat32;  // what the int8 pass gives way to when too much survives after all
    PassReason reason = PassReason::kOnlyOne;
    // Of the pairs, beyond the k hits that every pass scores again: where more survive int8, the second is faster.
    double largest_survivor_share = 0.0;
    double n_keys_before = 0.0;  // about as many keys are behind the state
};

// About how many of n keys in random order are among the best k when they come: Σ min(1, k/i). With narrow margins only
// k of them are scored in float64, since they wait; what the int8 pass scores grows like their number.
double expected_entries(double n_keys, double k);

// Whether a pass can run on these keys with these kernels.
bool has_pass(const WhitenedTopkKernels& kernels, ScanPass pass, const KeyMatrix& keys);

// The pass that costs least by the measured rates, with what its margin lets through on a sample of pairs. int8: the
// survivors' share, against thresholds from the state or else from a normal distribution of scores, is not above
// largest_survivor_share. bfloat16: the median over queries of margin / standard deviation is at most one half. Every
// pass gives the same result, so rates and sample decide speed alone.
//
// rates: called where the answer depends on it, so that nothing is measured for keys or a pass that leave no choice.
PassChoice choose_pass(const ScanInput& input, const ScanState& state, const WhitenedTopkKernels& kernels,
                       ScanRates (*rates)() = scan_rates);

}  // namespace rep_fast
