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
int64_t block_of(const Arguments& a, int64_t keys) {
  return smaller(keys <= 512 ? 64 : 32, round_up(a.prefixes + a.length, kLanes));
}

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
                      const int32_t* before, int64_t width, float factor, float* rows,
                      Ahead* ahead) {
  const int64_t step = units_of<T>(width);
  for (int64_t i = 0; i < s.a.prefixes; ++i, rows += step) {
    load_units(s.at<T>(prefix, i), s.a.width, width, rows, factor);
  }
  const Walk<T> walk(s, x);
  for (int64_t i = 0; i < s.a.length; ++i) {
    ahead->step_of_row<T>(i);
    if (before[i] == before[i + 1]) continue;
    load_units(walk[i], s.a.width, width, rows, factor);
    rows += step;
  }
}

// Some rows of units: where they lie if they can be read as they are, else a copy.
struct Rows {
  const float* data;
  int64_t stride;
};

// Whether a sequence's tokens can be read where they lie. Frames lie far apart, often by a multiple of
// what makes them share the same few cache lines: those of floats, which are read more than once, are
// copied.
template <typename T>
VD_INLINE bool in_place(const Sequence& s, const Walk<T>& walk, int64_t width) {
  constexpr int64_t each = sizeof(float) / sizeof(T);  // elements of a unit
  if constexpr (each != 1 && !kPaired<T>) return false;
  if (s.a.axis == Axis::kTime && !kPaired<T>) return false;
  return walk.even() && walk.step() % each == 0 && s.a.width == width;
}

template <typename T>
VD_INLINE Rows rows_at(const Walk<T>& walk, int64_t first) {
  return {reinterpret_cast<const float*>(walk[first]),
          walk.step() / static_cast<int64_t>(sizeof(float) / sizeof(T))};
}

// All keys, or values: as `gather` would copy them. `tiled`: as rows of tiles, which are read whole.
template <typename T>
VD_INLINE Rows rows_of_keys(const Sequence& s, const Prefix& prefix, const Video& x,
                            const int32_t* before, int64_t keys, int64_t width, float factor,
                            bool tiled, float* room, Ahead* ahead) {
  const Walk<T> walk(s, x);
  if (kPaired<T> && in_place(s, walk, width) && keys == s.a.length && s.a.prefixes == 0 &&
      (!tiled || (kTiled<T> && keys % kTileSize == 0))) {
    return rows_at(walk, 0);
  }
  gather<T>(s, prefix, x, before, width, factor, room, ahead);
  return {room, units_of<T>(width)};
}

// Zeros from row `rows` on, up to a whole number of vectors of rows: they are multiplied, too, and what
// an earlier call left there may be denormal numbers, which take some processors long.
VD_INLINE void clear_rest(float* room, int64_t rows, int64_t step) {
  for (int64_t i = rows * step; i < round_up(rows, kLanes) * step; i += kLanes) store(room + i, F{});
}

// Of the queries from `first` on what `x` holds of tokens and `prefix` of prefixes, and zeros up to a
// whole number of vectors of rows.
template <typename T>
VD_INLINE Rows rows_of(const Sequence& s, const Video& x, const Prefix& prefix,
                       const Queries& queries, int64_t first, int64_t rows, int64_t width,
                       float* room, Ahead* ahead) {
  const int64_t tokens = smaller(rows, queries.tokens - first);
  const Walk<T> walk(s, x);
  if (in_place(s, walk, width) && tokens == rows && rows % kLanes == 0) return rows_at(walk, first);
  const int64_t step = units_of<T>(width);
  for (int64_t i = 0; i < tokens; ++i) {
    ahead->step_of_row<T>(i);
    load_units(walk[first + i], s.a.width, width, room + i * step);
  }
  for (int64_t i = larger(0, tokens); i < rows; ++i) {
    load_units(s.at<T>(prefix, first + i - queries.tokens), s.a.width, width, room + i * step);
  }
  clear_rest(room, rows, step);
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
        block(block_of(a, keys)),
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
  by_own_dtype(a.dtype, [&](auto t) { floats = Room<decltype(t)>(a, nullptr).carve.used(); });
  return floats;
}

// Puts the rows of some queries into columns, room.query_columns.
template <typename T>
VD_INLINE void turn_queries(const Arguments& a, const Room<T>& room, const Rows& query, int64_t rows) {
  transpose(rows, units_of<T>(a.width), query.data, query.stride, room.query_columns, room.block);
}

// Scores of queries that were turned, by all keys: room.weights [keys, block], a query to a column.
// In pairs they lack the factor a.scale, as keys are as they were given.
template <typename T>
VD_INLINE void score(const Arguments& a, const Room<T>& room, const Rows& key, int64_t rows,
                     int64_t keys) {
  gemm<kPaired<T>>(keys, rows, units_of<T>(a.width), key.data, {key.stride, 1}, room.query_columns,
                   room.block, room.weights, room.block, false);
}

// Scores become weights, not yet normalised. room.shares makes each query's sum to 1.
template <typename T>
void weigh(const Sequence& s, const Room<T>& room, const Queries& queries, int64_t first,
           int64_t rows, int64_t keys) {
  const int64_t block = room.block;
  float scale = kPaired<T> ? s.a.scale : 1.0f;
  if (limited(s.a)) {
    for (int64_t i = 0; kPaired<T> && i < rows; i += kLanes) {
      float* scores = room.weights + i;
      for (int64_t j = 0; j < keys; ++j) store(scores + j * block, load(scores + j * block) * scale);
    }
    scale = 1.0f;
    for (int64_t i = first; i < smaller(first + rows, queries.tokens); ++i) {
      hide(s, room.before, i, keys, room.weights + i - first, block);
    }
  }
  for (int64_t i = 0; i < rows; i += kLanes) {
    const F sum = exponentials<true, false>(room.weights + i, keys, block, scale).sum;
    store(room.shares + i, sum > 0.0f ? 1.0f / sum : F{});
  }
}

// The sum of values by weights that were put in order for it, in room.result.
template <typename T>
VD_INLINE void sum_values(const Arguments& a, const Room<T>& room, const Left& weights,
                          const Stack& value, int64_t rows, int64_t keys) {
  gemm<kPaired<T>>(rows, a.width, units_of<T>(keys), weights.data, weights.strides, value.data,
                   value.stride, room.result, room.width, false);
}

// Writes room.result, normalised and through the gate, to where the results of some queries belong.
template <typename T>
VD_INLINE void write_out(const Sequence& s, const Room<T>& room, const Queries& queries,
                         int64_t first, int64_t rows, Ahead* ahead) {
  const Arguments& a = s.a;
  T* const out = static_cast<T*>(a.out);
  const bool around = a.stream && can_stream(out, a.width);
  for (int64_t i = 0; i < rows; ++i) {
    ahead->step_of_row<T>(i);
    float* result = room.result + i * room.width;
    if (const int64_t prefix = first + i - queries.tokens; prefix >= 0) {
      store_row(result, a.width, room.shares[i],
                static_cast<T*>(a.prefix_out) + s.prefix_row(prefix) * a.width);
      continue;
    }
    const GateRow gate = gate_of(s, first + i, room.gate);
    if (gate.whole) multiply(result, 1.0f, room.gate, room.width, result);
    write_row(result, a.width, room.shares[i] * gate.factor, out + s.row(first + i) * a.width, around);
  }
}

constexpr int64_t kBetween = 8;  // steps of Ahead between two products
template <typename T>
constexpr int64_t kCopies = kPaired<T> ? 0 : 1;  // what pairs can be read as they lie

// What the next product needs is put in order between this one's parts: so no product waits for what
// was written just before it.
template <typename T>
void forward_tasks(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  const Room<T> room(a, scratch);
  const int64_t width = room.width, heads = heads_at_once(a);
  const Queries queries{a.length, a.prefix_out ? a.prefixes : 0};
  const int64_t blocks = (queries.count() + room.block - 1) / room.block;
  for (int64_t task = begin; task < end; ++task) {
    Sequence s(a, task, heads), next = s;
    const int64_t first_head = s.h, own_heads = smaller(s.h + heads, a.heads) - s.h;
    const int64_t items = own_heads * blocks;
    // A step for each row that is copied or written, and a few between products.
    const int64_t rows_of_head = queries.count() + kCopies<T> * (queries.count() + 2 * a.length);
    Ahead ahead = ahead_of<T>(a, task, end, heads,
                              own_heads * (blocks * 4 * kBetween + rows_of_head));
    const int64_t keys = a.prefixes + count_real(s, room.before);
    const auto first_of = [&](int64_t item) { return item % blocks * room.block; };
    const auto rows_from = [&](int64_t first) { return smaller(room.block, queries.count() - first); };
    Rows key{};
    const auto prepare_scores = [&](int64_t item) {
      const int64_t first = first_of(item), rows = rows_from(first);
      next.h = first_head + item / blocks;
      if (first == 0) {
        key = rows_of_keys<T>(next, a.prefix_key, a.key, room.before, keys, width, a.scale, true,
                              room.key, &ahead);
      }
      turn_queries(a, room, rows_of<T>(next, a.query, a.prefix_query, queries, first, rows, width,
                                       room.query, &ahead), rows);
    };
    Stack value{};
    const auto prepare_values = [&](int64_t item) {
      if (first_of(item) != 0) return;
      const Rows rows = rows_of_keys<T>(next, a.prefix_value, a.value, room.before, keys, width,
                                        1.0f, false, room.value, &ahead);
      value = stack_of<T>(rows.data, rows.stride, keys, width, room.value_stack);
    };
    if (items == 0) continue;
    prepare_scores(0);
    prepare_values(0);
    for (int64_t item = 0; item < items; ++item) {
      const int64_t first = first_of(item), rows = rows_from(first);
      s.h = next.h;
      score(a, room, key, rows, keys);
      ahead.step(kBetween);
      weigh(s, room, queries, first, rows, keys);
      ahead.step(kBetween);
      const Left weights = over_rows<T>(room.weights, keys, room.block, rows, room.left);
      if (item + 1 < items) prepare_scores(item + 1);
      ahead.step(kBetween);
      sum_values(a, room, weights, value, rows, keys);
      if (item + 1 < items) prepare_values(item + 1);
      ahead.step(kBetween);
      write_out(s, room, queries, first, rows, &ahead);
    }
  }
  finish_streams();
}

// Backward's own part of the scratch memory.
template <typename T>
struct GradientRoom : Room<T> {
  float *grad_columns, *key_stack, *query_stack, *grad_stack;
  float *grad_key, *grad_value, *grad_weights, *weight_columns, *columns, *grad_out, *grad_units;
  float *factors, *zeros;

  GradientRoom(const Arguments& a, float* scratch)
      : Room<T>(a, scratch),
        grad_columns(take(this->block * this->units)),
        key_stack(take(this->paired(units_of<T>(this->keys) * this->width))),
        query_stack(take(this->paired(units_summed<T>(this->block) * this->width))),
        grad_stack(take(this->paired(units_summed<T>(this->block) * this->width))),
        grad_key(take(this->keys * this->width)),
        grad_value(take(this->keys * this->width)),
        grad_weights(take(this->keys * this->block)),
        weight_columns(take(this->paired(this->keys * units_summed<T>(this->block)))),
        columns(take(this->paired(this->keys * units_summed<T>(this->block)))),
        grad_out(take(this->width)),
        grad_units(take(this->block * this->units)),
        factors(take(this->block)),
        zeros(take(this->width)) {}

  float* take(int64_t floats) { return this->carve.take(floats); }
};

int64_t backward_scratch(const Arguments& a) {
  if (are_few(a) && a.grad_out.data) return few_scratch(a);
  int64_t floats = 0;
  by_own_dtype(a.dtype, [&](auto t) { floats = GradientRoom<decltype(t)>(a, nullptr).carve.used(); });
  return floats;
}

// What dL/dq still lacks: keys were scaled when they were gathered, unless they were left as units.
template <typename T>
float key_factor(const Arguments& a) {
  return kPaired<T> ? a.scale : 1.0f;
}

// Rows of dL/d out of some queries. A gate with a row of its own is applied; one of a single number
// for a token is left to the weights, in room.factors.
template <typename T>
Rows grad_rows(const Sequence& s, const GradientRoom<T>& room, const Queries& queries, int64_t first,
               int64_t rows, Ahead* ahead) {
  const Arguments& a = s.a;
  const bool whole = a.gate.data && a.gate.width != 0;
  for (int64_t i = 0; i < rows; ++i) {
    const bool gated = !whole && first + i < queries.tokens;
    room.factors[i] = gated ? gate_of(s, first + i, room.gate).factor : 1.0f;
  }
  if (!whole) {
    return rows_of<T>(s, a.grad_out, a.grad_prefix_out, queries, first, rows, room.width,
                      room.grad_units, ahead);
  }
  for (int64_t i = 0; i < rows; ++i) {
    ahead->step_of_row<T>(i);
    const int64_t prefix = first + i - queries.tokens;
    float* const units = room.grad_units + i * room.units;
    if (prefix >= 0) {
      load_units(s.at<T>(a.grad_prefix_out, prefix), a.width, room.width, units);
      continue;
    }
    float* const grad = kPaired<T> ? room.grad_out : units;
    load_row(s.at<T>(a.grad_out, first + i), a.width, grad);
    gate_of(s, first + i, room.gate);
    for (int64_t d = 0; d < a.width; d += kLanes) store(grad + d, load(grad + d) * load(room.gate + d));
    if constexpr (kPaired<T>) {
      for (int64_t d = round_up(a.width, kLanes); d < room.width; d += kLanes) store(grad + d, F{});
      store_row(grad, room.width, 1.0f, reinterpret_cast<T*>(units));
    }
  }
  clear_rest(room.grad_units, rows, room.units);
  return {room.grad_units, room.units};
}

// The gradient of a gate with rows of its own: dL/d out * (p v).
template <typename T>
void differentiate_gate(const Sequence& s, const GradientRoom<T>& room, const Stack& value,
                        int64_t first, int64_t rows, int64_t tokens, int64_t keys) {
  const Arguments& a = s.a;
  const Left weights = over_rows<T>(room.weights, keys, room.block, rows, room.left);
  sum_values(a, room, weights, value, rows, keys);
  for (int64_t i = 0; i < smaller(rows, tokens - first); ++i) {
    float* out = room.result + i * room.width;
    load_row(s.at<T>(a.grad_out, first + i), a.width, room.grad_out);
    multiply(out, 1.0f, room.grad_out, round_up(a.width, kLanes), out);
    write_gate_row<T>(s, first + i, out, room.shares[i]);
  }
}

// From weights (not yet normalised) and their gradients, both without the gate's single numbers: puts
// p with those, and dL/d scores, in their places. Writes the gradients of the numbers.
template <typename T>
void differentiate_softmax(const Sequence& s, const GradientRoom<T>& room, int64_t first,
                           int64_t rows, int64_t tokens, int64_t keys) {
  const Arguments& a = s.a;
  const int64_t block = room.block;
  for (int64_t i = 0; i < rows; i += kLanes) {
    const F share = load(room.shares + i);
    float* p = room.weights + i;
    float* grad = room.grad_weights + i;
    F mean = {};
    for (int64_t j = 0; j < keys; ++j) mean = fma(load(p + j * block), load(grad + j * block), mean);
    mean *= share;
    if (a.grad_gate && a.gate.width == 0) {
      for (int lane = 0; lane < smaller(kLanes, tokens - first - i); ++lane) {
        static_cast<float*>(a.grad_gate)[s.row(first + i + lane)] = mean[lane];
      }
    }
    const F factor = share * load(room.factors + i);
    for (int64_t j = 0; j < keys; ++j) {
      const F weight = load(p + j * block) * factor;
      store(p + j * block, weight);
      store(grad + j * block, weight * (load(grad + j * block) - mean));
    }
  }
}

// Adds the gradients that some queries send to keys and values, or sets them with the first, and
// writes the queries' own.
template <typename T>
void backward_block(const Sequence& s, const GradientRoom<T>& room, Ahead* ahead,
                    const Rows& key, const Rows& value, const Stack& key_stack,
                    const Stack& value_stack, const Queries& queries, int64_t first, int64_t rows,
                    int64_t keys, bool around) {
  constexpr bool pairs = kPaired<T>;
  const Arguments& a = s.a;
  const int64_t width = room.width, block = room.block;
  const int64_t units = units_of<T>(a.width), summed = units_of<T>(rows);
  const bool to_value = a.grad_value || a.grad_prefix_value;
  const bool to_key = a.grad_key || a.grad_prefix_key;
  // As in forward: each product finds what it needs written some time ago.
  ahead->step(kBetween);
  const Rows query =
      rows_of<T>(s, a.query, a.prefix_query, queries, first, rows, width, room.query, ahead);
  turn_queries(a, room, query, rows);
  const Rows grad = grad_rows(s, room, queries, first, rows, ahead);
  transpose(rows, units, grad.data, grad.stride, room.grad_columns, block);
  score(a, room, key, rows, keys);
  Stack grad_stack{}, query_stack{};
  if (to_value) grad_stack = stack_of<T>(grad.data, grad.stride, rows, width, room.grad_stack);
  ahead->step(kBetween);
  gemm<pairs>(keys, rows, units, value.data, {value.stride, 1}, room.grad_columns, block,
              room.grad_weights, block, false);
  if (to_key) query_stack = stack_of<T>(query.data, query.stride, rows, width, room.query_stack);
  weigh(s, room, queries, first, rows, keys);
  ahead->step(kBetween);
  if (a.grad_gate && a.gate.width != 0) {
    differentiate_gate(s, room, value_stack, first, rows, queries.tokens, keys);
  }
  differentiate_softmax(s, room, first, rows, queries.tokens, keys);
  ahead->step(kBetween);
  Left p{}, of_keys{};
  if (to_value) p = over_columns<T>(room.weights, keys, block, rows, room.weight_columns);
  if (to_key) of_keys = over_columns<T>(room.grad_weights, keys, block, rows, room.columns);
  const Left of_queries = over_rows<T>(room.grad_weights, keys, block, rows, room.left);
  if (to_value) {
    gemm<pairs>(keys, a.width, summed, p.data, p.strides, grad_stack.data, grad_stack.stride,
                room.grad_value, width, first > 0);
  }
  if (to_key) {
    gemm<pairs>(keys, a.width, summed, of_keys.data, of_keys.strides, query_stack.data,
                query_stack.stride, room.grad_key, width, first > 0);
  }
  gemm<pairs>(rows, a.width, units_of<T>(keys), of_queries.data, of_queries.strides, key_stack.data,
              key_stack.stride, room.result, width, false);
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
    const int64_t rows_of_head = 2 * queries.count() + 2 * a.length +
                                 kCopies<T> * (queries.count() + 2 * a.length);
    Ahead ahead = ahead_of<T>(a, task, end, heads,
                              (end_head - s.h) * (blocks * 4 * kBetween + rows_of_head));
    const int64_t keys = a.prefixes + count_real(s, room.before);
    for (; s.h < end_head; ++s.h) {
      const Rows key = rows_of_keys<T>(s, a.prefix_key, a.key, room.before, keys, width, a.scale,
                                       true, room.key, &ahead);
      const Rows value = rows_of_keys<T>(s, a.prefix_value, a.value, room.before, keys, width, 1.0f,
                                         true, room.value, &ahead);
      const Stack key_stack = stack_of<T>(key.data, key.stride, keys, width, room.key_stack);
      Stack value_stack{};
      if (a.grad_gate && a.gate.width != 0) {
        value_stack = stack_of<T>(value.data, value.stride, keys, width, room.value_stack);
      }
      // The first block sets what others add to.
      for (int64_t i = 0; queries.count() == 0 && i < keys * width; ++i) {
        room.grad_key[i] = room.grad_value[i] = 0.0f;
      }
      for (int64_t first = 0; first < queries.count(); first += room.block) {
        backward_block(s, room, &ahead, key, value, key_stack, value_stack, queries, first,
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
          ahead.step_of_row<T>(i);
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
  const Tiles tiles;
  by_own_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (are_few(a)) return forward_few<T>(a, begin, end, scratch);
    forward_tasks<T>(a, begin, end, scratch);
  });
}

void backward(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  const Tiles tiles;
  by_own_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (are_few(a) && a.grad_out.data) return backward_few<T>(a, begin, end, scratch);
    backward_tasks<T>(a, begin, end, scratch);
  });
}

}  // namespace
}  // namespace spacetime_attention

constexpr vd::spacetime_attention::Kernels spacetime_attention_kernels = {
    spacetime_attention::tasks, spacetime_attention::forward_scratch, spacetime_attention::forward,
    spacetime_attention::backward_scratch, spacetime_attention::backward};

}  // namespace VD_ISA
}  // namespace vd
