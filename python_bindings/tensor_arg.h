// torch.Tensor → view. Bindings borrow the memory for the time of the call; nothing is copied.
//
// A binding takes py::object for each tensor, makes the views while it holds the interpreter lock, and releases the
// lock around the work:
//     m.def("op", [](py::object keys, py::object out, int level, int n_threads) {
//         const auto keys_view = TensorArg(keys, "keys").matrix<const float>();
//         const auto out_view = TensorArg(out, "out").vector<double>();
//         const py::gil_scoped_release unlocked;
//         op(keys_view, out_view, static_cast<CpuLevel>(level), n_threads);
//     });
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/error.h"
#include "core/matrix_view.h"

namespace rep_fast::python {

namespace py = pybind11;

// Where a kernel's tensors must lie.
enum class Place { kCpu, kCuda };

class TensorArg {
  public:
    // Reads shape, strides, dtype and address through torch's DLPack exchange table, or, where torch offers none,
    // through its Python attributes. Throws Error for a tensor that lies elsewhere or has a dtype not in DType.
    TensorArg(const py::object& tensor, std::string name, Place place = Place::kCpu);

    DType dtype() const { return dtype_; }
    // Number of the GPU; 0 on the CPU.
    int device() const { return device_; }
    std::int64_t size(std::size_t dimension) const { return shape_[dimension]; }

    // [rows, cols] with contiguous columns and any row stride.
    template <class T>
    MatrixView<T> matrix() const {
        check_dtype(dtype_of<T>);
        check_matrix();
        return {static_cast<T*>(data_), shape_[0], shape_[1], shape_[0] > 1 ? strides_[0] : shape_[1]};
    }

    // [n], contiguous.
    template <class T>
    std::span<T> vector() const {
        check_dtype(dtype_of<T>);
        check_vector();
        return {static_cast<T*>(data_), static_cast<std::size_t>(shape_[0])};
    }

  private:
    bool borrow_through_dlpack(const py::object& tensor, Place place);
    void borrow_through_attributes(const py::object& tensor, Place place);
    void check_dtype(DType wanted) const;
    void check_matrix() const;
    void check_vector() const;

    std::string name_;
    void* data_ = nullptr;
    int device_ = 0;
    DType dtype_ = DType::kFloat32;
    std::vector<std::int64_t> shape_;
    std::vector<std::int64_t> strides_;  // in elements
};

// None → empty span.
template <class T>
std::span<T> optional_vector(const py::object& tensor, const char* name) {
    return tensor.is_none() ? std::span<T>{} : TensorArg(tensor, name).vector<T>();
}

}  // namespace rep_fast::python
