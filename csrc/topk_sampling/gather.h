// topk_gather: the chosen frames' values, and the gradients of values and weights.
//
// Weights have a few non-zeros in each slot, and only frames that have one are read.
#pragma once

#include "common/simd.h"
#include "topk_sampling/cpu_kernels.h"

namespace vd {
namespace VD_ISA {

using topk_sampling::Gather;

constexpr int kColumns = 8;       // vectors of a row whose sums are held in registers
constexpr int64_t kDepth = 1024;  // values of a row that products are summed over in one go
constexpr int64_t kPitch = kDepth + kLanes;  // of copied rows, lest all fall on one set of a cache

// One term of a sum of rows: `weight` times row number `at`.
struct Term {
  int32_t at;
  float weight;
};

constexpr int64_t term_floats(int64_t count) { return count * (sizeof(Term) / sizeof(float)); }

inline int64_t gather_scratch(const Gather& g) {
  const int64_t terms = term_floats(g.frames > g.slots ? g.frames : g.slots) + g.frames;
  return terms > g.slots * kPitch ? terms : g.slots * kPitch;
}

// to[0 .. width] = sum of the terms' rows, in their order.
template <typename T>
VD_INLINE void add_rows(const T* from, int64_t stride, const Term* terms, int64_t count,
                        int64_t width, T* to) {
  // The C library moves and clears memory without reading what it overwrites.
  if (count == 0) {
    std::memset(to, 0, width * sizeof(T));
    return;
  }
  if (count == 1 && terms[0].weight == 1.0f) {
    std::memcpy(to, from + terms[0].at * stride, width * sizeof(T));
    return;
  }
  int64_t e = 0;
  for (; e + kColumns * kLanes <= width; e += kColumns * kLanes) {
    F sum[kColumns] = {};
    for (int64_t i = 0; i < count; ++i) {
      const T* row = from + terms[i].at * stride + e;
      const F weight = broadcast(terms[i].weight);
      for (int v = 0; v < kColumns; ++v) sum[v] = fma(weight, load(row + v * kLanes), sum[v]);
    }
    for (int v = 0; v < kColumns; ++v) store(to + e + v * kLanes, sum[v]);
  }
  for (; e + kLanes <= width; e += kLanes) {
    F sum = {};
    for (int64_t i = 0; i < count; ++i) {
      sum = fma(broadcast(terms[i].weight), load(from + terms[i].at * stride + e), sum);
    }
    store(to + e, sum);
  }
  for (; e < width; ++e) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      sum += terms[i].weight * widen(from[terms[i].at * stride + e]);
    }
    narrow(sum, to + e);
  }
}

// The frames that make up slot k.
inline int64_t terms_of_slot(const Gather& g, int64_t row, int64_t k, Term* terms) {
  if (g.indices) {
    const int64_t t = g.indices[row * g.slots + k];
    if (t < 0) return 0;
    terms[0] = {static_cast<int32_t>(t), g.weights[row * g.frames + t]};
    return 1;
  }
  const float* weights = g.weights + (row * g.slots + k) * g.frames;
  int64_t count = 0, t = 0;
  for (; t + kLanes <= g.frames; t += kLanes) {
    for (uint32_t bits = movemask(load(weights + t) != 0.0f); bits; bits &= bits - 1) {
      const int64_t i = t + __builtin_ctz(bits);
      terms[count++] = {static_cast<int32_t>(i), weights[i]};
    }
  }
  for (; t < g.frames; ++t) {
    if (weights[t] != 0.0f) terms[count++] = {static_cast<int32_t>(t), weights[t]};
  }
  return count;
}

// A part of a row: `width` of its E values from `first` on.
struct Part {
  int64_t row, first, width;
};

VD_INLINE Part part_of(const Gather& g, int64_t task) {
  const int64_t parts = (g.width + g.part - 1) / g.part;
  const int64_t first = task % parts * g.part, left = g.width - first;
  return {task / parts, first, left < g.part ? left : g.part};
}

// Calls visit(first, width) for each stretch of a part in which all sums are formed before the next
// one's: it lies in the cache, unless no row is read twice. Then it is the whole part.
template <typename Visit>
VD_INLINE void for_each_stretch(const Part& part, bool read_once, const Visit& visit) {
  const int64_t step = read_once ? part.width : topk_sampling::kWidth;
  for (int64_t e = 0; e < part.width; e += step) {
    visit(part.first + e, part.width - e < step ? part.width - e : step);
  }
}

template <typename T>
void gather_parts(const Gather& g, int64_t begin, int64_t end, float* scratch) {
  Term* terms = reinterpret_cast<Term*>(scratch);
  for (int64_t task = begin; task < end; ++task) {
    const Part part = part_of(g, task);
    const T* values = static_cast<const T*>(g.values) + part.row * g.values_row;
    T* out = static_cast<T*>(g.out) + part.row * g.slots * g.width;
    bool single = true;
    for (int64_t k = 0; k < g.slots; ++k) single &= terms_of_slot(g, part.row, k, terms) <= 1;
    for_each_stretch(part, single, [&](int64_t first, int64_t width) {
      for (int64_t k = 0; k < g.slots; ++k) {
        const int64_t count = terms_of_slot(g, part.row, k, terms);
        add_rows(values + first, g.values_frame, terms, count, width, out + k * g.width + first);
      }
    });
  }
}

// Slots that hold a frame, for a few frames at a time: most are in none.
class SlotsOfFrame {
 public:
  // Scratch holds N floats.
  SlotsOfFrame(const Gather& g, int64_t row, float* scratch)
      : g_(g), row_(row), used_(reinterpret_cast<int32_t*>(scratch)) {
    // With indices a frame has one slot, else `used_` tells how many but one it has.
    for (int64_t t = 0; t < g.frames; ++t) used_[t] = -1;
    if (g.indices) {
      for (int64_t k = 0; k < g.slots; ++k) {
        const int64_t t = g.indices[row * g.slots + k];
        if (t >= 0) used_[t] = static_cast<int32_t>(k);
      }
      return;
    }
    const float* weights = g.weights + row * g.slots * g.frames;
    for (int64_t k = 0; k < g.slots; ++k) {
      for (int64_t t = 0; t < g.frames; ++t) used_[t] += weights[k * g.frames + t] != 0.0f;
    }
    for (int64_t t = 0; t < g.frames; ++t) single_ &= used_[t] <= 0;
  }

  // Whether no frame is in two slots.
  bool single() const { return single_; }

  int64_t find(int64_t t, Term* terms) const {
    if (used_[t] < 0) return 0;
    if (g_.indices) {
      terms[0] = {used_[t], g_.weights[row_ * g_.frames + t]};
      return 1;
    }
    int64_t count = 0;
    for (int64_t k = 0; k < g_.slots; ++k) {
      const float weight = g_.weights[(row_ * g_.slots + k) * g_.frames + t];
      if (weight != 0.0f) terms[count++] = {static_cast<int32_t>(k), weight};
    }
    return count;
  }

 private:
  const Gather& g_;
  int64_t row_;
  int32_t* used_;
  bool single_ = true;
};

template <typename T>
void grad_values_parts(const Gather& g, int64_t begin, int64_t end, float* scratch) {
  Term* terms = reinterpret_cast<Term*>(scratch + g.frames);
  for (int64_t task = begin; task < end; ++task) {
    const Part part = part_of(g, task);
    const SlotsOfFrame slots(g, part.row, scratch);
    const T* grad = static_cast<const T*>(g.grad) + part.row * g.grad_row;
    T* to = static_cast<T*>(g.grad_values) + part.row * g.frames * g.width;
    for_each_stretch(part, slots.single(), [&](int64_t first, int64_t width) {
      for (int64_t t = 0; t < g.frames; ++t) {
        const int64_t count = slots.find(t, terms);
        add_rows(grad + first, g.grad_slot, terms, count, width, to + t * g.width + first);
      }
    });
  }
}

// Of so many slots and frames products are formed in registers.
constexpr int kSlotsAtOnce = kLanes == 16 ? 8 : 4, kFramesAtOnce = kLanes == 16 ? 3 : 2;

// to[i,j] += <a_i, b_j> over n values, a multiple of kLanes. Rows after these b are asked for.
template <int kRows, int kOthers, typename T>
VD_INLINE void dots(const float* a, const T* b, int64_t stride, int64_t n, float* to,
                    int64_t to_stride) {
  F sum[kRows][kOthers] = {};
  for (int64_t e = 0; e < n; e += kLanes) {
    F other[kOthers];
    VD_UNROLL for (int j = 0; j < kOthers; ++j) {
      other[j] = load(b + j * stride + e);
      __builtin_prefetch(b + (j + kOthers) * stride + e);
    }
    VD_UNROLL for (int i = 0; i < kRows; ++i) {
      const F x = load(a + i * kPitch + e);
      VD_UNROLL for (int j = 0; j < kOthers; ++j) sum[i][j] = fma(x, other[j], sum[i][j]);
    }
  }
  VD_UNROLL for (int i = 0; i < kRows; ++i) {
    VD_UNROLL for (int j = 0; j < kOthers; ++j) to[i * to_stride + j] += reduce_add(sum[i][j]);
  }
}

template <int kOthers, typename T>
VD_INLINE void dots_of_slots(const float* a, int64_t slots, const T* b, int64_t stride, int64_t n,
                             float* to, int64_t to_stride) {
  int64_t i = 0;
  for (; i + kSlotsAtOnce <= slots; i += kSlotsAtOnce) {
    dots<kSlotsAtOnce, kOthers>(a + i * kPitch, b, stride, n, to + i * to_stride, to_stride);
  }
  for (; i < slots; ++i) {
    dots<1, kOthers>(a + i * kPitch, b, stride, n, to + i * to_stride, to_stride);
  }
}

// to[i,j] += <a_i, b_j> for rows of n values: floats a that lie kPitch apart, and b `stride` apart.
template <typename T>
VD_INLINE void add_products(const float* a, int64_t slots, const T* b, int64_t frames,
                            int64_t stride, int64_t n, float* to, int64_t to_stride) {
  const int64_t whole = n / kLanes * kLanes;
  int64_t j = 0;
  for (; j + kFramesAtOnce <= frames; j += kFramesAtOnce) {
    dots_of_slots<kFramesAtOnce>(a, slots, b + j * stride, stride, whole, to + j, to_stride);
  }
  for (; j < frames; ++j) {
    dots_of_slots<1>(a, slots, b + j * stride, stride, whole, to + j, to_stride);
  }
  for (int64_t i = 0; whole < n && i < slots; ++i) {
    for (j = 0; j < frames; ++j) {
      float sum = 0.0f;
      for (int64_t e = whole; e < n; ++e) sum += a[i * kPitch + e] * widen(b[j * stride + e]);
      to[i * to_stride + j] += sum;
    }
  }
}

template <typename T>
void grad_weights_parts(const Gather& g, int64_t begin, int64_t end, float* scratch) {
  using topk_sampling::kFrames;
  const int64_t parts = (g.frames + kFrames - 1) / kFrames;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / parts, first = task % parts * kFrames;
    const int64_t frames = g.frames - first < kFrames ? g.frames - first : kFrames;
    float* to = g.grad_weights + row * (g.indices ? 1 : g.slots) * g.frames + first;
    for (int64_t k = 0; k < (g.indices ? 1 : g.slots); ++k) {
      for (int64_t t = 0; t < frames; ++t) to[k * g.frames + t] = 0.0f;
    }
    const T* from = static_cast<const T*>(g.values) + row * g.values_row;
    const T* grad = static_cast<const T*>(g.grad) + row * g.grad_row;
    for (int64_t e = 0; e < g.width; e += kDepth) {
      const int64_t width = g.width - e < kDepth ? g.width - e : kDepth;
      if (!g.indices) {
        for (int64_t k = 0; k < g.slots; ++k) {
          load_row(grad + k * g.grad_slot + e, width, scratch + k * kPitch);
        }
        add_products(scratch, g.slots, from + first * g.values_frame + e, frames, g.values_frame,
                     width, to, g.frames);
        continue;
      }
      for (int64_t k = 0; k < g.slots; ++k) {
        const int64_t t = g.indices[row * g.slots + k];
        if (t < first || t >= first + frames) continue;
        load_row(grad + k * g.grad_slot + e, width, scratch);
        add_products(scratch, 1, from + t * g.values_frame + e, 1, g.values_frame, width,
                     to + t - first, g.frames);
      }
    }
  }
}

}  // namespace VD_ISA
}  // namespace vd
