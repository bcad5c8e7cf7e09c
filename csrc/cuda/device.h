// Which GPU the calling thread launches on.
#pragma once

namespace rep_fast::cuda {

// Makes `device` the thread's, and at the end the one that was before.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    bool is_changed_ = false;
};

}  // namespace rep_fast::cuda
