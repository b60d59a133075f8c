#pragma once

namespace vd {

// What tensors hold in memory; arithmetic is on floats.
enum class Dtype { kFloat, kBFloat16, kHalf };

}  // namespace vd
