// A sequence of tokens, where its rows lie and what each token may see.
#pragma once

#include "common/ahead.h"
#include "common/softmax.h"
#include "spacetime_attention/cpu_kernels.h"

namespace vd {
namespace VD_ISA {
namespace spacetime_attention {

using vd::spacetime_attention::Arguments;
using vd::spacetime_attention::Axis;
using vd::spacetime_attention::Gate;
using vd::spacetime_attention::Prefix;
using vd::spacetime_attention::Video;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Heads of one task, one after the other. In time order a token's heads lie side by side while the next
// frame is far away: so memory is asked for all heads of a token at once, as long as they fit.
inline int64_t heads_at_once(const Arguments& a) {
  if (a.axis != Axis::kTime) return 1;
  constexpr int64_t kFitting = 65536;  // elements in a second-level cache, with room for others
  return larger(1, smaller(a.heads, kFitting / larger(3 * a.length * a.width, 1)));
}

inline int64_t tasks(const Arguments& a) {
  const int64_t heads = heads_at_once(a);
  return a.batch * a.groups * ((a.heads + heads - 1) / heads);
}

// One sequence: a group's tokens of head h. Token i is patch s of frame t.
struct Sequence {
  const Arguments& a;
  int64_t b, g, h;

  // The first of a task, of as many as there are `heads` at once.
  Sequence(const Arguments& arguments, int64_t task, int64_t heads) : a(arguments) {
    const int64_t parts = (a.heads + heads - 1) / heads;
    b = task / parts / a.groups;
    g = task / parts % a.groups;
    h = task % parts * heads;
  }

  int64_t frame(int64_t i) const {
    return a.axis == Axis::kTime ? i : a.axis == Axis::kSpace ? g : i / a.patches;
  }
  int64_t patch(int64_t i) const {
    return a.axis == Axis::kTime ? g : a.axis == Axis::kSpace ? i : i % a.patches;
  }
  // Number of token i's row in a contiguous [B,T,S,H].
  int64_t row(int64_t i) const {
    return ((b * a.frames + frame(i)) * a.patches + patch(i)) * a.heads + h;
  }
  bool real(int64_t i) const {
    if (!a.real) return true;
    const int64_t t = b * a.frames + frame(i);
    return a.real[a.real_patches ? t * a.patches + patch(i) : t];
  }
  template <typename T>
  const T* at(const Video& x, int64_t i) const {
    return static_cast<const T*>(x.data) + b * x.batch + frame(i) * x.frame + patch(i) * x.patch +
           h * x.head;
  }
  template <typename T>
  const T* at(const Prefix& x, int64_t i) const {
    return static_cast<const T*>(x.data) + b * x.batch + g * x.group + i * x.token + h * x.head;
  }
  // Number of prefix i's row in a contiguous [B,G,P,H].
  int64_t prefix_row(int64_t i) const {
    return ((b * a.groups + g) * a.prefixes + i) * a.heads + h;
  }
};

// Where the rows of a sequence's tokens lie.
template <typename T>
class Walk {
 public:
  Walk(const Sequence& s, const Video& x)
      : s_(s),
        x_(x),
        first_(s.a.length > 0 ? s.at<T>(x, 0) : nullptr),
        step_(s.a.axis == Axis::kTime ? x.frame : x.patch),
        even_(s.a.axis != Axis::kJoint || x.frame == s.a.patches * x.patch) {}

  VD_INLINE const T* operator[](int64_t i) const {
    return even_ ? first_ + i * step_ : s_.at<T>(x_, i);
  }

  // Whether rows are equally far apart, and by how many elements.
  bool even() const { return even_; }
  int64_t step() const { return step_; }

 private:
  const Sequence& s_;
  const Video& x_;
  const T* first_;
  int64_t step_;
  bool even_;
};

// Asks for the rows of the task after this one, if there is one, in `steps` steps.
template <typename T>
Ahead ahead_of(const Arguments& a, int64_t task, int64_t end, int64_t heads, int64_t steps) {
  Ahead ahead;
  if (task + 1 < end && a.length > 0) {
    const Sequence next(a, task + 1, heads);
    heads = smaller(heads, a.heads - next.h);
    const int64_t frames = a.axis == Axis::kSpace ? 1 : a.frames;
    const int64_t patches = a.axis == Axis::kTime ? 1 : a.patches;
    const auto add = [&](const Video& x, int64_t size) {
      if (!x.data) return;
      const int64_t parts = x.head == a.width ? 1 : heads;  // of a token: its heads lie side by side
      const int64_t first = next.b * x.batch + next.frame(0) * x.frame + next.patch(0) * x.patch +
                            next.h * x.head;
      ahead.add(static_cast<const char*>(x.data) + first * size, {frames, patches, parts},
                {x.frame * size, x.patch * size, x.head * size}, heads / parts * a.width * size);
    };
    for (const Video& x : {a.query, a.key, a.value, a.grad_out}) add(x, sizeof(T));
    // The gate has a dtype of its own. One number a token needs no asking for.
    if (const Gate& gate = a.gate; gate.data && gate.width != 0) {
      by_dtype(gate.dtype, [&](auto t) {
        add({gate.data, gate.batch, gate.frame, gate.patch, gate.head}, sizeof t);
      });
    }
  }
  ahead.start(steps);
  return ahead;
}

// Calls visit(from, to) for each stretch of columns that token i may see, in order. Prefixes, which
// all see, are not among them.
template <typename Visit>
VD_INLINE void for_each_span(const Sequence& s, const int32_t* before, int64_t i,
                             const Visit& visit) {
  const Arguments& a = s.a;
  const auto tokens = [&](int64_t from, int64_t to) {
    visit(a.prefixes + before[from], a.prefixes + before[to]);
  };
  if (a.axis == Axis::kTime) {
    const int64_t w = a.window[0] < 0 ? a.length : a.window[0];
    return tokens(larger(0, i - w), a.causal ? i + 1 : smaller(a.length, i + w + 1));
  }
  const int64_t grid_rows = a.patches / a.columns;
  const int64_t t = i / a.patches, row = i % a.patches / a.columns, column = i % a.columns;
  const int64_t frames = a.axis == Axis::kJoint ? a.frames : 1;
  for (int64_t u = larger(0, t - a.window[0]); u <= smaller(frames - 1, t + a.window[0]); ++u) {
    for (int64_t r = larger(0, row - a.window[1]); r <= smaller(grid_rows - 1, row + a.window[1]);
         ++r) {
      const int64_t start = u * a.patches + r * a.columns;
      tokens(start + larger(0, column - a.window[2]),
             start + smaller(a.columns, column + a.window[2] + 1));
    }
  }
}

inline bool limited(const Arguments& a) { return a.causal || a.window[0] >= 0; }

// Hides from token i what it may not see, in its column of scores, `stride` apart.
VD_INLINE void hide(const Sequence& s, const int32_t* before, int64_t i, int64_t keys, float* column,
                    int64_t stride) {
  int64_t shown = s.a.prefixes;
  for_each_span(s, before, i, [&](int64_t from, int64_t to) {
    for (int64_t j = shown; j < from; ++j) column[j * stride] = kHidden;
    shown = to;
  });
  for (int64_t j = shown; j < keys; ++j) column[j * stride] = kHidden;
}

// The gate of token i: `factor` takes it if it is one number, `row` [width] if not.
struct GateRow {
  float factor;
  bool whole;
};

VD_INLINE GateRow gate_of(const Sequence& s, int64_t i, float* row) {
  const Gate& gate = s.a.gate;
  GateRow found{1.0f, false};
  if (!gate.data) return found;
  const int64_t at = s.b * gate.batch + s.frame(i) * gate.frame + s.patch(i) * gate.patch +
                     s.h * gate.head;
  by_dtype(gate.dtype, [&](auto t) {
    const auto* from = static_cast<const decltype(t)*>(gate.data) + at;
    found.whole = gate.width != 0;
    if (found.whole) {
      load_row(from, s.a.width, row);
    } else {
      found.factor = widen(*from);
    }
  });
  return found;
}

// to [width] = from * factor * gate, where there is a row of it; both padded.
VD_INLINE void multiply(const float* from, float factor, const float* gate, int64_t width,
                        float* to) {
  const F all = broadcast(factor);
  for (int64_t d = 0; d < width; d += kLanes) {
    const F x = load(from + d) * all;
    store(to + d, gate ? x * load(gate + d) : x);
  }
}

template <typename T>
VD_INLINE void write_row(const float* from, int64_t n, float factor, T* to, bool around_cache) {
  if (!around_cache) return store_row(from, n, factor, to);
  stream_row(from, n, factor, to);
}

// Writes the gradient of token i's row of the gate: `product` of dL/d out and out, times `factor`.
template <typename T>
VD_INLINE void write_gate_row(const Sequence& s, int64_t i, const float* product, float factor) {
  const Arguments& a = s.a;
  const auto write = [&](auto* rows) {
    write_row(product, a.width, factor, rows + s.row(i) * a.width,
              a.stream && can_stream(rows, a.width));
  };
  if (a.grad_gate_narrow) {
    write(static_cast<T*>(a.grad_gate));
  } else {
    write(static_cast<float*>(a.grad_gate));
  }
}

}  // namespace spacetime_attention
}  // namespace VD_ISA
}  // namespace vd
