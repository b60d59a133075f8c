// The K best of many keys without sorting them.
#pragma once

#include "common/simd.h"

namespace vd {
namespace VD_ISA {

constexpr float kLowest = -0x1.fffffep127f;  // real keys are not below it, masked ones are: -inf

// Integers in the order of floats, and back. No NaN lies between two floats that are none.
VD_INLINE int32_t ordinal(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
VD_INLINE float of_ordinal(int32_t x) {
  x ^= (x >> 31) & 0x7fffffff;
  float value;
  std::memcpy(&value, &x, sizeof value);
  return value;
}

VD_INLINE int64_t count_at_least(const float* keys, int64_t padded, float threshold) {
  const F least = broadcast(threshold);
  int64_t count = 0;
  for (int64_t i = 0; i < padded; i += kLanes) {
    count += __builtin_popcount(movemask(load(keys + i) >= least));
  }
  return count;
}

// Chooses the k best of some keys, again and again.
//
// Keys that reach a threshold are written out in their order. It is one that somewhat more than k
// keys of earlier choices reached, so there are few of them, and bisection finds what separates k
// of them from the others. A threshold that fewer than k keys reach costs time alone.
class Chooser {
 public:
  static constexpr int64_t scratch_floats(int64_t padded) { return 2 * padded + kLanes; }

  // Of `padded` keys, a multiple of kLanes.
  Chooser(int64_t padded, int64_t k, float* scratch)
      : padded_(padded),
        k_(k),
        margin_(2 + static_cast<int64_t>(2.0f * __builtin_sqrtf(static_cast<float>(k)))),
        best_(scratch),
        position_(reinterpret_cast<int32_t*>(scratch + padded + kLanes)) {}

  // The positions of the k best keys: ascending, or with `by_score` best first. Among equal keys
  // the lowest position wins; -inf is never chosen. Returns how many there are, at most k.
  int64_t choose(const float* keys, bool by_score, int32_t* chosen) {
    collect(keys, threshold_);
    const bool failed = found_ < k_;
    if (failed && threshold_ != kLowest) collect(keys, kLowest);
    if (found_ > k_) {
      const float start = failed ? kLowest : threshold_;
      const float passed = keep_best(start);
      // Down at once, up slowly: nearly all thresholds should let k keys pass.
      threshold_ = start == kLowest ? passed : start + (passed - start) * 0.0625f;
    }
    if (by_score) {
      for (int64_t i = 0; i < found_; ++i) chosen[rank(i)] = position_[i];
    } else {
      for (int64_t i = 0; i < found_; ++i) chosen[i] = position_[i];
    }
    return found_;
  }

 private:
  void collect(const float* keys, float threshold) {
    const F least = broadcast(threshold);
    found_ = 0;
    for (int64_t start = 0; start < padded_; start += 64) {
      uint64_t bits = 0;
      for (int64_t i = 0; i < 64 && start + i < padded_; i += kLanes) {
        bits |= static_cast<uint64_t>(movemask(load(keys + start + i) >= least)) << i;
      }
      for (; bits; bits &= bits - 1) {
        const int64_t i = start + __builtin_ctzll(bits);
        best_[found_] = keys[i];
        position_[found_++] = static_cast<int32_t>(i);
      }
    }
    pad();
  }

  void pad() { store(best_ + found_, broadcast(-__builtin_inff())); }

  // Leaves k of the collected keys, which are more and at least `start`. Returns the largest
  // threshold it came across that k and a margin of them reach, or `start`.
  float keep_best(float start) {
    const int64_t padded = round_up(found_, kLanes);
    F largest = load(best_);
    for (int64_t i = kLanes; i < padded; i += kLanes) largest = max(largest, load(best_ + i));
    // Bisection between two ordinals: `reached` keys, at least k, are not below the lower one,
    // `above`, fewer than k, not below the upper one.
    int64_t low = ordinal(start), high = int64_t{ordinal(reduce_max(largest))} + 1;
    int64_t reached = found_, above = 0;
    while (reached != k_ && high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      const float threshold = of_ordinal(static_cast<int32_t>(middle));
      const int64_t count = count_at_least(best_, padded, threshold);
      if (count >= k_ + margin_) start = threshold;
      if (count >= k_) {
        low = middle;
        reached = count;
      } else {
        high = middle;
        above = count;
      }
    }
    const float worst = of_ordinal(static_cast<int32_t>(low));
    // With more than k left the worst of them are all equal, and the first of these stay.
    int64_t equals = reached == k_ ? k_ : k_ - above;
    int64_t kept = 0;
    for (int64_t i = 0; i < found_; ++i) {
      const bool equal = best_[i] == worst;
      const bool stays = best_[i] > worst || (equal && equals > 0);
      equals -= equal;
      best_[kept] = best_[i];
      position_[kept] = position_[i];
      kept += stays;
    }
    found_ = kept;
    pad();
    return start;
  }

  // How many chosen keys are better than the i-th, or equal and before it.
  int64_t rank(int64_t i) const {
    const F key = broadcast(best_[i]);
    int64_t better = 0;
    for (int64_t j = 0; j < found_; j += kLanes) {
      const F other = load(best_ + j);
      I at;
      for (int lane = 0; lane < kLanes; ++lane) at[lane] = static_cast<int32_t>(j + lane);
      const I before = at < static_cast<int32_t>(i);
      better += __builtin_popcount(movemask((other > key) | ((other == key) & before)));
    }
    return better;
  }

  int64_t padded_, k_, margin_;
  float* best_;        // collected keys, then a vector of -inf
  int32_t* position_;  // where they lie
  int64_t found_ = 0;
  float threshold_ = kLowest;
};

}  // namespace VD_ISA
}  // namespace vd
