// spacetime_attention for one instruction set: one sequence (a group's tokens of one head) at a time.
//
// Keys and values that may be seen are gathered into rows in the cache, prefixes first. A few queries
// at a time then see all of them: the softmax needs no second look, and nothing but the sequence's
// own rows is kept. Backward computes p again.
//
// Rows hold units: floats, or pairs of bfloat16 where there are products of those (pairs.h).
#include "spacetime_attention/cpu_kernels.h"

#include "common/carve.h"
#include "common/gemm.h"
#include "common/pairs.h"
#include "common/softmax.h"

namespace vd {
namespace VD_ISA {
namespace {

using spacetime_attention::Arguments;
using spacetime_attention::Axis;
using spacetime_attention::Gate;
using spacetime_attention::Prefix;
using spacetime_attention::Video;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Queries that are computed together, whole vectors of them: their scores stay in the nearest caches.
int64_t block_of(int64_t keys) { return keys <= 512 ? 48 : 16; }

// Heads whose rows are gathered at once. In time order a token's heads lie side by side, while the
// next frame is far away: one long row is read as fast as memory allows, twelve short ones are not.
int64_t heads_at_once(const Arguments& a) {
  if (a.axis != Axis::kTime) return 1;
  constexpr int64_t kFitting = 49152;  // units in a second-level cache, with room for others
  const int64_t each = 3 * (a.prefixes + a.length) * round_up(a.width, kLanes);
  return larger(1, smaller(a.heads, kFitting / larger(each, 1)));
}

int64_t tasks(const Arguments& a) {
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

// Which of the keys that were gathered belong to a token: before[i] tokens were gathered before it.
int64_t count_real(const Sequence& s, int32_t* before) {
  int32_t n = 0;
  for (int64_t i = 0; i < s.a.length; ++i) {
    before[i] = n;
    n += s.real(i);
  }
  before[s.a.length] = n;
  return n;
}

// Rows of some heads as units times `factor`, each padded with zeros to `width` elements.
template <typename T>
VD_INLINE void load_heads(const T* from, int64_t head_stride, int64_t heads, int64_t n,
                          int64_t width, float factor, float* to) {
  if (head_stride == n && n == width) {
    return load_units(from, heads * n, heads * width, to, factor);
  }
  for (int64_t h = 0; h < heads; ++h) {
    load_units(from + h * head_stride, n, width, to + h * units_of<T>(width), factor);
  }
}

// What is gathered of the prefixes, then of the real tokens.
template <typename T>
VD_INLINE void gather(const Sequence& s, const Prefix& prefix, const Video& x,
                      const int32_t* before, int64_t heads, int64_t width, float factor,
                      float* rows) {
  const auto copy = [&](const T* from, int64_t head_stride) {
    load_heads(from, head_stride, heads, s.a.width, width, factor, rows);
    rows += heads * units_of<T>(width);
  };
  for (int64_t i = 0; i < s.a.prefixes; ++i) copy(s.at<T>(prefix, i), prefix.head);
  for (int64_t i = 0; i < s.a.length; ++i) {
    if (before[i] != before[i + 1]) copy(s.at<T>(x, i), x.head);
  }
}

// Likewise of all tokens.
template <typename T>
VD_INLINE void gather(const Sequence& s, const Video& x, int64_t heads, int64_t width,
                      float* rows) {
  const int64_t step = heads * units_of<T>(width);
  for (int64_t i = 0; i < s.a.length; ++i) {
    load_heads(s.at<T>(x, i), x.head, heads, s.a.width, width, 1.0f, rows + i * step);
  }
}

// Some rows of units: where they lie if they can be read as they are, else a copy.
struct Rows {
  const float* data;
  int64_t stride;
};

template <typename T>
VD_INLINE Rows rows_of(const Sequence& s, const Video& x, int64_t first, int64_t rows,
                       int64_t width, float* room) {
  constexpr int64_t each = sizeof(float) / sizeof(T);  // elements of a unit
  if constexpr (each == 1 || kPaired<T>) {
    const int64_t stride = s.a.axis == Axis::kTime ? x.frame : x.patch;
    const bool even = s.a.axis != Axis::kJoint || x.frame == s.a.patches * x.patch;
    if (even && stride % each == 0 && s.a.width == width) {
      return {reinterpret_cast<const float*>(s.at<T>(x, first)), stride / each};
    }
  }
  const int64_t step = units_of<T>(width);
  for (int64_t i = 0; i < rows; ++i) {
    load_units(s.at<T>(x, first + i), s.a.width, width, room + i * step);
  }
  return {room, step};
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

bool limited(const Arguments& a) { return a.causal || a.window[0] >= 0; }

// Hides from token i what it may not see.
VD_INLINE void hide(const Sequence& s, const int32_t* before, int64_t i, int64_t keys, float* row) {
  int64_t shown = s.a.prefixes;
  for_each_span(s, before, i, [&](int64_t from, int64_t to) {
    for (int64_t j = shown; j < from; ++j) row[j] = kHidden;
    shown = to;
  });
  for (int64_t j = shown; j < keys; ++j) row[j] = kHidden;
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
  for (int64_t d = 0; d < n; d += kLanes) stream(to + d, load(from + d) * factor);
}

// What every pass needs of the scratch memory.
template <typename T>
struct Room {
  int64_t width, keys, block;  // elements of a row, most keys (whole vectors), queries at a time
  int64_t units;               // of a row
  int64_t heads, step;         // whose rows are gathered at once, and their units
  Carver carve;
  float *key, *value;  // [keys, heads, units]
  float* query;        // [L, heads, units], or [block, units] where heads is 1
  float *key_columns, *value_stack, *scores, *weights, *left, *result, *gate, *shares, *prefix;
  int32_t* before;

  Room(const Arguments& a, float* scratch)
      : width(round_up(a.width, row_step<T>)),
        keys(round_up(a.prefixes + a.length, kLanes)),
        block(block_of(keys)),
        units(units_of<T>(width)),
        heads(heads_at_once(a)),
        step(heads * units),
        carve(scratch),
        key(carve.take(keys * step)),
        value(carve.take(keys * step)),
        query(carve.take(queries(a) * step)),
        key_columns(carve.take(keys * units)),
        value_stack(carve.take(paired(units_of<T>(keys) * width))),
        scores(carve.take(block * keys)),
        weights(carve.take(keys * block)),
        left(carve.take(paired(units_of<T>(keys) * block))),
        result(carve.take(block * width)),
        gate(carve.take(width)),
        shares(carve.take(block)),
        prefix(carve.take(units)),
        before(reinterpret_cast<int32_t*>(carve.take(a.length + 1))) {}

  int64_t queries(const Arguments& a) const { return heads > 1 ? larger(a.length, block) : block; }
  static int64_t paired(int64_t floats) { return kPaired<T> ? floats : 0; }
};

int64_t forward_scratch(const Arguments& a) {
  int64_t floats = 0;
  by_dtype(a.dtype, [&](auto t) { floats = Room<decltype(t)>(a, nullptr).carve.used(); });
  return floats;
}

// Weights of some queries over all keys, not yet normalised: room.weights [keys, block], a query to a
// column. room.shares makes each sum to 1. `first` is the first query's token, or negative for
// prefixes, which see everything.
template <typename T>
void attend(const Sequence& s, const Room<T>& room, const Rows& query, int64_t first, int64_t rows,
            int64_t keys) {
  const int64_t padded = round_up(keys, kLanes);
  gemm<kPaired<T>>(rows, keys, units_of<T>(s.a.width), query.data, {query.stride, 1},
                   room.key_columns, padded, room.scores, padded, false);
  for (int64_t i = 0; kPaired<T> && i < rows * padded; i += kLanes) {
    store(room.scores + i, load(room.scores + i) * s.a.scale);  // keys are as they were given
  }
  for (int64_t i = 0; first >= 0 && limited(s.a) && i < rows; ++i) {
    hide(s, room.before, first + i, keys, room.scores + i * padded);
  }
  transpose(rows, keys, room.scores, padded, room.weights, room.block);
  for (int64_t i = 0; i < rows; i += kLanes) {
    const F sum = exponentials<true, false>(room.weights + i, keys, room.block).sum;
    store(room.shares + i, sum > 0.0f ? 1.0f / sum : F{});
  }
}

// The sum of values by the weights of some queries, in room.result.
template <typename T>
VD_INLINE void sum_values(const Arguments& a, const Room<T>& room, const Stack& value, int64_t rows,
                          int64_t keys) {
  const Left p = over_rows<T>(room.weights, keys, room.block, rows, room.left);
  gemm<kPaired<T>>(rows, a.width, units_of<T>(keys), p.data, p.strides, value.data, value.stride,
                   room.result, room.width, false);
}

// What a task has gathered of its head number `head`.
template <typename T>
struct Head {
  const float *key, *value;
  float* query;
  int64_t step;  // between rows

  Head(const Room<T>& room, int64_t head, int64_t heads)
      : key(room.key + head * room.units),
        value(room.value + head * room.units),
        query(room.query + head * room.units),
        step(heads * room.units) {}
};

// Queries first .. first + rows.
template <typename T>
VD_INLINE Rows queries_of(const Sequence& s, const Room<T>& room, const Head<T>& own, int64_t first,
                          int64_t rows) {
  if (room.heads > 1) return {own.query + first * own.step, own.step};
  return rows_of<T>(s, s.a.query, first, rows, room.width, room.query);
}

template <typename T>
void prefix_forward(const Sequence& s, const Room<T>& room, const Stack& value, int64_t keys) {
  const Arguments& a = s.a;
  for (int64_t i = 0; i < a.prefixes; ++i) {
    load_units(s.at<T>(a.prefix_query, i), a.width, room.width, room.prefix);
    attend(s, room, {room.prefix, room.units}, -1, 1, keys);
    sum_values(a, room, value, 1, keys);
    store_row(room.result, a.width, room.shares[0],
              static_cast<T*>(a.prefix_out) + s.prefix_row(i) * a.width);
  }
}

template <typename T>
void forward_tasks(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  const Room<T> room(a, scratch);
  const int64_t width = room.width;
  T* const out = static_cast<T*>(a.out);
  const bool around = a.stream && can_stream(out, a.width);
  for (int64_t task = begin; task < end; ++task) {
    Sequence s(a, task, room.heads);
    const int64_t keys = a.prefixes + count_real(s, room.before), padded = round_up(keys, kLanes);
    const int64_t heads = smaller(room.heads, a.heads - s.h);
    gather<T>(s, a.prefix_key, a.key, room.before, heads, width, a.scale, room.key);
    gather<T>(s, a.prefix_value, a.value, room.before, heads, width, 1.0f, room.value);
    if (room.heads > 1) gather<T>(s, a.query, heads, width, room.query);
    for (int64_t head = 0; head < heads; ++head, ++s.h) {
      const Head<T> own(room, head, heads);
      transpose(keys, units_of<T>(a.width), own.key, own.step, room.key_columns, padded);
      const Stack value = stack_of<T>(own.value, own.step, keys, width, room.value_stack);
      for (int64_t first = 0; first < a.length; first += room.block) {
        const int64_t rows = smaller(room.block, a.length - first);
        attend(s, room, queries_of(s, room, own, first, rows), first, rows, keys);
        sum_values(a, room, value, rows, keys);
        for (int64_t i = 0; i < rows; ++i) {
          float* result = room.result + i * width;
          const GateRow gate = gate_of(s, first + i, room.gate);
          if (gate.whole) multiply(result, 1.0f, room.gate, width, result);
          write_row(result, a.width, room.shares[i] * gate.factor, out + s.row(first + i) * a.width,
                    around);
        }
      }
      if (a.prefix_out) prefix_forward(s, room, value, keys);
    }
  }
  finish_streams();
}

// Backward's own part of the scratch memory.
template <typename T>
struct GradientRoom : Room<T> {
  float *value_columns, *key_stack, *query_stack, *grad_stack;
  float *grad_key, *grad_value, *grad_weights, *columns, *grad_out, *grad_units, *zeros;
  float* grads;  // [L, heads, units] of the output, unless heads is 1

  GradientRoom(const Arguments& a, float* scratch)
      : Room<T>(a, scratch),
        value_columns(take(this->keys * this->units)),
        key_stack(take(this->paired(units_of<T>(this->keys) * this->width))),
        query_stack(take(this->paired(units_of<T>(this->block) * this->width))),
        grad_stack(take(this->paired(units_of<T>(this->block) * this->width))),
        grad_key(take(this->keys * this->width)),
        grad_value(take(this->keys * this->width)),
        grad_weights(take(this->keys * this->block)),
        columns(take(this->paired(this->keys * units_of<T>(this->block)))),
        grad_out(take(this->block * this->width)),
        grad_units(take(this->paired(this->block * this->units))),
        zeros(take(this->width)),
        grads(take(this->heads > 1 ? a.length * this->step : 0)) {}

  float* take(int64_t floats) { return this->carve.take(floats); }
};

int64_t backward_scratch(const Arguments& a) {
  int64_t floats = 0;
  by_dtype(a.dtype, [&](auto t) { floats = GradientRoom<decltype(t)>(a, nullptr).carve.used(); });
  return floats;
}

// From p (not yet normalised) and dL/d out in room.grad_out [rows,width]: adds to dL/dk and dL/dv, and
// gives dL/dq in room.result.
template <typename T>
void differentiate(const Arguments& a, const GradientRoom<T>& room, const Stack& key,
                   const Rows& query, int64_t rows, int64_t keys) {
  constexpr bool pairs = kPaired<T>;
  const int64_t width = room.width, block = room.block, padded = round_up(keys, kLanes);
  const float* grad_out = room.grad_out;
  int64_t grad_step = width;
  if constexpr (pairs) {
    for (int64_t i = 0; i < rows; ++i) {
      store_row(room.grad_out + i * width, width, 1.0f,
                reinterpret_cast<T*>(room.grad_units + i * room.units));
    }
    grad_out = room.grad_units;
    grad_step = room.units;
  }
  for (int64_t i = 0; i < rows; i += kLanes) {
    const F share = load(room.shares + i);
    float* p = room.weights + i;
    for (int64_t j = 0; j < keys; ++j) store(p + j * block, load(p + j * block) * share);
  }
  if (a.grad_value || a.grad_prefix_value) {
    const Left p = over_columns<T>(room.weights, keys, block, rows, room.columns);
    const Stack grad = stack_of<T>(grad_out, grad_step, rows, width, room.grad_stack);
    gemm<pairs>(keys, a.width, units_of<T>(rows), p.data, p.strides, grad.data, grad.stride,
                room.grad_value, width, true);
  }
  gemm<pairs>(rows, keys, units_of<T>(a.width), grad_out, {grad_step, 1}, room.value_columns, padded,
              room.scores, padded, false);
  transpose(rows, keys, room.scores, padded, room.grad_weights, block);
  for (int64_t i = 0; i < rows; i += kLanes) {
    const float* p = room.weights + i;
    float* grad = room.grad_weights + i;
    F mean = {};
    for (int64_t j = 0; j < keys; ++j) mean = fma(load(p + j * block), load(grad + j * block), mean);
    for (int64_t j = 0; j < keys; ++j) {
      store(grad + j * block, load(p + j * block) * (load(grad + j * block) - mean));
    }
  }
  if (a.grad_key || a.grad_prefix_key) {
    const Left grad = over_columns<T>(room.grad_weights, keys, block, rows, room.columns);
    const Stack q = stack_of<T>(query.data, query.stride, rows, width, room.query_stack);
    gemm<pairs>(keys, a.width, units_of<T>(rows), grad.data, grad.strides, q.data, q.stride,
                room.grad_key, width, true);
  }
  const Left grad = over_rows<T>(room.grad_weights, keys, block, rows, room.left);
  gemm<pairs>(rows, a.width, units_of<T>(keys), grad.data, grad.strides, key.data, key.stride,
              room.result, width, false);
}

// What dL/dq still lacks: keys were scaled when they were gathered, unless they were left as units.
template <typename T>
float key_factor(const Arguments& a) {
  return kPaired<T> ? a.scale : 1.0f;
}

template <typename T>
void backward_block(const Sequence& s, const GradientRoom<T>& room, const Head<T>& own,
                    const Stack& key, const Stack& value, int64_t head, int64_t first, int64_t rows,
                    int64_t keys, bool around) {
  const Arguments& a = s.a;
  const int64_t width = room.width;
  const Rows query = queries_of(s, room, own, first, rows);
  attend(s, room, query, first, rows, keys);
  if (a.grad_gate) {  // dL/d gate = dL/d out * (p v)
    sum_values(a, room, value, rows, keys);
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* grad = room.grad_out + i * width;
    if (room.heads > 1) {
      const float* units = room.grads + (first + i) * own.step + head * room.units;
      if constexpr (kPaired<T>) {
        load_row(reinterpret_cast<const T*>(units), width, grad);
      } else {
        load_row(units, width, grad);
      }
    } else {
      load_row(s.at<T>(a.grad_out, first + i), a.width, grad);
    }
    if (a.grad_gate) {
      const float* out = room.result + i * width;
      if (a.gate.width == 0) {
        F sum = {};
        for (int64_t d = 0; d < a.width; d += kLanes) sum = fma(load(grad + d), load(out + d), sum);
        a.grad_gate[s.row(first + i)] = reduce_add(sum) * room.shares[i];
      } else {
        float* to = a.grad_gate + s.row(first + i) * a.width;
        for (int64_t d = 0; d < a.width; ++d) to[d] = grad[d] * out[d] * room.shares[i];
      }
    }
    const GateRow gate = gate_of(s, first + i, room.gate);
    if (a.gate.data) multiply(grad, gate.factor, gate.whole ? room.gate : nullptr, width, grad);
  }
  differentiate(a, room, key, query, rows, keys);
  if (!a.grad_query) return;
  for (int64_t i = 0; i < rows; ++i) {
    write_row(room.result + i * width, a.width, key_factor<T>(a),
              static_cast<T*>(a.grad_query) + s.row(first + i) * a.width, around);
  }
}

template <typename T>
void prefix_backward(const Sequence& s, const GradientRoom<T>& room, const Stack& key,
                     int64_t keys) {
  const Arguments& a = s.a;
  const int64_t width = room.width;
  for (int64_t i = 0; i < a.prefixes; ++i) {
    const Rows query{room.prefix, room.units};
    load_units(s.at<T>(a.prefix_query, i), a.width, width, room.prefix);
    load_row(s.at<T>(a.grad_prefix_out, i), a.width, room.grad_out);
    attend(s, room, query, -1, 1, keys);
    differentiate(a, room, key, query, 1, keys);
    if (!a.grad_prefix_query) continue;
    store_row(room.result, a.width, key_factor<T>(a), a.grad_prefix_query + s.prefix_row(i) * a.width);
  }
}

template <typename T>
void backward_tasks(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  const GradientRoom<T> room(a, scratch);
  const int64_t width = room.width;
  for (int64_t d = 0; d < width; ++d) room.zeros[d] = 0.0f;
  const auto fits = [&](void* to) { return a.stream && can_stream(static_cast<T*>(to), a.width); };
  for (int64_t task = begin; task < end; ++task) {
    Sequence s(a, task, room.heads);
    const int64_t keys = a.prefixes + count_real(s, room.before), padded = round_up(keys, kLanes);
    const int64_t heads = smaller(room.heads, a.heads - s.h);
    gather<T>(s, a.prefix_key, a.key, room.before, heads, width, a.scale, room.key);
    gather<T>(s, a.prefix_value, a.value, room.before, heads, width, 1.0f, room.value);
    if (room.heads > 1) {
      gather<T>(s, a.query, heads, width, room.query);
      if (a.grad_out.data) gather<T>(s, a.grad_out, heads, width, room.grads);
    }
    for (int64_t head = 0; head < heads; ++head, ++s.h) {
      const Head<T> own(room, head, heads);
      transpose(keys, units_of<T>(a.width), own.key, own.step, room.key_columns, padded);
      transpose(keys, units_of<T>(a.width), own.value, own.step, room.value_columns, padded);
      const Stack key = stack_of<T>(own.key, own.step, keys, width, room.key_stack);
      const Stack value = stack_of<T>(own.value, own.step, keys, width, room.value_stack);
      for (int64_t i = 0; i < keys * width; ++i) room.grad_key[i] = room.grad_value[i] = 0.0f;
      for (int64_t first = 0; a.grad_out.data && first < a.length; first += room.block) {
        backward_block(s, room, own, key, value, head, first,
                       smaller(room.block, a.length - first), keys, fits(a.grad_query));
      }
      for (int64_t i = 0; !a.grad_out.data && a.grad_query && i < a.length; ++i) {
        store_row(room.zeros, a.width, 1.0f, static_cast<T*>(a.grad_query) + s.row(i) * a.width);
      }
      if (a.grad_prefix_out.data) prefix_backward(s, room, key, keys);

      const auto write = [&](const float* rows, float factor, float* prefix, void* tokens) {
        for (int64_t i = 0; prefix && i < a.prefixes; ++i) {
          store_row(rows + i * width, a.width, factor, prefix + s.prefix_row(i) * a.width);
        }
        const bool around = fits(tokens);
        for (int64_t i = 0; tokens && i < a.length; ++i) {
          const bool real = room.before[i] != room.before[i + 1];
          const float* row = real ? rows + (a.prefixes + room.before[i]) * width : room.zeros;
          write_row(row, a.width, factor, static_cast<T*>(tokens) + s.row(i) * a.width, around);
        }
      };
      write(room.grad_key, a.scale, a.grad_prefix_key, a.grad_key);
      write(room.grad_value, 1.0f, a.grad_prefix_value, a.grad_value);
    }
  }
  finish_streams();
}

void forward(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  by_dtype(a.dtype, [&](auto t) { forward_tasks<decltype(t)>(a, begin, end, scratch); });
}

void backward(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  by_dtype(a.dtype, [&](auto t) { backward_tasks<decltype(t)>(a, begin, end, scratch); });
}

}  // namespace

const spacetime_attention::Kernels spacetime_attention_kernels = {
    tasks, forward_scratch, forward, backward_scratch, backward};

}  // namespace VD_ISA
}  // namespace vd
