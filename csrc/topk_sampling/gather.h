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
  const int64_t rows = g.slots + topk_sampling::kFrames;
  return term_floats(g.frames > g.slots ? g.frames : g.slots) + rows * kPitch + g.frames;
}

// to[0 .. width] = sum of the terms' rows, in their order.
template <typename T>
VD_INLINE void add_rows(const T* from, int64_t stride, const Term* terms, int64_t count,
                        int64_t width, T* to, bool around_cache) {
  int64_t e = 0;
  for (; e + kColumns * kLanes <= width; e += kColumns * kLanes) {
    F sum[kColumns] = {};
    for (int64_t i = 0; i < count; ++i) {
      const T* row = from + terms[i].at * stride + e;
      const F weight = broadcast(terms[i].weight);
      for (int v = 0; v < kColumns; ++v) sum[v] = fma(weight, load(row + v * kLanes), sum[v]);
    }
    for (int v = 0; v < kColumns; ++v) {
      if (around_cache) {
        stream(to + e + v * kLanes, sum[v]);
      } else {
        store(to + e + v * kLanes, sum[v]);
      }
    }
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
  const int64_t parts = (g.width + topk_sampling::kWidth - 1) / topk_sampling::kWidth;
  const int64_t first = task % parts * topk_sampling::kWidth, left = g.width - first;
  return {task / parts, first, left < topk_sampling::kWidth ? left : topk_sampling::kWidth};
}

template <typename T>
void gather_parts(const Gather& g, int64_t begin, int64_t end, float* scratch) {
  Term* terms = reinterpret_cast<Term*>(scratch);
  const bool around = g.stream && can_stream(static_cast<T*>(g.out), g.width);
  for (int64_t task = begin; task < end; ++task) {
    const Part part = part_of(g, task);
    const T* values = static_cast<const T*>(g.values) + part.row * g.values_row + part.first;
    for (int64_t k = 0; k < g.slots; ++k) {
      const int64_t count = terms_of_slot(g, part.row, k, terms);
      T* out = static_cast<T*>(g.out) + (part.row * g.slots + k) * g.width + part.first;
      add_rows(values, g.values_frame, terms, count, part.width, out, around);
    }
  }
  finish_streams();
}

// Slots that hold a frame, for a few frames at a time: most are in none.
class SlotsOfFrame {
 public:
  // Scratch holds N floats.
  SlotsOfFrame(const Gather& g, int64_t row, float* scratch)
      : g_(g), row_(row), used_(reinterpret_cast<int32_t*>(scratch)) {
    // With indices a frame has one slot, else `used_` only tells whether it has any.
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
      for (int64_t t = 0; t < g.frames; ++t) {
        used_[t] = weights[k * g.frames + t] != 0.0f ? 0 : used_[t];
      }
    }
  }

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
};

template <typename T>
void grad_values_parts(const Gather& g, int64_t begin, int64_t end, float* scratch) {
  Term* terms = reinterpret_cast<Term*>(scratch + g.frames);
  T* const to = static_cast<T*>(g.grad_values);
  const bool around = g.stream && can_stream(to, g.width);
  for (int64_t task = begin; task < end; ++task) {
    const Part part = part_of(g, task);
    const SlotsOfFrame slots(g, part.row, scratch);
    const T* grad = static_cast<const T*>(g.grad) + part.row * g.grad_row + part.first;
    for (int64_t t = 0; t < g.frames; ++t) {
      const int64_t count = slots.find(t, terms);
      add_rows(grad, g.grad_slot, terms, count, part.width,
               to + (part.row * g.frames + t) * g.width + part.first, around);
    }
  }
  finish_streams();
}

template <int kRows, int kOthers>
VD_INLINE void dots(const float* a, const float* b, int64_t stride, int64_t n, float* to,
                    int64_t to_stride) {
  F sum[kRows][kOthers] = {};
  for (int64_t e = 0; e < n; e += kLanes) {
    F other[kOthers];
    for (int j = 0; j < kOthers; ++j) other[j] = load(b + j * stride + e);
    for (int i = 0; i < kRows; ++i) {
      const F x = load(a + i * stride + e);
      for (int j = 0; j < kOthers; ++j) sum[i][j] = fma(x, other[j], sum[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kOthers; ++j) to[i * to_stride + j] += reduce_add(sum[i][j]);
  }
}

// to[i,j] += <a_i, b_j> for rows of n floats, a multiple of kLanes, `stride` apart.
inline void add_products(const float* a, int64_t rows, const float* b, int64_t others,
                         int64_t stride, int64_t n, float* to, int64_t to_stride) {
  int64_t j = 0;
  for (; j + 3 <= others; j += 3) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
      dots<4, 3>(a + i * stride, b + j * stride, stride, n, to + i * to_stride + j, to_stride);
    }
    for (; i < rows; ++i) {
      dots<1, 3>(a + i * stride, b + j * stride, stride, n, to + i * to_stride + j, to_stride);
    }
  }
  for (; j < others; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      dots<1, 1>(a + i * stride, b + j * stride, stride, n, to + i * to_stride + j, to_stride);
    }
  }
}

template <typename T>
void grad_weights_parts(const Gather& g, int64_t begin, int64_t end, float* scratch) {
  using topk_sampling::kFrames;
  const int64_t parts = (g.frames + kFrames - 1) / kFrames;
  float* grads = scratch;
  float* values = scratch + g.slots * kPitch;
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
          load_row(grad + k * g.grad_slot + e, width, grads + k * kPitch);
        }
        for (int64_t t = 0; t < frames; ++t) {
          load_row(from + (first + t) * g.values_frame + e, width, values + t * kPitch);
        }
        add_products(grads, g.slots, values, frames, kPitch, round_up(width, kLanes), to, g.frames);
        continue;
      }
      for (int64_t k = 0; k < g.slots; ++k) {
        const int64_t t = g.indices[row * g.slots + k];
        if (t < first || t >= first + frames) continue;
        load_row(grad + k * g.grad_slot + e, width, grads);
        load_row(from + t * g.values_frame + e, width, values);
        add_products(grads, 1, values, 1, kPitch, round_up(width, kLanes), to + t - first,
                     g.frames);
      }
    }
  }
}

}  // namespace VD_ISA
}  // namespace vd
