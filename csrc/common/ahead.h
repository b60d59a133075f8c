// Asks memory for what comes next while something else is computed.
#pragma once

#include "common/pairs.h"

namespace vd {
namespace VD_ISA {

// Rows that lie too far apart for the processor to foresee. A core waits for a dozen cache lines or so
// at once, and stalls when it is to ask for more: so a few are asked for at each of many steps, all
// along the computation.
class Ahead {
 public:
  // Asks for rows of `bytes` bytes, count[0] * count[1] * count[2] of them: step[i] bytes lie between
  // neighbours in a direction. At most kMost times.
  void add(const void* first, const int64_t (&count)[3], const int64_t (&step)[3], int64_t bytes) {
    if (!first || count[0] * count[1] * count[2] * bytes <= 0) return;
    Rows& rows = rows_[added_++];
    rows = {static_cast<const char*>(first),
            {count[0], count[1], count[2]},
            {step[0], step[1], step[2]},
            (bytes + kLine - 1) / kLine};
    lines_ += count[0] * count[1] * count[2] * rows.lines;
  }

  // After all rows were added: everything is asked for within `steps` steps.
  void start(int64_t steps) {
    steps = steps < 1 ? 1 : steps;
    each_ = (lines_ + steps - 1) / steps;
    find_row();
  }

  // A step for each row of T, of which this is the i-th: several at once of pairs, as there is less to
  // be computed of them than so many steps would take.
  template <typename T>
  VD_INLINE void step_of_row(int64_t i) {
    constexpr int64_t rows = kPaired<T> ? 8 : 1;
    if (i % rows == 0) step(rows);
  }

  VD_INLINE void step(int64_t steps) {
    for (int64_t wanted = steps * each_; wanted > 0 && left_ > 0;) {
      const int64_t lines = wanted < left_ ? wanted : left_;
      for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(line_ + i * kLine, 0, 2);
      wanted -= lines;
      left_ -= lines;
      line_ += lines * kLine;
      if (left_ == 0) advance();
    }
  }

 private:
  static constexpr int kMost = 5, kLine = 64;

  struct Rows {
    const char* first;
    int64_t count[3], step[3], lines;
  };

  void advance() {
    const Rows& rows = rows_[at_];
    for (int i = 2; i >= 0; --i) {
      if (++index_[i] < rows.count[i]) return find_row();
      index_[i] = 0;
    }
    ++at_;
    find_row();
  }

  void find_row() {
    if (at_ == added_) return;
    const Rows& rows = rows_[at_];
    line_ = rows.first;
    for (int i = 0; i < 3; ++i) line_ += index_[i] * rows.step[i];
    left_ = rows.lines;
  }

  Rows rows_[kMost];
  int added_ = 0, at_ = 0;
  int64_t index_[3] = {}, lines_ = 0, each_ = 0;
  const char* line_ = nullptr;
  int64_t left_ = 0;  // lines of the row
};

}  // namespace VD_ISA
}  // namespace vd
