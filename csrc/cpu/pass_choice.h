// Which pass of whitened_topk rules pairs out at the least cost, decided before the scan from its error bound.
#pragma once

#include "cpu/whitened_topk.h"

namespace rep_fast {

// How many times as many products of bfloat16 as of float32 this processor does in a second, measured at the first call
// (some milliseconds): 2 on some with AVX-512 BF16, ½ on others, where the float32 pass serves better.
double bf16_gain();

// The fastest pass whose margin is small beside the spread of the scores, so that little more survives than must: on a
// sample of pairs, the median over queries of margin / standard deviation is at most one half. A pass of bfloat16 is
// looked at only where `gain` says that it leads clearly. Every pass gives the same result, so gain and sample decide
// speed alone.
//
// gain: called where the answer depends on it, so that nothing is measured for keys or a precision that leave no
// choice.
ScanPass choose_pass(const ScanInput& input, const WhitenedTopkKernels& kernels, double (*gain)() = bf16_gain);

}  // namespace rep_fast
