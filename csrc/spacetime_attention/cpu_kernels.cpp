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
#include "spacetime_attention/few.h"
#include "spacetime_attention/sequence.h"

namespace vd {
namespace VD_ISA {
namespace spacetime_attention {
namespace {

// Queries that are computed together, whole vectors of them: their scores stay in the nearest caches.
int64_t block_of(int64_t keys) { return keys <= 512 ? 64 : 32; }

// A sequence's queries: its tokens, then the prefixes' own. Either may be left out.
struct Queries {
  int64_t tokens, prefixes;
  int64_t count() const { return tokens + prefixes; }
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

// Rows of the prefixes, then of the real tokens, as units times `factor`, padded with zeros to `width`
// elements.
template <typename T>
VD_INLINE void gather(const Sequence& s, const Prefix& prefix, const Video& x,
                      const int32_t* before, int64_t width, float factor, float* rows) {
  const int64_t step = units_of<T>(width);
  for (int64_t i = 0; i < s.a.prefixes; ++i, rows += step) {
    load_units(s.at<T>(prefix, i), s.a.width, width, rows, factor);
  }
  const Walk<T> walk(s, x);
  for (int64_t i = 0; i < s.a.length; ++i) {
    if (before[i] == before[i + 1]) continue;
    load_units(walk[i], s.a.width, width, rows, factor);
    rows += step;
  }
}

// Some rows of units: where they lie if they can be read as they are, else a copy. Either way there
// is something to read up to a whole number of vectors of rows.
struct Rows {
  const float* data;
  int64_t stride;
};

// Of the queries from `first` on what `x` holds of tokens and `prefix` of prefixes.
template <typename T>
VD_INLINE Rows rows_of(const Sequence& s, const Video& x, const Prefix& prefix,
                       const Queries& queries, int64_t first, int64_t rows, int64_t width,
                       float* room) {
  constexpr int64_t each = sizeof(float) / sizeof(T);  // elements of a unit
  const int64_t tokens = smaller(rows, queries.tokens - first);
  if constexpr (each == 1 || kPaired<T>) {
    // Frames lie far apart, often by a multiple of what makes them share the same few cache lines.
    const bool even = s.a.axis == Axis::kSpace ||
                      (s.a.axis == Axis::kJoint && x.frame == s.a.patches * x.patch);
    if (even && x.patch % each == 0 && s.a.width == width && tokens == rows &&
        rows % kLanes == 0) {
      return {reinterpret_cast<const float*>(s.at<T>(x, first)), x.patch / each};
    }
  }
  const int64_t step = units_of<T>(width);
  const Walk<T> walk(s, x);
  for (int64_t i = 0; i < tokens; ++i) {
    load_units(walk[first + i], s.a.width, width, room + i * step);
  }
  for (int64_t i = larger(0, tokens); i < rows; ++i) {
    load_units(s.at<T>(prefix, first + i - queries.tokens), s.a.width, width, room + i * step);
  }
  return {room, step};
}

// What every pass needs of the scratch memory.
template <typename T>
struct Room {
  int64_t width, keys, block;  // elements of a row, most keys (whole vectors), queries at a time
  int64_t units;               // of a row
  Carver carve;
  float *key, *value;  // [keys, units]
  float* query;        // [block, units]
  float *query_columns, *value_stack, *weights, *left, *result, *gate, *shares;
  int32_t* before;

  Room(const Arguments& a, float* scratch)
      : width(round_up(a.width, row_step<T>)),
        keys(round_up(a.prefixes + a.length, stack_step<T>)),
        block(block_of(keys)),
        units(units_of<T>(width)),
        carve(scratch),
        key(carve.take(keys * units)),
        value(carve.take(keys * units)),
        query(carve.take(block * units)),
        query_columns(carve.take(block * units)),
        value_stack(carve.take(paired(units_of<T>(keys) * width))),
        weights(carve.take(keys * block)),
        left(carve.take(paired(units_of<T>(keys) * block))),
        result(carve.take(block * width)),
        gate(carve.take(width)),
        shares(carve.take(block)),
        before(reinterpret_cast<int32_t*>(carve.take(a.length + 1))) {}

  static int64_t paired(int64_t floats) { return kPaired<T> ? floats : 0; }
};

int64_t forward_scratch(const Arguments& a) {
  if (are_few(a)) return few_scratch(a);
  int64_t floats = 0;
  by_dtype(a.dtype, [&](auto t) { floats = Room<decltype(t)>(a, nullptr).carve.used(); });
  return floats;
}

// Weights of some queries over all keys, not yet normalised: room.weights [keys, block], a query to a
// column. room.shares makes each sum to 1.
template <typename T>
void attend(const Sequence& s, const Room<T>& room, const Rows& query, const Queries& queries,
            int64_t first, int64_t rows, int64_t keys) {
  const int64_t block = room.block;
  transpose(rows, units_of<T>(s.a.width), query.data, query.stride, room.query_columns, block);
  gemm<kPaired<T>>(keys, rows, units_of<T>(s.a.width), room.key, {room.units, 1},
                   room.query_columns, block, room.weights, block, false);
  for (int64_t i = 0; kPaired<T> && i < rows; i += kLanes) {  // keys are as they were given
    float* scores = room.weights + i;
    for (int64_t j = 0; j < keys; ++j) store(scores + j * block, load(scores + j * block) * s.a.scale);
  }
  for (int64_t i = first; limited(s.a) && i < smaller(first + rows, queries.tokens); ++i) {
    hide(s, room.before, i, keys, room.weights + i - first, block);
  }
  for (int64_t i = 0; i < rows; i += kLanes) {
    const F sum = exponentials<true, false>(room.weights + i, keys, block).sum;
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

template <typename T>
void forward_tasks(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  const Room<T> room(a, scratch);
  const int64_t width = room.width, heads = heads_at_once(a);
  const Queries queries{a.length, a.prefix_out ? a.prefixes : 0};
  const int64_t blocks = (queries.count() + room.block - 1) / room.block;
  T* const out = static_cast<T*>(a.out);
  const bool around = a.stream && can_stream(out, a.width);
  for (int64_t task = begin; task < end; ++task) {
    Sequence s(a, task, heads);
    const int64_t end_head = smaller(s.h + heads, a.heads);
    const Ahead<T> ahead(a, task, end, heads, (end_head - s.h) * blocks);
    const int64_t keys = a.prefixes + count_real(s, room.before);
    for (int64_t part = 0; s.h < end_head; ++s.h) {
      gather<T>(s, a.prefix_key, a.key, room.before, width, a.scale, room.key);
      gather<T>(s, a.prefix_value, a.value, room.before, width, 1.0f, room.value);
      const Stack value = stack_of<T>(room.value, room.units, keys, width, room.value_stack);
      for (int64_t first = 0; first < queries.count(); first += room.block, ++part) {
        const int64_t rows = smaller(room.block, queries.count() - first);
        ahead.fetch_part(a.query, part);
        const Rows query =
            rows_of<T>(s, a.query, a.prefix_query, queries, first, rows, width, room.query);
        attend(s, room, query, queries, first, rows, keys);
        ahead.fetch_part(a.key, part);
        sum_values(a, room, value, rows, keys);
        ahead.fetch_part(a.value, part);
        ahead.fetch_part(a.gate, part);
        for (int64_t i = 0; i < rows; ++i) {
          float* result = room.result + i * width;
          if (const int64_t prefix = first + i - queries.tokens; prefix >= 0) {
            store_row(result, a.width, room.shares[i],
                      static_cast<T*>(a.prefix_out) + s.prefix_row(prefix) * a.width);
            continue;
          }
          const GateRow gate = gate_of(s, first + i, room.gate);
          if (gate.whole) multiply(result, 1.0f, room.gate, width, result);
          write_row(result, a.width, room.shares[i] * gate.factor, out + s.row(first + i) * a.width,
                    around);
        }
      }
    }
  }
  finish_streams();
}

// Backward's own part of the scratch memory.
template <typename T>
struct GradientRoom : Room<T> {
  float *grad_columns, *key_stack, *query_stack, *grad_stack;
  float *grad_key, *grad_value, *grad_weights, *columns, *grad_out, *grad_units, *zeros;

  GradientRoom(const Arguments& a, float* scratch)
      : Room<T>(a, scratch),
        grad_columns(take(this->block * this->units)),
        key_stack(take(this->paired(units_of<T>(this->keys) * this->width))),
        query_stack(take(this->paired(units_of<T>(this->block) * this->width))),
        grad_stack(take(this->paired(units_of<T>(this->block) * this->width))),
        grad_key(take(this->keys * this->width)),
        grad_value(take(this->keys * this->width)),
        grad_weights(take(this->keys * this->block)),
        columns(take(this->paired(this->keys * units_of<T>(this->block)))),
        grad_out(take(this->block * this->width)),
        grad_units(kPaired<T> ? take(this->block * this->units) : grad_out),
        zeros(take(this->width)) {}

  float* take(int64_t floats) { return this->carve.take(floats); }
};

int64_t backward_scratch(const Arguments& a) {
  if (are_few(a)) return few_scratch(a);
  int64_t floats = 0;
  by_dtype(a.dtype, [&](auto t) { floats = GradientRoom<decltype(t)>(a, nullptr).carve.used(); });
  return floats;
}

// From p (not yet normalised) and the gradient of the sum of values by it: gives dL/dq in room.result,
// and dL/dk and dL/dv, or adds to them.
template <typename T>
void differentiate(const Arguments& a, const GradientRoom<T>& room, const Stack& key,
                   const Rows& query, const Rows& grad_sum, int64_t rows, int64_t keys, bool add) {
  constexpr bool pairs = kPaired<T>;
  const int64_t width = room.width, block = room.block;
  for (int64_t i = 0; i < rows; i += kLanes) {
    const F share = load(room.shares + i);
    float* p = room.weights + i;
    for (int64_t j = 0; j < keys; ++j) store(p + j * block, load(p + j * block) * share);
  }
  if (a.grad_value || a.grad_prefix_value) {
    const Left p = over_columns<T>(room.weights, keys, block, rows, room.columns);
    const Stack grad = stack_of<T>(grad_sum.data, grad_sum.stride, rows, width, room.grad_stack);
    gemm<pairs>(keys, a.width, units_of<T>(rows), p.data, p.strides, grad.data, grad.stride,
                room.grad_value, width, add);
  }
  transpose(rows, units_of<T>(a.width), grad_sum.data, grad_sum.stride, room.grad_columns, block);
  gemm<pairs>(keys, rows, units_of<T>(a.width), room.value, {room.units, 1}, room.grad_columns,
              block, room.grad_weights, block, false);
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
                room.grad_key, width, add);
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

// Rows of the gradient of what attention alone returns: dL/d out, through the gate where there is one.
// Writes the gate's own, dL/d out * (p v), with p v in room.result.
template <typename T>
Rows through_gate(const Sequence& s, const GradientRoom<T>& room, const Queries& queries,
                  int64_t first, int64_t rows) {
  const Arguments& a = s.a;
  const int64_t width = room.width;
  if (!a.gate.data) {
    return rows_of<T>(s, a.grad_out, a.grad_prefix_out, queries, first, rows, width,
                      room.grad_units);
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* grad = room.grad_out + i * width;
    const int64_t token = first + i;
    if (token >= queries.tokens) {
      load_row(s.at<T>(a.grad_prefix_out, token - queries.tokens), a.width, grad);
    } else {
      load_row(s.at<T>(a.grad_out, token), a.width, grad);
      if (a.grad_gate) {
        const float* out = room.result + i * width;
        if (a.gate.width == 0) {
          F sum = {};
          for (int64_t d = 0; d < a.width; d += kLanes) sum = fma(load(grad + d), load(out + d), sum);
          a.grad_gate[s.row(token)] = reduce_add(sum) * room.shares[i];
        } else {
          float* to = a.grad_gate + s.row(token) * a.width;
          for (int64_t d = 0; d < a.width; ++d) to[d] = grad[d] * out[d] * room.shares[i];
        }
      }
      const GateRow gate = gate_of(s, token, room.gate);
      multiply(grad, gate.factor, gate.whole ? room.gate : nullptr, width, grad);
    }
    if constexpr (kPaired<T>) {
      for (int64_t d = round_up(a.width, kLanes); d < width; d += kLanes) store(grad + d, F{});
      store_row(grad, width, 1.0f, reinterpret_cast<T*>(room.grad_units + i * room.units));
    }
  }
  return {room.grad_units, room.units};
}

template <typename T>
void backward_block(const Sequence& s, const GradientRoom<T>& room, const Ahead<T>& ahead,
                    int64_t part, const Stack& key, const Stack& value, const Queries& queries,
                    int64_t first, int64_t rows, int64_t keys, bool around) {
  const Arguments& a = s.a;
  const int64_t width = room.width;
  ahead.fetch_part(a.query, part);
  const Rows query =
      rows_of<T>(s, a.query, a.prefix_query, queries, first, rows, width, room.query);
  attend(s, room, query, queries, first, rows, keys);
  ahead.fetch_part(a.key, part);
  if (a.grad_gate) sum_values(a, room, value, rows, keys);
  const Rows grad = through_gate(s, room, queries, first, rows);
  ahead.fetch_part(a.value, part);
  differentiate(a, room, key, query, grad, rows, keys, first > 0);
  ahead.fetch_part(a.grad_out, part);
  ahead.fetch_part(a.gate, part);
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = room.result + i * width;
    const int64_t token = first + i;
    if (token < queries.tokens && a.grad_query) {
      write_row(row, a.width, key_factor<T>(a),
                static_cast<T*>(a.grad_query) + s.row(token) * a.width, around);
    } else if (token >= queries.tokens && a.grad_prefix_query) {
      store_row(row, a.width, key_factor<T>(a),
                a.grad_prefix_query + s.prefix_row(token - queries.tokens) * a.width);
    }
  }
}

template <typename T>
void backward_tasks(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  const GradientRoom<T> room(a, scratch);
  const int64_t width = room.width, heads = heads_at_once(a);
  // Those that a gradient reaches.
  const Queries queries{a.grad_out.data ? a.length : 0, a.grad_prefix_out.data ? a.prefixes : 0};
  const int64_t blocks = (queries.count() + room.block - 1) / room.block;
  for (int64_t d = 0; d < width; ++d) room.zeros[d] = 0.0f;
  const auto fits = [&](void* to) { return a.stream && can_stream(static_cast<T*>(to), a.width); };
  for (int64_t task = begin; task < end; ++task) {
    Sequence s(a, task, heads);
    const int64_t end_head = smaller(s.h + heads, a.heads);
    const Ahead<T> ahead(a, task, end, heads, (end_head - s.h) * blocks);
    const int64_t keys = a.prefixes + count_real(s, room.before);
    for (int64_t part = 0; s.h < end_head; ++s.h) {
      gather<T>(s, a.prefix_key, a.key, room.before, width, a.scale, room.key);
      gather<T>(s, a.prefix_value, a.value, room.before, width, 1.0f, room.value);
      const Stack key = stack_of<T>(room.key, room.units, keys, width, room.key_stack);
      Stack value{};
      if (a.grad_gate) value = stack_of<T>(room.value, room.units, keys, width, room.value_stack);
      // The first block sets what others add to.
      for (int64_t i = 0; queries.count() == 0 && i < keys * width; ++i) {
        room.grad_key[i] = room.grad_value[i] = 0.0f;
      }
      for (int64_t first = 0; first < queries.count(); first += room.block, ++part) {
        backward_block(s, room, ahead, part, key, value, queries, first,
                       smaller(room.block, queries.count() - first), keys, fits(a.grad_query));
      }
      for (int64_t i = 0; !a.grad_out.data && a.grad_query && i < a.length; ++i) {
        store_row(room.zeros, a.width, 1.0f, static_cast<T*>(a.grad_query) + s.row(i) * a.width);
      }

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
  const Tiles tiles(a.dtype);
  by_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (are_few(a)) return forward_few<T>(a, begin, end, scratch);
    forward_tasks<T>(a, begin, end, scratch);
  });
}

void backward(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  const Tiles tiles(a.dtype);
  by_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (are_few(a) && a.grad_out.data) return backward_few<T>(a, begin, end, scratch);
    backward_tasks<T>(a, begin, end, scratch);
  });
}

}  // namespace
}  // namespace spacetime_attention

const vd::spacetime_attention::Kernels spacetime_attention_kernels = {
    spacetime_attention::tasks, spacetime_attention::forward_scratch, spacetime_attention::forward,
    spacetime_attention::backward_scratch, spacetime_attention::backward};

}  // namespace VD_ISA
}  // namespace vd
