// Subnormal numbers kept for as long as an object lives, on the thread that made it.
#pragma once

#include <xmmintrin.h>

namespace rep_fast {

// Turns flush-to-zero and denormals-are-zero off: torch.set_flush_denormal would change scores and void the error
// bounds. The caller's setting is restored; a new thread inherits its creator's.
class GradualUnderflow {
  public:
    GradualUnderflow() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~kFlushBits); }
    ~GradualUnderflow() { _mm_setcsr((_mm_getcsr() & ~kFlushBits) | (saved_ & kFlushBits)); }
    GradualUnderflow(const GradualUnderflow&) = delete;
    GradualUnderflow& operator=(const GradualUnderflow&) = delete;

  private:
    static constexpr unsigned kFlushBits = 0x8040u;  // FTZ and DAZ of MXCSR
    unsigned saved_;
};

}  // namespace rep_fast
