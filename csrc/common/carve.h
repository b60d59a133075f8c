#pragma once

#include "common/guard.h"
#include "common/simd.h"

namespace vd {
namespace VD_ISA {

// Cuts a thread's scratch memory into pieces, each a multiple of kLanes floats. Without memory it
// only counts.
class Carver {
 public:
  explicit Carver(float* memory) : memory_(memory) {}

  float* take(int64_t floats) {
    const int64_t size = round_up(floats, kLanes);
    float* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += size + kGap;
    if (piece) {
      VD_ALLOW(piece, size);
      VD_FORBID(piece + size, kGap);
    }
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kGap = VD_GUARDED ? kLanes : 0;  // behind each piece

  float* memory_;
  int64_t used_ = 0;
};

}  // namespace VD_ISA
}  // namespace vd
