// The part of the DLPack 1.x C ABI that rep_fast reads: a borrowed tensor and the exchange table that lends it.
//
// Layouts follow dlpack.h (https://github.com/dmlc/dlpack); names are kept from there.
#pragma once

#include <cstdint>

namespace rep_fast::dlpack {

struct DLDevice {
    std::int32_t device_type;
    std::int32_t device_id;
};
inline constexpr std::int32_t kDLCPU = 1;
inline constexpr std::int32_t kDLCUDA = 2;

struct DLDataType {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
};
inline constexpr std::uint8_t kDLInt = 0;
inline constexpr std::uint8_t kDLFloat = 2;
inline constexpr std::uint8_t kDLBfloat = 4;
inline constexpr std::uint8_t kDLBool = 6;

struct DLTensor {
    void* data;
    DLDevice device;
    std::int32_t ndim;
    DLDataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;  // in elements; null means row-major without gaps
    std::uint64_t byte_offset;
};

struct DLPackVersion {
    std::uint32_t major;
    std::uint32_t minor;
};

struct DLPackExchangeAPIHeader {
    DLPackVersion version;
    DLPackExchangeAPIHeader* prev_api;  // an older table, or null
};

struct DLPackExchangeAPI {
    DLPackExchangeAPIHeader header;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object_no_sync;
    void* managed_tensor_to_py_object_no_sync;
    int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);  // may be null
    void* current_work_stream;
};

}  // namespace rep_fast::dlpack
