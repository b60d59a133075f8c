// language_gate for one instruction set: forward and backward on a few tokens of one head at a time.
#include "language_gate/cpu_kernels.h"

#include "common/ahead.h"
#include "common/carve.h"
#include "common/gemm.h"
#include "common/pairs.h"
#include "common/softmax.h"

namespace vd {
namespace VD_ISA {
namespace {

using language_gate::Arguments;
using language_gate::kBlock;
using language_gate::kHeads;
using language_gate::Packing;
using language_gate::Reduction;
using language_gate::Tokens;
using language_gate::Unpacking;

template <typename T>
VD_INLINE const T* at(const Tokens& x, int64_t b, int64_t l, int64_t h) {
  return static_cast<const T*>(x.data) + b * x.batch + l * x.token + h * x.head;
}

// bfloat16 whose products are formed of floats all the same: a question's mean is no bfloat16.
struct Widened : BFloat16 {};

template <typename Run>
VD_INLINE void by_form(Dtype dtype, bool mean, const Run& run) {
  if (dtype == Dtype::kBFloat16 && mean) return run(Widened{});
  by_own_dtype(dtype, run);
}

int64_t row_step_of(Dtype dtype, bool mean) {
  int64_t step = 0;
  by_form(dtype, mean, [&](auto t) { step = row_step<decltype(t)>; });
  return step;
}

// Tokens whose scores are formed in one go.
template <typename T>
constexpr int64_t kStep = kTiled<T> ? kTileSize : kTileRows;

// Some tokens of one head as rows of units (pairs.h): where they lie if they can be read as they are,
// else a copy.
struct Rows {
  const float* data;
  int64_t stride;
};

// `vectors`: whether whole vectors will be read, not units one by one. `room` holds
// rows * (width rounded up).
template <typename T>
VD_INLINE Rows rows_of(const T* from, int64_t stride, int64_t rows, int64_t width, bool vectors,
                       float* room) {
  constexpr int64_t each = kPaired<T> ? 2 : 1;  // elements of a unit
  vectors = vectors || kTiled<T>;
  if constexpr (sizeof(T) * each == sizeof(float)) {
    if (kTiled<T> && rows % kTileSize != 0) {
      // Tiles would read what lies behind the last token.
    } else if (stride % each == 0 && width % (vectors ? row_step<T> : each) == 0) {
      return {reinterpret_cast<const float*>(from), stride / each};
    }
  }
  const int64_t step = round_up(width, row_step<T>);
  for (int64_t i = 0; i < rows; ++i) {
    load_units(from + i * stride, width, step, room + i * units_of<T>(step));
  }
  return {room, units_of<T>(step)};
}

// What both passes need of the scratch memory, for kBlock tokens of one head.
template <typename T>
struct Room {
  int64_t width, channels;  // rounded up to whole vectors
  Carver carve;
  float *query, *rows;
  float *scores, *shares, *left;  // [tokens of the question, kBlock]: a visual token to a column
  float *reduced, *gate;

  Room(const Arguments& g, float* scratch)
      : width(round_up(g.width, row_step<T>)),
        channels(round_up(g.channels, row_step<T>)),
        carve(scratch),
        query(carve.take(kBlock * width)),
        rows(carve.take(kBlock * g.padded)),
        scores(carve.take(g.padded * kBlock)),
        shares(carve.take(g.padded * kBlock)),
        left(carve.take(kPaired<T> ? g.padded * kBlock : 0)),
        reduced(carve.take(kBlock)),
        gate(carve.take(kBlock * (g.per_channel ? channels : 1))) {}
};

int64_t forward_scratch(const Arguments& g) {
  int64_t floats = 0;
  by_own_dtype(g.dtype, [&](auto t) { floats = Room<decltype(t)>(g, nullptr).carve.used(); });
  return floats;
}

VD_INLINE void sigmoid_row(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, sigmoid(load(x + i)));
}

// out = gate * value for one row; `gate` holds one float or, per channel, as many as the row.
template <typename T>
VD_INLINE void scale_row(const T* value, const float* gate, bool per_channel, int64_t n, T* out,
                         bool around_cache) {
  int64_t i = 0;
  const F one = broadcast(gate[0]);
  if (around_cache) {
    for (; i < n; i += kLanes) {
      stream(out + i, load(value + i) * (per_channel ? load(gate + i) : one));
    }
    return;
  }
  for (; i + kLanes <= n; i += kLanes) {
    store(out + i, load(value + i) * (per_channel ? load(gate + i) : one));
  }
  for (; i < n; ++i) narrow(widen(value[i]) * gate[per_channel ? i : 0], out + i);
}

// p = softmax of the scores of kLanes tokens; r = sum of p s.
VD_INLINE F softmax_columns(const float* s, int64_t n, float* p) {
  for (int64_t j = 0; j < n; ++j) store(p + j * kBlock, load(s + j * kBlock));
  const ColumnSums sums = exponentials<true, true>(p, n, kBlock);
  const F share = 1.0f / sums.sum;
  for (int64_t j = 0; j < n; ++j) store(p + j * kBlock, load(p + j * kBlock) * share);
  return sums.weighted * share;
}

// Asks for the rows of a block while the one before is computed, in `steps` steps: those of `heads`
// heads from h on. There is none if its first token is not below L.
template <typename T>
Ahead ahead_of(const Arguments& g, int64_t b, int64_t first, int64_t h, int64_t heads, int64_t steps) {
  Ahead ahead;
  const int64_t rows = g.length - first < kBlock ? g.length - first : kBlock;
  const auto add = [&](const Tokens& x, int64_t width) {
    if (!x.data || rows <= 0) return;
    const int64_t parts = x.head == width ? 1 : heads;  // of a token: its heads lie side by side
    constexpr int64_t size = sizeof(T);
    ahead.add(at<T>(x, b, first, h), {1, rows, parts}, {0, x.token * size, x.head * size},
              heads / parts * width * size);
  };
  add(g.query, g.width);
  add(g.value, g.channels);
  add(g.grad_out, g.channels);
  ahead.start(steps);
  return ahead;
}

// Steps of `ahead_of` beside a product.
constexpr int64_t kBeside = 3;

// One head of a question, packed, in the forms that are needed: rows [padded,width rounded up] and
// their transpose.
struct Question {
  const float *key, *key_columns, *gate_value, *gate_columns;
};

// Of `rows` tokens the scores, p where `keep` or the gate is per channel, r, and the gate: [rows], or
// per channel [rows,Dv'].
template <typename T>
void gate_of(const Arguments& g, const Room<T>& room, const Question& question, int64_t b, int64_t h,
             const Rows& query, int64_t rows, bool keep, Ahead* ahead) {
  const int64_t n = g.count[b], channels = room.channels;
  if (n > 0) {
    const int64_t padded = round_up(n, kLanes);
    for (int64_t i = 0; i < rows; i += kStep<T>) {
      const int64_t some = rows - i < kStep<T> ? rows - i : kStep<T>;
      ahead->step(kBeside);
      gemm<kPaired<T>>(some, n, units_of<T>(g.width), query.data + i * query.stride,
                       {query.stride, 1}, question.key_columns, g.padded, room.rows + i * padded,
                       padded, false);
    }
    for (int64_t i = 0; kPaired<T> && i < rows * padded; i += kLanes) {
      store(room.rows + i, load(room.rows + i) * g.scale);  // keys are as they were given
    }
    // What fills up whole vectors of tokens goes through the softmax, too: let it be zeros.
    for (int64_t i = rows * padded; i < round_up(rows, kLanes) * padded; i += kLanes) {
      store(room.rows + i, F{});
    }
    transpose(rows, n, room.rows, padded, room.scores, kBlock);
  }
  if (g.per_channel) {
    for (int64_t i = 0; n > 0 && i < rows; i += kLanes) {
      softmax_columns(room.scores + i, n, room.shares + i);
    }
    const Left p = over_rows<T>(room.shares, n, kBlock, rows, room.left);
    gemm<kPaired<T>>(rows, g.channels, units_of<T>(n), p.data, p.strides,
                     question.gate_value, channels, room.gate, channels, false);
    for (int64_t i = 0; i < rows; ++i) {
      float* gate = room.gate + i * channels;
      for (int64_t c = 0; g.bias && c < g.channels; ++c) gate[c] += g.bias[h * g.channels + c];
      sigmoid_row(gate, channels);
    }
    return;
  }
  const F bias = broadcast(g.bias ? g.bias[h] : 0.0f);
  for (int64_t i = 0; i < rows; i += kLanes) {
    float* s = room.scores + i;
    F reduced = {};
    if (n > 0 && g.reduction == Reduction::kSoftmax && keep) {
      reduced = softmax_columns(s, n, room.shares + i);
    } else if (n > 0 && g.reduction == Reduction::kSoftmax) {
      const ColumnSums sums = exponentials<false, true>(s, n, kBlock);
      reduced = sums.weighted / sums.sum;
    } else if (n > 0) {
      reduced = load(s);
      for (int64_t j = 1; j < n; ++j) reduced = max(load(s + j * kBlock), reduced);
    }
    store(room.reduced + i, reduced);
    store(room.gate + i, sigmoid(reduced + bias));
  }
}

template <typename T>
void forward_blocks(const Arguments& g, int64_t begin, int64_t end, float* scratch) {
  const int64_t blocks = (g.length + kBlock - 1) / kBlock;
  const Room<T> room(g, scratch);
  T* const out = static_cast<T*>(g.out);
  T* const gate_out = static_cast<T*>(g.gate);
  const bool around = g.stream && g.out && can_stream(out, g.channels);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t b = block / blocks, first = block % blocks * kBlock;
    const int64_t rows = g.length - first < kBlock ? g.length - first : kBlock;
    const int64_t next = block + 1 < end ? (block + 1) % blocks * kBlock : g.length;
    Ahead ahead = ahead_of<T>(g, (block + 1) / blocks, next, 0, g.heads,
                              g.heads * (kBeside * kBlock / kStep<T> + kBlock));
    for (int64_t h = 0; h < g.heads; ++h) {
      const Rows query = rows_of(at<T>(g.query, b, first, h), g.query.token, rows, g.width, false,
                                 room.query);
      const int64_t head = (b * g.heads + h) * g.padded;
      const Question question{nullptr, g.key.columns + head * room.width,
                              g.per_channel ? g.gate_value.rows + head * room.channels : nullptr,
                              nullptr};
      gate_of(g, room, question, b, h, query, rows, false, &ahead);
      for (int64_t i = 0; i < rows; ++i) {
        ahead.step_of_row<T>(i);
        const int64_t row = (b * g.length + first + i) * g.heads + h;
        const float* own = room.gate + i * (g.per_channel ? room.channels : 1);
        if (g.out) {
          scale_row(at<T>(g.value, b, first + i, h), own, g.per_channel, g.channels,
                    out + row * g.channels, around);
        }
        if (g.gate && g.per_channel) {
          store_row(own, g.channels, 1.0f, gate_out + row * g.channels);
        } else if (g.gate) {
          narrow(*own, gate_out + row);
        }
      }
    }
  }
  finish_streams();
}

// Packs one head of a question. `rows` and `columns` may be absent; where rows are units, `rows` gets
// a stack and `columns` the transpose of the units, both without `factor`. Scratch: padded * (width
// rounded up).
template <typename T>
void pack_head(const Packing& p, int64_t head, float* rows, float* columns, float* scratch) {
  const int64_t width = round_up(p.width, row_step<T>), units = units_of<T>(width);
  const int64_t b = head / p.heads, h = head % p.heads;
  float* const to = rows && !kPaired<T> ? rows : scratch;
  for (int64_t i = 0; i < p.padded * units; ++i) to[i] = 0.0f;
  int64_t n = 0;
  for (int64_t j = 0; j < p.tokens; ++j) {
    if (p.real && !p.real[b * p.tokens + j]) continue;
    const T* token = at<T>(p.from, b, j, h);
    if constexpr (kPaired<T>) {
      load_units(token, p.width, width, to + n * units);
    } else {
      float* row = to + (p.mean ? 0 : n * width);
      for (int64_t d = 0; d < p.width; ++d) row[d] += p.factor * widen(token[d]);
    }
    ++n;
  }
  for (int64_t d = 0; p.mean && n > 0 && d < width; ++d) to[d] /= static_cast<float>(n);
  if (columns) transpose(p.padded, units, to, units, columns, p.padded);
  if (rows && to != rows) stack_of<T>(to, units, p.padded, width, rows);
}

// Sums [chunks,padded,width rounded up] of one head, to where they belong. Scratch: width rounded up.
template <typename T>
void unpack_head(const Unpacking& u, int64_t head, const float* sums, int64_t chunks,
                 float* scratch) {
  const int64_t width = round_up(u.width, row_step<T>);
  const int64_t b = head / u.heads, h = head % u.heads;
  T* const to = static_cast<T*>(u.to);
  int64_t n = 0;
  for (int64_t j = 0; u.mean && j < u.tokens; ++j) n += !u.real || u.real[b * u.tokens + j];
  const float factor = u.mean && n > 0 ? u.factor / static_cast<float>(n) : u.factor;
  int64_t packed = 0;
  for (int64_t j = 0; j < u.tokens; ++j) {
    for (int64_t d = 0; d < width; ++d) scratch[d] = 0.0f;
    if (!u.real || u.real[b * u.tokens + j]) {
      for (int64_t c = 0; c < chunks; ++c) {
        const float* row = sums + (c * u.padded + packed) * width;
        for (int64_t d = 0; d < width; ++d) scratch[d] += row[d];
      }
      packed += !u.mean;
    }
    store_row(scratch, u.width, factor, to + ((b * u.tokens + j) * u.heads + h) * u.width);
  }
}

// Backward's own part of the scratch memory. The last pieces are of kHeads heads: the question, sums
// over a chunk, and over all of them.
template <typename T>
struct GradientRoom : Room<T> {
  float *grad_shares, *grad_query, *grad_gate, *grad_units, *stack, *query_stack, *columns, *packing;
  int64_t of_key, of_gate_value;  // floats of one head
  float *key, *key_columns, *gate_value, *gate_columns;
  float *key_sums, *key_totals, *gate_value_sums, *gate_value_totals;

  GradientRoom(const Arguments& g, float* scratch)
      : Room<T>(g, scratch),
        grad_shares(take(g.per_channel ? g.padded * kBlock : 0)),
        grad_query(take(kBlock * this->width)),
        grad_gate(take(kBlock * (g.per_channel ? this->channels : 1))),
        grad_units(take(kPaired<T> && g.per_channel ? kBlock * units_of<T>(this->channels) : 0)),
        stack(take(kPaired<T> && g.per_channel ? units_summed<T>(kBlock) * this->channels : 0)),
        query_stack(take(kPaired<T> ? units_summed<T>(kBlock) * this->width : 0)),
        columns(take(kPaired<T> ? g.padded * units_summed<T>(kBlock) : 0)),
        packing(take((g.padded > 0 ? g.padded : 1) *
                     (this->width > this->channels ? this->width : this->channels))),
        of_key(g.padded * this->width),
        of_gate_value(g.per_channel ? g.padded * this->channels : 0),
        key(take(kHeads * of_key)),
        key_columns(take(kHeads * of_key)),
        gate_value(take(kHeads * of_gate_value)),
        gate_columns(take(kHeads * of_gate_value)) {
    const int64_t keys = g.whole && g.grad_key.to ? kHeads * of_key : 0;
    const int64_t values = g.whole && g.grad_gate_value.to ? kHeads * of_gate_value : 0;
    key_sums = take(keys);
    key_totals = take(keys);
    gate_value_sums = take(values);
    gate_value_totals = take(values);
  }

  float* take(int64_t floats) { return this->carve.take(floats); }

  // Of the i-th of the heads.
  Question question(int64_t i) const {
    return {key + i * of_key, key_columns + i * of_key, gate_value + i * of_gate_value,
            gate_columns + i * of_gate_value};
  }

  void pack(const Arguments& g, int64_t head, int64_t i) const {
    pack_head<T>(g.key, head, key + i * of_key, key_columns + i * of_key, packing);
    if (!g.per_channel) return;
    pack_head<T>(g.gate_value, head, gate_value + i * of_gate_value,
                 gate_columns + i * of_gate_value, packing);
  }
};

int64_t backward_scratch(const Arguments& g) {
  int64_t floats = 0;
  by_own_dtype(g.dtype, [&](auto t) { floats = GradientRoom<decltype(t)>(g, nullptr).carve.used(); });
  return floats;
}

// dL/ds of kLanes tokens from their dL/dr: in `grads`, which holds p if the reduction is a softmax.
VD_INLINE void scores_gradient(Reduction reduction, const float* s, F reduced, F grad, int64_t n,
                               float* grads) {
  if (reduction == Reduction::kSoftmax) {
    // dr/ds_j = p_j (1 + s_j - r)
    const F shift = 1.0f - reduced;
    for (int64_t j = 0; j < n; ++j) {
      const F p = load(grads + j * kBlock);
      store(grads + j * kBlock, grad * p * (load(s + j * kBlock) + shift));
    }
    return;
  }
  // The first of the largest takes it all. Of a mean, packed as one token, that is the only one.
  for (int64_t j = 0; j < n; ++j) {
    const I here = load(s + j * kBlock) == reduced;
    store(grads + j * kBlock, select(here, grad, F{}));
    grad = select(here, F{}, grad);
  }
}

// Where a head's sums over one part of L go, those that are wanted: key [padded,D'], gate_value
// [padded,Dv'], bias [1] or [Dv'].
struct HeadSums {
  float *key, *gate_value, *bias;

  // Of head h of question b, the i-th of the task's.
  template <typename T>
  HeadSums(const Arguments& g, const GradientRoom<T>& room, int64_t b, int64_t h, int64_t i,
           int64_t part) {
    const int64_t chunk = (b * g.heads + h) * g.chunks + part;
    const auto place = [&](const Unpacking& u, float* own, int64_t each) -> float* {
      if (!u.to) return nullptr;
      return g.whole ? own + i * each : u.sums + chunk * each;
    };
    key = place(g.grad_key, room.key_sums, room.of_key);
    gate_value = place(g.grad_gate_value, room.gate_value_sums, room.of_gate_value);
    bias = g.grad_bias ? g.grad_bias + chunk * (g.per_channel ? room.channels : 1) : nullptr;
  }

  template <typename T>
  void clear(const Arguments& g, const GradientRoom<T>& room) const {
    for (int64_t i = 0; key && i < room.of_key; ++i) key[i] = 0.0f;
    for (int64_t i = 0; gate_value && i < room.of_gate_value; ++i) gate_value[i] = 0.0f;
    for (int64_t i = 0; bias && i < (g.per_channel ? room.channels : 1); ++i) bias[i] = 0.0f;
  }
};

// totals = sums, or totals + sums
VD_INLINE void add_up(const float* sums, int64_t n, bool first, float* totals) {
  for (int64_t i = 0; i < n; ++i) totals[i] = (first ? 0.0f : totals[i]) + sums[i];
}

template <typename T>
void backward_block(const Arguments& g, const GradientRoom<T>& room, const Question& question,
                    int64_t b, int64_t h, int64_t first, const HeadSums& sums, Ahead* ahead) {
  constexpr bool pairs = kPaired<T>;
  const int64_t width = room.width, channels = room.channels;
  const int64_t rows = g.length - first < kBlock ? g.length - first : kBlock;
  const int64_t n = g.count[b];
  const int64_t gates = g.per_channel ? channels : 1;  // of one token and head
  T* const to_query = static_cast<T*>(g.grad_query);
  T* const to_value = static_cast<T*>(g.grad_value);
  const bool around_query = g.stream && to_query && can_stream(to_query, g.width);
  const bool around_value = g.stream && to_value && can_stream(to_value, g.channels);
  const Rows query = rows_of(at<T>(g.query, b, first, h), g.query.token, rows, g.width, true,
                             room.query);
  gate_of(g, room, question, b, h, query, rows, true, ahead);
  // Long before it is multiplied: tiles wait for what was written just before.
  Stack query_stack{};
  if (sums.key) {
    query_stack = stack_of<T>(query.data, query.stride, rows, width, room.query_stack);
  }

  // dL/d logit, and dL/d value
  for (int64_t i = 0; i < rows; ++i) {
    const float* own = room.gate + i * gates;
    float* grad = room.grad_gate + i * gates;
    ahead->step_of_row<T>(i);
    for (int64_t c = 0; c < gates; ++c) grad[c] = 0.0f;
    const int64_t row = (b * g.length + first + i) * g.heads + h;
    if (g.grad_out.data) {
      const T* grad_out = at<T>(g.grad_out, b, first + i, h);
      const T* value = at<T>(g.value, b, first + i, h);
      if (to_value) {
        scale_row(grad_out, own, g.per_channel, g.channels, to_value + row * g.channels,
                  around_value);
      }
      int64_t c = 0;
      F sum = {};
      if constexpr (pairs) {
        for (; !g.per_channel && c + 2 * kLanes <= g.channels; c += 2 * kLanes) {
          sum = fma_pairs(load(reinterpret_cast<const float*>(grad_out + c)),
                          load(reinterpret_cast<const float*>(value + c)), sum);
        }
      }
      for (; c + kLanes <= g.channels; c += kLanes) {
        const F product = load(grad_out + c) * load(value + c);
        if (g.per_channel) {
          store(grad + c, product);
        } else {
          sum += product;
        }
      }
      float rest = 0.0f;
      for (; c < g.channels; ++c) {
        const float product = widen(grad_out[c]) * widen(value[c]);
        if (g.per_channel) {
          grad[c] = product;
        } else {
          rest += product;
        }
      }
      if (!g.per_channel) *grad = reduce_add(sum) + rest;
    } else if (to_value) {
      for (int64_t c = 0; c < g.channels; ++c) narrow(0.0f, to_value + row * g.channels + c);
    }
    if (g.grad_gate.data) {
      const T* given = at<T>(g.grad_gate, b, first + i, h);
      for (int64_t c = 0; c < (g.per_channel ? g.channels : 1); ++c) grad[c] += widen(given[c]);
    }
    for (int64_t c = 0; c < gates; ++c) {
      grad[c] *= own[c] * (1.0f - own[c]);
      if (sums.bias) sums.bias[c] += grad[c];
    }
  }
  if (!to_query && !sums.key && !sums.gate_value) return;

  if (n > 0 && g.per_channel) {
    const float* grad = room.grad_gate;
    int64_t step = channels;
    if constexpr (pairs) {
      step = units_of<T>(channels);
      for (int64_t i = 0; i < rows; ++i) {
        // Padding is zero: a vector of them at least follows what is no whole vector.
        for (int64_t c = g.channels; c < channels; ++c) room.grad_gate[i * channels + c] = 0.0f;
        store_row(room.grad_gate + i * channels, channels, 1.0f,
                  reinterpret_cast<T*>(room.grad_units + i * step));
      }
      grad = room.grad_units;
    }
    if (sums.gate_value) {
      const Left p = over_columns<T>(room.shares, n, kBlock, rows, room.left);
      const Stack of_rows = stack_of<T>(grad, step, rows, channels, room.stack);
      gemm<pairs>(n, g.channels, units_of<T>(rows), p.data, p.strides, of_rows.data, of_rows.stride,
                  sums.gate_value, channels, true);
    }
    const int64_t padded = round_up(n, kLanes);
    gemm<pairs>(rows, n, units_of<T>(g.channels), grad, {step, 1},
                question.gate_columns, g.padded, room.rows, padded, false);
    transpose(rows, n, room.rows, padded, room.grad_shares, kBlock);
    for (int64_t i = 0; i < rows; i += kLanes) {
      float* p = room.shares + i;
      const float* grad = room.grad_shares + i;
      F mean = {};
      for (int64_t j = 0; j < n; ++j) {
        mean = fma(load(p + j * kBlock), load(grad + j * kBlock), mean);
      }
      for (int64_t j = 0; j < n; ++j) {
        store(p + j * kBlock, load(p + j * kBlock) * (load(grad + j * kBlock) - mean));
      }
    }
  } else if (n > 0) {
    for (int64_t i = 0; i < rows; i += kLanes) {
      scores_gradient(g.reduction, room.scores + i, load(room.reduced + i),
                      load(room.grad_gate + i), n, room.shares + i);
    }
  }
  // With no real token n is 0, and so are the products.
  Left of_keys{};
  if (sums.key) of_keys = over_columns<T>(room.shares, n, kBlock, rows, room.columns);
  const Left grad = over_rows<T>(room.shares, n, kBlock, rows, room.left);
  if (sums.key) {
    gemm<pairs>(n, g.width, units_of<T>(rows), of_keys.data, of_keys.strides, query_stack.data,
                query_stack.stride, sums.key, width, true);
  }
  if (!to_query) return;
  gemm<pairs>(rows, g.width, units_of<T>(n), grad.data, grad.strides, question.key, width,
              room.grad_query, width, false);
  const float factor = pairs ? g.scale : 1.0f;  // which keys lack if they are as they were given
  for (int64_t i = 0; i < rows; ++i) {
    ahead->step_of_row<T>(i);
    T* to = to_query + ((b * g.length + first + i) * g.heads + h) * g.width;
    if (around_query) {
      stream_row(room.grad_query + i * width, g.width, factor, to);
    } else {
      store_row(room.grad_query + i * width, g.width, factor, to);
    }
  }
}

template <typename T>
void backward_tasks(const Arguments& g, int64_t begin, int64_t end, float* scratch) {
  const GradientRoom<T> room(g, scratch);
  const int64_t blocks = (g.length + kBlock - 1) / kBlock;
  const int64_t groups = (g.heads + kHeads - 1) / kHeads;
  const int64_t parts = g.whole ? g.chunks : 1;  // of a task
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = g.whole ? task : task / g.chunks;
    const int64_t first_part = g.whole ? 0 : task % g.chunks, b = group / groups;
    const int64_t first_head = group % groups * kHeads;
    const int64_t heads = first_head + kHeads < g.heads ? kHeads : g.heads - first_head;
    for (int64_t i = 0; i < heads; ++i) room.pack(g, b * g.heads + first_head + i, i);
    const int64_t last_block = (first_part + parts) * blocks / g.chunks;
    for (int64_t part = first_part; part < first_part + parts; ++part) {
      const auto sums_of = [&](int64_t i) {
        return HeadSums(g, room, b, first_head + i, i, part);
      };
      for (int64_t i = 0; i < heads; ++i) sums_of(i).clear(g, room);
      const int64_t end_block = (part + 1) * blocks / g.chunks;
      for (int64_t block = part * blocks / g.chunks; block < end_block; ++block) {
        const int64_t next = block + 1 < last_block ? (block + 1) * kBlock : g.length;
        Ahead ahead = ahead_of<T>(g, b, next, first_head, heads,
                                  heads * (kBeside * kBlock / kStep<T> + 2 * kBlock));
        for (int64_t i = 0; i < heads; ++i) {
          backward_block(g, room, room.question(i), b, first_head + i, block * kBlock, sums_of(i),
                         &ahead);
        }
      }
      if (!g.whole) continue;
      if (g.grad_key.to) {
        add_up(room.key_sums, heads * room.of_key, part == 0, room.key_totals);
      }
      if (g.grad_gate_value.to) {
        add_up(room.gate_value_sums, heads * room.of_gate_value, part == 0, room.gate_value_totals);
      }
    }
    for (int64_t i = 0; g.whole && i < heads; ++i) {
      const int64_t head = b * g.heads + first_head + i;
      if (g.grad_key.to) {
        unpack_head<T>(g.grad_key, head, room.key_totals + i * room.of_key, 1, room.packing);
      }
      if (g.grad_gate_value.to) {
        unpack_head<T>(g.grad_gate_value, head, room.gate_value_totals + i * room.of_gate_value, 1,
                       room.packing);
      }
    }
  }
  finish_streams();
}

void forward(const Arguments& g, int64_t begin, int64_t end, float* scratch) {
  const Tiles tiles;
  by_form(g.dtype, g.reduction == Reduction::kMean,
          [&](auto t) { forward_blocks<decltype(t)>(g, begin, end, scratch); });
}

void backward(const Arguments& g, int64_t begin, int64_t end, float* scratch) {
  const Tiles tiles;
  by_form(g.dtype, g.reduction == Reduction::kMean,
          [&](auto t) { backward_tasks<decltype(t)>(g, begin, end, scratch); });
}

void pack(const Packing& p, int64_t begin, int64_t end, float* scratch) {
  by_form(p.dtype, p.mean, [&](auto t) {
    using T = decltype(t);
    const int64_t each = p.padded * round_up(p.width, row_step<T>);
    for (int64_t head = begin; head < end; ++head) {
      pack_head<T>(p, head, p.rows ? p.rows + head * each : nullptr,
                   p.columns ? p.columns + head * each : nullptr, scratch);
    }
  });
}

void unpack(const Unpacking& u, int64_t begin, int64_t end, float* scratch) {
  by_form(u.dtype, u.mean, [&](auto t) {
    using T = decltype(t);
    const int64_t each = u.chunks * u.padded * round_up(u.width, row_step<T>);
    for (int64_t head = begin; head < end; ++head) {
      unpack_head<T>(u, head, u.sums + head * each, u.chunks, scratch);
    }
  });
}

}  // namespace

constexpr language_gate::Kernels language_gate_kernels = {
    kLanes, row_step_of, forward_scratch, forward, backward_scratch, backward, pack, unpack,
};

}  // namespace VD_ISA
}  // namespace vd
