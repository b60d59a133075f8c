// How operators reach torch: tensors, threads and scratch memory, all through LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>

#include "common/dtype.h"
#include "common/guard.h"

namespace vd {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "this kernel takes float32, bfloat16 or float16");
  return type == ScalarType::Float      ? Dtype::kFloat
         : type == ScalarType::BFloat16 ? Dtype::kBFloat16
                                        : Dtype::kHalf;
}

// Where a tensor of floats lies; nullptr where there is none.
inline float* floats_of(const MaybeTensor& x) {
  return x ? static_cast<float*>(x->mutable_data_ptr()) : nullptr;
}

// Bytes from which on results are written around the cache: nobody will find them there anyway.
constexpr int64_t kStreamBytes = 4 << 20;

// A thread's scratch memory, kept for its next call. Contents are undefined.
inline float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    memory.reset();
    size = 0;
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 4095) / 4096 * 4096;
    memory.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
    if (!memory) throw std::bad_alloc();
    size = static_cast<int64_t>(bytes / sizeof(float));
  }
  // Pieces of earlier calls are forgotten; what this one did not ask for is forbidden.
  VD_ALLOW(memory.get(), floats);
  VD_FORBID(memory.get() + floats, size - floats);
  return memory.get();
}

// run(begin, end) over parts of 0 .. count in torch's threads, each with at least `grain` items.
template <typename Run>
void parallel(int64_t count, int64_t grain, const Run& run) {
  torch::stable::parallel_for(0, count, grain, run);
}

}  // namespace vd
