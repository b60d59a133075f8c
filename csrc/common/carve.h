#pragma once

#include "common/simd.h"

namespace vd {
namespace VD_ISA {

// Cuts a thread's scratch memory into pieces, each a multiple of kLanes floats. Without memory it
// only counts.
class Carver {
 public:
  explicit Carver(float* memory) : memory_(memory) {}

  float* take(int64_t floats) {
    float* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += round_up(floats, kLanes);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

}  // namespace VD_ISA
}  // namespace vd
