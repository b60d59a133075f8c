// Softmax over columns: as many as lanes at a time, so that no sum runs across lanes.
#pragma once

#include "common/simd.h"

namespace vd {
namespace VD_ISA {

constexpr float kHidden = -__FLT_MAX__;  // a score that leaves nothing of its key, and is still finite

// Of kLanes columns of scores s [n, stride], each times `scale`: e^(s - max), kept in place unless
// `keep` is false, their sum (0 where all are hidden), and the sum of e s.
struct ColumnSums {
  F sum, weighted;
};

template <bool keep, bool weigh>
VD_INLINE ColumnSums exponentials(float* s, int64_t n, int64_t stride, float scale = 1.0f) {
  F largest = broadcast(kHidden);
  for (int64_t j = 0; j < n; ++j) largest = max(largest, load(s + j * stride) * scale);
  // Where all are hidden, a shift of 0 leaves e^kHidden = 0 of each.
  const F shift = largest > kHidden ? largest : F{};
  ColumnSums sums{};
  for (int64_t j = 0; j < n; ++j) {
    const F score = load(s + j * stride) * scale;
    const F e = exp(score - shift);
    sums.sum += e;
    if constexpr (weigh) sums.weighted = fma(e, score, sums.weighted);
    if constexpr (keep) store(s + j * stride, e);
  }
  return sums;
}

}  // namespace VD_ISA
}  // namespace vd
