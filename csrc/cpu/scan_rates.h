// How fast the parts of whitened_topk are on this processor.
#pragma once

namespace rep_fast {

// As this op's own kernels do them; 0 where there are none.
struct ScanRates {
    double float32 = 0.0;   // products: multiplications and additions per second
    double bf16 = 0.0;      // likewise
    double int8 = 0.0;      // likewise
    double widen = 0.0;     // elements of keys per second, made ready for the float32 pass
    double quantise = 0.0;  // the same for the int8 pass
    double exact = 0.0;     // elements per second of pairs scored in float64
};

// Of the highest level of this processor, measured at the first call (some milliseconds). bfloat16 is twice as fast as
// float32 on some processors with AVX-512 BF16, half as fast on others.
ScanRates scan_rates();

}  // namespace rep_fast
