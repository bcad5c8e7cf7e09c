// What the executor says of a kernel that does something wrong.
#pragma once

#include <functional>
#include <string>

#include "executor.h"

// The sentence, empty where there was none.
inline std::string error_of(const std::function<void()>& work) {
    try {
        work();
    } catch (const cuda_on_cpu::ExecutionError& error) {
        return error.what();
    }
    return "";
}

inline bool holds(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}
