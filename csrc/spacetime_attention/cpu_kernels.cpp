// spacetime_attention for one instruction set: one sequence (a group's tokens of one head) at a time.
//
// Keys and values that may be seen are gathered into rows in the cache, prefixes first. A few queries
// at a time then see all of them: the softmax needs no second look, and nothing but the sequence's
// own rows is kept. Backward computes p again.
#include "spacetime_attention/cpu_kernels.h"

#include "common/carve.h"
#include "common/gemm.h"
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
  constexpr int64_t kFitting = 49152;  // floats in a second-level cache, with room for others
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

// Rows of some heads as floats times `factor`, each padded with zeros to `width`.
template <typename T>
VD_INLINE void load_heads(const T* from, int64_t head_stride, int64_t heads, int64_t n,
                          int64_t width, float factor, float* to) {
  if (head_stride == n && n == width) return load_row(from, heads * n, to, factor);
  for (int64_t h = 0; h < heads; ++h) {
    load_row(from + h * head_stride, n, to + h * width, factor);
  }
}

// What is gathered of the prefixes, then of the real tokens.
template <typename T>
VD_INLINE void gather(const Sequence& s, const Prefix& prefix, const Video& x,
                      const int32_t* before, int64_t heads, int64_t width, float factor,
                      float* rows) {
  const auto copy = [&](const T* from, int64_t head_stride) {
    load_heads(from, head_stride, heads, s.a.width, width, factor, rows);
    rows += heads * width;
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
  for (int64_t i = 0; i < s.a.length; ++i) {
    load_heads(s.at<T>(x, i), x.head, heads, s.a.width, width, 1.0f, rows + i * heads * width);
  }
}

// Some rows of queries as floats: where they lie if they can be read as they are, else a copy.
struct Rows {
  const float* data;
  int64_t stride;
};

template <typename T>
VD_INLINE Rows rows_of(const Sequence& s, const Video& x, int64_t first, int64_t rows,
                       int64_t width, float* room) {
  if constexpr (sizeof(T) == sizeof(float)) {
    const int64_t stride = s.a.axis == Axis::kTime ? x.frame : x.patch;
    const bool even = s.a.axis != Axis::kJoint || x.frame == s.a.patches * x.patch;
    if (even && s.a.width == width) return {s.at<float>(x, first), stride};
  }
  for (int64_t i = 0; i < rows; ++i) {
    load_row(s.at<T>(x, first + i), s.a.width, room + i * width);
  }
  return {room, width};
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
struct Room {
  int64_t width, keys, block;  // floats of a row, most keys (whole vectors), queries at a time
  int64_t heads, step;         // whose rows are gathered at once, and their floats
  Carver carve;
  float *key, *value;  // [keys, heads, width]
  float* query;        // [L, heads, width], or [block, width] where heads is 1
  float *key_columns, *scores, *weights, *result, *gate, *shares, *prefix;
  int32_t* before;

  Room(const Arguments& a, float* scratch)
      : width(round_up(a.width, kLanes)),
        keys(round_up(a.prefixes + a.length, kLanes)),
        block(block_of(keys)),
        heads(heads_at_once(a)),
        step(heads * width),
        carve(scratch),
        key(carve.take(keys * step)),
        value(carve.take(keys * step)),
        query(carve.take(queries(a) * step)),
        key_columns(carve.take(keys * width)),
        scores(carve.take(block * keys)),
        weights(carve.take(keys * block)),
        result(carve.take(block * width)),
        gate(carve.take(width)),
        shares(carve.take(block)),
        prefix(carve.take(width)),
        before(reinterpret_cast<int32_t*>(carve.take(a.length + 1))) {}

  int64_t queries(const Arguments& a) const { return heads > 1 ? larger(a.length, block) : block; }
};

int64_t forward_scratch(const Arguments& a) { return Room(a, nullptr).carve.used(); }

// Weights of some queries over all keys, not yet normalised: room.weights [keys, block], a query to a
// column. room.shares makes each sum to 1. `first` is the first query's token, or negative for
// prefixes, which see everything.
inline void attend(const Sequence& s, const Room& room, const Rows& query, int64_t first,
                   int64_t rows, int64_t keys) {
  const int64_t padded = round_up(keys, kLanes);
  gemm(rows, keys, s.a.width, query.data, {query.stride, 1}, room.key_columns, padded, room.scores,
       padded, false);
  for (int64_t i = 0; first >= 0 && limited(s.a) && i < rows; ++i) {
    hide(s, room.before, first + i, keys, room.scores + i * padded);
  }
  transpose(rows, keys, room.scores, padded, room.weights, room.block);
  for (int64_t i = 0; i < rows; i += kLanes) {
    const F sum = exponentials<true, false>(room.weights + i, keys, room.block).sum;
    store(room.shares + i, sum > 0.0f ? 1.0f / sum : F{});
  }
}

// What a task has gathered of its head number `head`.
struct Head {
  const float *key, *value;
  float* query;
  int64_t step;  // between rows

  Head(const Room& room, int64_t head, int64_t heads)
      : key(room.key + head * room.width),
        value(room.value + head * room.width),
        query(room.query + head * room.width),
        step(heads * room.width) {}
};

// Queries first .. first + rows.
template <typename T>
VD_INLINE Rows queries_of(const Sequence& s, const Room& room, const Head& own, int64_t first,
                          int64_t rows) {
  if (room.heads > 1) return {own.query + first * own.step, own.step};
  return rows_of<T>(s, s.a.query, first, rows, room.width, room.query);
}

template <typename T>
void prefix_forward(const Sequence& s, const Room& room, const Head& own, int64_t keys) {
  const Arguments& a = s.a;
  for (int64_t i = 0; i < a.prefixes; ++i) {
    load_row(s.at<T>(a.prefix_query, i), a.width, room.prefix);
    attend(s, room, {room.prefix, room.width}, -1, 1, keys);
    gemm(1, a.width, keys, room.weights, {1, room.block}, own.value, own.step, room.result,
         room.width, false);
    store_row(room.result, a.width, room.shares[0],
              static_cast<T*>(a.prefix_out) + s.prefix_row(i) * a.width);
  }
}

template <typename T>
void forward_tasks(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  const Room room(a, scratch);
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
      const Head own(room, head, heads);
      transpose(keys, a.width, own.key, own.step, room.key_columns, padded);
      for (int64_t first = 0; first < a.length; first += room.block) {
        const int64_t rows = smaller(room.block, a.length - first);
        attend(s, room, queries_of<T>(s, room, own, first, rows), first, rows, keys);
        gemm(rows, a.width, keys, room.weights, {1, room.block}, own.value, own.step, room.result,
             width, false);
        for (int64_t i = 0; i < rows; ++i) {
          float* result = room.result + i * width;
          const GateRow gate = gate_of(s, first + i, room.gate);
          if (gate.whole) multiply(result, 1.0f, room.gate, width, result);
          write_row(result, a.width, room.shares[i] * gate.factor, out + s.row(first + i) * a.width,
                    around);
        }
      }
      if (a.prefix_out) prefix_forward<T>(s, room, own, keys);
    }
  }
  finish_streams();
}

// Backward's own part of the scratch memory.
struct GradientRoom : Room {
  float *value_columns, *grad_key, *grad_value, *grad_weights, *grad_out, *zeros;
  float* grads;  // [L, heads, width] of the output, unless heads is 1

  GradientRoom(const Arguments& a, float* scratch)
      : Room(a, scratch),
        value_columns(carve.take(keys * width)),
        grad_key(carve.take(keys * width)),
        grad_value(carve.take(keys * width)),
        grad_weights(carve.take(keys * block)),
        grad_out(carve.take(block * width)),
        zeros(carve.take(width)),
        grads(carve.take(heads > 1 ? a.length * heads * width : 0)) {}
};

int64_t backward_scratch(const Arguments& a) { return GradientRoom(a, nullptr).carve.used(); }

// From p (not yet normalised) and dL/d out in room.grad_out [rows,width]: adds to dL/dk and dL/dv, and
// gives dL/dq in room.result.
inline void differentiate(const Arguments& a, const GradientRoom& room, const Head& own,
                          const Rows& query, int64_t rows, int64_t keys) {
  const int64_t width = room.width, block = room.block, padded = round_up(keys, kLanes);
  for (int64_t i = 0; i < rows; i += kLanes) {
    const F share = load(room.shares + i);
    float* p = room.weights + i;
    for (int64_t j = 0; j < keys; ++j) store(p + j * block, load(p + j * block) * share);
  }
  if (a.grad_value || a.grad_prefix_value) {
    gemm(keys, a.width, rows, room.weights, {block, 1}, room.grad_out, width, room.grad_value, width,
         true);
  }
  gemm(rows, keys, a.width, room.grad_out, {width, 1}, room.value_columns, padded, room.scores,
       padded, false);
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
    gemm(keys, a.width, rows, room.grad_weights, {block, 1}, query.data, query.stride, room.grad_key,
         width, true);
  }
  gemm(rows, a.width, keys, room.grad_weights, {1, block}, own.key, own.step, room.result, width,
       false);
}

template <typename T>
void backward_block(const Sequence& s, const GradientRoom& room, const Head& own, int64_t head,
                    int64_t first, int64_t rows, int64_t keys, bool around) {
  const Arguments& a = s.a;
  const int64_t width = room.width;
  const Rows query = queries_of<T>(s, room, own, first, rows);
  attend(s, room, query, first, rows, keys);
  if (a.grad_gate) {  // dL/d gate = dL/d out * (p v)
    gemm(rows, a.width, keys, room.weights, {1, room.block}, own.value, own.step, room.result, width,
         false);
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* grad = room.grad_out + i * width;
    if (room.heads > 1) {
      load_row(room.grads + (first + i) * own.step + head * width, width, grad);
    } else {
      load_row(s.at<T>(a.grad_out, first + i), a.width, grad);
    }
    if (a.grad_gate) {
      const float* out = room.result + i * width;
      if (a.gate.width == 0) {
        F sum = {};
        for (int64_t d = 0; d < width; d += kLanes) sum = fma(load(grad + d), load(out + d), sum);
        a.grad_gate[s.row(first + i)] = reduce_add(sum) * room.shares[i];
      } else {
        float* to = a.grad_gate + s.row(first + i) * a.width;
        for (int64_t d = 0; d < a.width; ++d) to[d] = grad[d] * out[d] * room.shares[i];
      }
    }
    const GateRow gate = gate_of(s, first + i, room.gate);
    if (a.gate.data) multiply(grad, gate.factor, gate.whole ? room.gate : nullptr, width, grad);
  }
  differentiate(a, room, own, query, rows, keys);
  if (!a.grad_query) return;
  for (int64_t i = 0; i < rows; ++i) {
    write_row(room.result + i * width, a.width, 1.0f,
              static_cast<T*>(a.grad_query) + s.row(first + i) * a.width, around);
  }
}

template <typename T>
void prefix_backward(const Sequence& s, const GradientRoom& room, const Head& own, int64_t keys) {
  const Arguments& a = s.a;
  for (int64_t i = 0; i < a.prefixes; ++i) {
    const Rows query{room.prefix, room.width};
    load_row(s.at<T>(a.prefix_query, i), a.width, room.prefix);
    load_row(s.at<T>(a.grad_prefix_out, i), a.width, room.grad_out);
    attend(s, room, query, -1, 1, keys);
    differentiate(a, room, own, query, 1, keys);
    if (!a.grad_prefix_query) continue;
    store_row(room.result, a.width, 1.0f, a.grad_prefix_query + s.prefix_row(i) * a.width);
  }
}

template <typename T>
void backward_tasks(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  const GradientRoom room(a, scratch);
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
      const Head own(room, head, heads);
      transpose(keys, a.width, own.key, own.step, room.key_columns, padded);
      transpose(keys, a.width, own.value, own.step, room.value_columns, padded);
      for (int64_t i = 0; i < keys * width; ++i) room.grad_key[i] = room.grad_value[i] = 0.0f;
      for (int64_t first = 0; a.grad_out.data && first < a.length; first += room.block) {
        backward_block<T>(s, room, own, head, first, smaller(room.block, a.length - first), keys,
                          fits(a.grad_query));
      }
      for (int64_t i = 0; !a.grad_out.data && a.grad_query && i < a.length; ++i) {
        store_row(room.zeros, a.width, 1.0f, static_cast<T*>(a.grad_query) + s.row(i) * a.width);
      }
      if (a.grad_prefix_out.data) prefix_backward<T>(s, room, own, keys);

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
