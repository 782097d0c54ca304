// SPDX-License-Identifier: Apache-2.0
// A library with one plugin creator, "Nope", that creates nothing. TensorRT's headers are not on
// PyPI: the virtual functions stand in the order that NvInferRuntime.h gives them in 10.0 and later.

#include <cstdint>

struct InterfaceInfo {
  const char* kind;
  int32_t major;
  int32_t minor;
};

struct Fields {
  int32_t count;
  const void* fields;
};

struct VersionedInterface {
  virtual int32_t language() const noexcept { return 0; }  // C++
  virtual InterfaceInfo info() const noexcept = 0;
  virtual ~VersionedInterface() noexcept = default;
};

struct Creator : VersionedInterface {
  InterfaceInfo info() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
  virtual void* create(const char*, const Fields*, int32_t) noexcept { return nullptr; }
  virtual const Fields* fields() noexcept {
    static const Fields none{0, nullptr};
    return &none;
  }
  virtual const char* name() const noexcept { return "Nope"; }
  virtual const char* version() const noexcept { return "1"; }
  virtual const char* space() const noexcept { return ""; }
};

static Creator creator;
static VersionedInterface* creators[] = {&creator};

extern "C" VersionedInterface* const* getCreators(int32_t& count) {
  count = 1;
  return creators;
}

extern "C" void setLoggerFinder(void*) {}
