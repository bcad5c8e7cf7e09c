#include "tensor_arg.h"

#include <algorithm>
#include <array>
#include <utility>

#include "core/dlpack.h"

namespace rep_fast::python {
namespace {

struct DLPackDType {
    std::uint8_t code;
    std::uint8_t bits;
    DType dtype;
};
constexpr std::array<DLPackDType, 8> kDLPackDTypes = {{{dlpack::kDLFloat, 32, DType::kFloat32},
                                                       {dlpack::kDLFloat, 64, DType::kFloat64},
                                                       {dlpack::kDLBfloat, 16, DType::kBFloat16},
                                                       {dlpack::kDLFloat, 16, DType::kFloat16},
                                                       {dlpack::kDLInt, 64, DType::kInt64},
                                                       {dlpack::kDLInt, 32, DType::kInt32},
                                                       {dlpack::kDLInt, 8, DType::kInt8},
                                                       {dlpack::kDLBool, 8, DType::kBool}}};

const char* place_name(Place place) {
    return place == Place::kCpu ? "CPU" : "CUDA";
}

// The table torch publishes on the tensor's type, or null (torch older than the table, another major version).
const dlpack::DLPackExchangeAPI* exchange_table(const py::object& tensor) {
    const py::object type = py::type::of(tensor);
    if (!py::hasattr(type, "__dlpack_c_exchange_api__")) {
        return nullptr;
    }
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    const auto* api =
        static_cast<const dlpack::DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) {
        PyErr_Clear();
        return nullptr;
    }
    return api->header.version.major == 1 && api->dltensor_from_py_object_no_sync != nullptr ? api : nullptr;
}

std::vector<std::int64_t> row_major_strides(const std::vector<std::int64_t>& shape) {
    std::vector<std::int64_t> strides(shape.size(), 1);
    for (std::size_t i = shape.size(); i-- > 1;) {
        strides[i - 1] = strides[i] * shape[i];
    }
    return strides;
}

}  // namespace

TensorArg::TensorArg(const py::object& tensor, std::string name, Place place) : name_(std::move(name)) {
    if (!borrow_through_dlpack(tensor, place)) {
        borrow_through_attributes(tensor, place);
    }
}

bool TensorArg::borrow_through_dlpack(const py::object& tensor, Place place) {
    const auto* api = exchange_table(tensor);
    if (api == nullptr) {
        return false;
    }
    dlpack::DLTensor borrowed{};
    if (api->dltensor_from_py_object_no_sync(tensor.ptr(), &borrowed) != 0) {
        throw py::error_already_set();
    }
    const bool is_on_cpu = borrowed.device.device_type == dlpack::kDLCPU;
    REP_FAST_CHECK(is_on_cpu == (place == Place::kCpu) && (is_on_cpu || borrowed.device.device_type == dlpack::kDLCUDA),
                   name_ << " lies on device type " << borrowed.device.device_type << "; pass a " << place_name(place)
                         << " tensor");
    device_ = borrowed.device.device_id;
    const auto known =
        std::find_if(kDLPackDTypes.begin(), kDLPackDTypes.end(), [&borrowed](const DLPackDType& candidate) {
            return candidate.code == borrowed.dtype.code && candidate.bits == borrowed.dtype.bits;
        });
    REP_FAST_CHECK(known != kDLPackDTypes.end() && borrowed.dtype.lanes == 1,
                   name_ << " has a dtype (DLPack code " << int{borrowed.dtype.code} << ", " << int{borrowed.dtype.bits}
                         << " bits) no kernel takes");
    dtype_ = known->dtype;
    data_ = static_cast<std::byte*>(borrowed.data) + borrowed.byte_offset;
    shape_.assign(borrowed.shape, borrowed.shape + borrowed.ndim);
    strides_ = borrowed.strides == nullptr
                   ? row_major_strides(shape_)
                   : std::vector<std::int64_t>(borrowed.strides, borrowed.strides + borrowed.ndim);
    return true;
}

void TensorArg::borrow_through_attributes(const py::object& tensor, Place place) {
    const auto device = tensor.attr("device").attr("type").cast<std::string>();
    REP_FAST_CHECK(device == (place == Place::kCpu ? "cpu" : "cuda"),
                   name_ << " lies on " << device << "; pass a " << place_name(place) << " tensor");
    device_ = place == Place::kCpu ? 0 : tensor.attr("device").attr("index").cast<int>();
    const auto dtype = py::str(tensor.attr("dtype")).cast<std::string>();
    const auto known = std::find_if(kDLPackDTypes.begin(), kDLPackDTypes.end(), [&dtype](const DLPackDType& candidate) {
        return dtype == std::string("torch.") + dtype_name(candidate.dtype);
    });
    REP_FAST_CHECK(known != kDLPackDTypes.end(), name_ << " has dtype " << dtype << ", which no kernel takes");
    dtype_ = known->dtype;
    data_ = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<std::uintptr_t>());
    for (const auto& extent : tensor.attr("shape")) {
        shape_.push_back(extent.cast<std::int64_t>());
    }
    for (const auto& stride : tensor.attr("stride")()) {
        strides_.push_back(stride.cast<std::int64_t>());
    }
}

void TensorArg::check_dtype(DType wanted) const {
    REP_FAST_CHECK(dtype_ == wanted, name_ << " must be " << dtype_name(wanted) << ", got " << dtype_name(dtype_));
}

void TensorArg::check_matrix() const {
    REP_FAST_CHECK(shape_.size() == 2, name_ << " must have 2 dimensions, got " << shape_.size());
    REP_FAST_CHECK(shape_[1] <= 1 || strides_[1] == 1,
                   name_ << " must have contiguous columns, got column stride " << strides_[1]);
}

void TensorArg::check_vector() const {
    REP_FAST_CHECK(shape_.size() == 1, name_ << " must have 1 dimension, got " << shape_.size());
    REP_FAST_CHECK(shape_[0] <= 1 || strides_[0] == 1, name_ << " must be contiguous, got stride " << strides_[0]);
}

}  // namespace rep_fast::python
