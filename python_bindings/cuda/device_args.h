// torch.Tensor → pointers on a GPU. The tensors of one call lie on one device, which is made the thread's for its time;
// the stream is torch's current one, as an integer.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>

#include "core/gradual_underflow.h"
#include "cuda/device.h"
#include "tensor_arg.h"

namespace rep_fast::python {

#ifdef REP_FAST_CUDA_ON_CPU
inline constexpr Place kKernelPlace = Place::kCpu;  // the tests' executor takes the CPU's memory
#else
inline constexpr Place kKernelPlace = Place::kCuda;
#endif

// Rows of keys or weights, whose dtype the kernel looks up: element (t, i) is data[t * row_stride + i].
struct RowsArg {
    const void* data = nullptr;
    DType dtype = DType::kFloat32;
    std::int64_t rows = 0;
    std::int64_t cols = 0;
    std::int64_t row_stride = 0;
};

class DeviceArgs {
  public:
    // Throws Error for a tensor that is on no GPU or on another one than those before.
    TensorArg take(const py::object& tensor, const char* name) {
        TensorArg argument(tensor, name, kKernelPlace);
        REP_FAST_CHECK(!device_ || *device_ == argument.device(),
                       name << " lies on GPU " << argument.device() << ", the tensors before it on " << *device_);
        device_ = argument.device();
        return argument;
    }

    // float32, bfloat16 or float16.
    RowsArg rows(const py::object& tensor, const char* name) {
        const TensorArg argument = take(tensor, name);
        switch (argument.dtype()) {
            case DType::kFloat32:
                return rows_of<float>(argument);
            case DType::kBFloat16:
                return rows_of<BFloat16>(argument);
            case DType::kFloat16:
                return rows_of<Float16>(argument);
            default:
                throw Error(std::string(name) + " must be float32, bfloat16 or float16, got " +
                            dtype_name(argument.dtype()));
        }
    }

    template <class T>
    T* vector(const py::object& tensor, const char* name) {
        return take(tensor, name).template vector<T>().data();
    }

    // None → nullptr.
    template <class T>
    T* optional_vector(const py::object& tensor, const char* name) {
        return tensor.is_none() ? nullptr : vector<T>(tensor, name);
    }

    int device() const { return device_.value_or(0); }

  private:
    template <class T>
    static RowsArg rows_of(const TensorArg& argument) {
        const auto view = argument.matrix<const T>();
        return {view.data, argument.dtype(), view.rows, view.cols, view.row_stride};
    }

    std::optional<int> device_;
};

inline void* stream_arg(std::uintptr_t stream) {
    return reinterpret_cast<void*>(stream);
}

// What stands around a launch: no interpreter lock, the tensors' device, and for the executor the numbers of a device,
// which knows no flushing of subnormals.
class Launching {
  public:
    explicit Launching(const DeviceArgs& args) : device_(args.device()) {}

  private:
    py::gil_scoped_release unlocked_;
    cuda::DeviceGuard device_;
#ifdef REP_FAST_CUDA_ON_CPU
    GradualUnderflow numbers_;
#endif
};

}  // namespace rep_fast::python
