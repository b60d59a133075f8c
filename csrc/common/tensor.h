// How operators reach torch: tensors, threads and scratch memory, all through LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
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

// Bytes of scratch memory that threads have asked for since it was told last: of each thread the most
// at once. Measuring asks, as no book of torch's knows of them.
class ScratchBook {
 public:
  // What is in it of one thread.
  struct Entry {
    int64_t round = 0, bytes = 0;
  };

  void enter(int64_t bytes, Entry* mine) {
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (mine->round != round) *mine = {round, 0};
    if (bytes <= mine->bytes) return;
    bytes_.fetch_add(bytes - mine->bytes, std::memory_order_relaxed);
    mine->bytes = bytes;
  }

  int64_t tell() {
    round_.fetch_add(1, std::memory_order_relaxed);
    return bytes_.exchange(0, std::memory_order_relaxed);
  }

 private:
  std::atomic<int64_t> round_{0}, bytes_{0};
};
inline ScratchBook scratch_book;

// A thread's scratch memory, kept for its next call. Contents are undefined.
inline float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  thread_local ScratchBook::Entry entry;
  constexpr int64_t kPage = 4096 / sizeof(float);
  const int64_t whole = (floats + kPage - 1) / kPage * kPage;
  if (whole > size) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(4096, whole * sizeof(float))));
    if (!memory) throw std::bad_alloc();
    size = whole;
  }
  scratch_book.enter(whole * static_cast<int64_t>(sizeof(float)), &entry);
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
