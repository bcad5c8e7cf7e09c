// The library's one exception, and the one macro that throws it.
#pragma once

#include <sstream>
#include <stdexcept>

namespace rep_fast {

// A caller's mistake; the message carries the offending value and the remedy.
class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

}  // namespace rep_fast

// REP_FAST_CHECK(k >= 1, "k must be at least 1, got " << k): the message is built only when the check fails.
#define REP_FAST_CHECK(condition, message)                   \
    do {                                                     \
        if (!(condition)) {                                  \
            std::ostringstream rep_fast_message;             \
            rep_fast_message << message;                     \
            throw ::rep_fast::Error(rep_fast_message.str()); \
        }                                                    \
    } while (false)
