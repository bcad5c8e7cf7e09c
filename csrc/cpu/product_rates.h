// How fast the products of whitened_topk are on this processor.
#pragma once

namespace rep_fast {

// Products per second of each kind, as this op's own kernels do them; 0 where there are none.
struct ProductRates {
    double float32 = 0.0;
    double bf16 = 0.0;
    double int8 = 0.0;
};

// Of the highest level of this processor, measured at the first call (some milliseconds). bfloat16 is twice as fast as
// float32 on some processors with AVX-512 BF16, half as fast on others.
ProductRates product_rates();

}  // namespace rep_fast
