// language_gate for one instruction set: forward and backward on a few tokens of one head at a time.
#include "language_gate/cpu_kernels.h"

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
  by_dtype(dtype, run);
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
        gate(carve.take(kBlock * channels)) {}
};

int64_t forward_scratch(const Arguments& g) {
  int64_t floats = 0;
  by_dtype(g.dtype, [&](auto t) { floats = Room<decltype(t)>(g, nullptr).carve.used(); });
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

// Asks for the rows of the next block while this one is computed, a few whole tokens at a time: what
// one head has of them lies too far apart for the processor to foresee and for memory to be fast.
template <typename T>
class Ahead {
 public:
  // The block begins at token `first` of question b, or there is none if that is not below L. Only
  // heads h .. h + heads are computed.
  Ahead(const Arguments& g, int64_t b, int64_t first, int64_t h, int64_t heads)
      : g_(g),
        b_(b),
        first_(first),
        rows_(g.length - first < kBlock ? g.length - first : kBlock),
        h_(h),
        heads_(heads),
        parts_(heads * kParts) {}

  // While the tile at row i of the `done`-th head is computed. Inlined, as GCC takes a function that
  // does nothing but this for one without effect.
  VD_INLINE void fetch_part(const Tokens& x, int64_t width, int64_t done, int64_t i) const {
    if (rows_ <= 0 || !x.data) return;
    const int64_t part = done * kParts + i / kStep<T>;
    for (int64_t l = part * rows_ / parts_; l < (part + 1) * rows_ / parts_; ++l) {
      const T* const row = at<T>(x, b_, first_ + l, h_);
      if (x.head == width) {
        fetch<2>(row, heads_ * width);
      } else {
        for (int64_t h = 0; h < heads_; ++h) fetch<2>(row + h * x.head, width);
      }
    }
  }

 private:
  static constexpr int64_t kParts = kBlock / kStep<T>;
  const Arguments& g_;
  int64_t b_, first_, rows_, h_, heads_, parts_;
};

// Of `rows` tokens the scores, p where `keep` or the gate is per channel, r, and the gate: [rows], or
// per channel [rows,Dv'].
template <typename T>
void gate_of(const Arguments& g, const Room<T>& room, int64_t b, int64_t h, const Rows& query,
             int64_t rows, bool keep, const Ahead<T>& ahead, int64_t done) {
  const int64_t n = g.count[b], head = b * g.heads + h, channels = room.channels;
  if (n > 0) {
    const int64_t padded = round_up(n, kLanes);
    for (int64_t i = 0; i < rows; i += kStep<T>) {
      const int64_t some = rows - i < kStep<T> ? rows - i : kStep<T>;
      ahead.fetch_part(g.query, g.width, done, i);
      gemm<kPaired<T>>(some, n, units_of<T>(g.width), query.data + i * query.stride,
                       {query.stride, 1}, g.key_columns + head * room.width * g.padded, g.padded,
                       room.rows + i * padded, padded, false);
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
                     g.gate_value + head * g.padded * channels, channels, room.gate, channels,
                     false);
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
    const Ahead<T> ahead(g, (block + 1) / blocks,
                         block + 1 < end ? (block + 1) % blocks * kBlock : g.length, 0, g.heads);
    for (int64_t h = 0; h < g.heads; ++h) {
      const Rows query = rows_of(at<T>(g.query, b, first, h), g.query.token, rows, g.width, false,
                                 room.query);
      gate_of(g, room, b, h, query, rows, false, ahead, h);
      for (int64_t i = 0; i < rows; ++i) {
        if (i % kStep<T> == 0) ahead.fetch_part(g.value, g.channels, h, i);
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

// Backward's own part of the scratch memory.
template <typename T>
struct GradientRoom : Room<T> {
  float *grad_shares, *grad_query, *grad_gate, *grad_units, *stack, *query_stack, *columns;

  GradientRoom(const Arguments& g, float* scratch)
      : Room<T>(g, scratch),
        grad_shares(take(g.padded * kBlock)),
        grad_query(take(kBlock * this->width)),
        grad_gate(take(kBlock * this->channels)),
        grad_units(take(kPaired<T> ? kBlock * units_of<T>(this->channels) : 0)),
        stack(take(kPaired<T> ? units_summed<T>(kBlock) * this->channels : 0)),
        query_stack(take(kPaired<T> ? units_summed<T>(kBlock) * this->width : 0)),
        columns(take(kPaired<T> ? g.padded * units_summed<T>(kBlock) : 0)) {}

  float* take(int64_t floats) { return this->carve.take(floats); }
};

int64_t backward_scratch(const Arguments& g) {
  int64_t floats = 0;
  by_dtype(g.dtype, [&](auto t) { floats = GradientRoom<decltype(t)>(g, nullptr).carve.used(); });
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

// Where a head's sums over one part of L go, those that are wanted.
struct HeadSums {
  float *key, *gate_value, *bias;

  template <typename T>
  HeadSums(const Arguments& g, const Room<T>& room, int64_t b, int64_t h, int64_t part) {
    const int64_t chunk = (b * g.heads + h) * g.chunks + part;
    const auto at_chunk = [&](float* sums, int64_t each) {
      return sums ? sums + chunk * each : nullptr;
    };
    key = at_chunk(g.grad_key, g.padded * room.width);
    gate_value = at_chunk(g.grad_gate_value, g.padded * room.channels);
    bias = at_chunk(g.grad_bias, g.per_channel ? room.channels : 1);
  }

  template <typename T>
  void clear(const Arguments& g, const Room<T>& room) const {
    for (int64_t i = 0; key && i < g.padded * room.width; ++i) key[i] = 0.0f;
    for (int64_t i = 0; gate_value && i < g.padded * room.channels; ++i) gate_value[i] = 0.0f;
    for (int64_t i = 0; bias && i < (g.per_channel ? room.channels : 1); ++i) bias[i] = 0.0f;
  }
};

template <typename T>
void backward_block(const Arguments& g, const GradientRoom<T>& room, int64_t b, int64_t h,
                    int64_t first, const HeadSums& sums, const Ahead<T>& ahead, int64_t done) {
  constexpr bool pairs = kPaired<T>;
  const int64_t width = room.width, channels = room.channels;
  const int64_t rows = g.length - first < kBlock ? g.length - first : kBlock;
  const int64_t head = b * g.heads + h, n = g.count[b];
  const int64_t gates = g.per_channel ? channels : 1;  // of one token and head
  T* const to_query = static_cast<T*>(g.grad_query);
  T* const to_value = static_cast<T*>(g.grad_value);
  const bool around_query = g.stream && to_query && can_stream(to_query, g.width);
  const bool around_value = g.stream && to_value && can_stream(to_value, g.channels);
  const Rows query = rows_of(at<T>(g.query, b, first, h), g.query.token, rows, g.width, true,
                             room.query);
  gate_of(g, room, b, h, query, rows, true, ahead, done);
  // Long before it is multiplied: tiles wait for what was written just before.
  Stack query_stack{};
  if (sums.key) {
    query_stack = stack_of<T>(query.data, query.stride, rows, width, room.query_stack);
  }

  // dL/d logit, and dL/d value
  for (int64_t i = 0; i < rows; ++i) {
    const float* own = room.gate + i * gates;
    float* grad = room.grad_gate + i * gates;
    if (i % kStep<T> == 0) {
      ahead.fetch_part(g.value, g.channels, done, i);
      ahead.fetch_part(g.grad_out, g.channels, done, i);
    }
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
                g.gate_columns + head * channels * g.padded, g.padded, room.rows, padded, false);
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
  gemm<pairs>(rows, g.width, units_of<T>(n), grad.data, grad.strides, g.key + head * g.padded * width,
              width, room.grad_query, width, false);
  const float factor = pairs ? g.scale : 1.0f;  // which keys lack if they are as they were given
  for (int64_t i = 0; i < rows; ++i) {
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
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % g.chunks, b = task / g.chunks / groups;
    const int64_t first_head = task / g.chunks % groups * kHeads;
    const int64_t end_head = first_head + kHeads < g.heads ? first_head + kHeads : g.heads;
    for (int64_t h = first_head; h < end_head; ++h) HeadSums(g, room, b, h, part).clear(g, room);
    const int64_t end_block = (part + 1) * blocks / g.chunks;
    for (int64_t block = part * blocks / g.chunks; block < end_block; ++block) {
      const Ahead<T> ahead(g, b, block + 1 < end_block ? (block + 1) * kBlock : g.length, first_head,
                           end_head - first_head);
      for (int64_t h = first_head; h < end_head; ++h) {
        backward_block(g, room, b, h, block * kBlock, HeadSums(g, room, b, h, part), ahead,
                       h - first_head);
      }
    }
  }
  finish_streams();
}

void forward(const Arguments& g, int64_t begin, int64_t end, float* scratch) {
  const Tiles tiles(g.dtype);
  by_form(g.dtype, g.reduction == Reduction::kMean,
          [&](auto t) { forward_blocks<decltype(t)>(g, begin, end, scratch); });
}

void backward(const Arguments& g, int64_t begin, int64_t end, float* scratch) {
  const Tiles tiles(g.dtype);
  by_form(g.dtype, g.reduction == Reduction::kMean,
          [&](auto t) { backward_tasks<decltype(t)>(g, begin, end, scratch); });
}

// Where rows are units, `rows` gets a stack and `columns` the transpose of the units, both without
// `factor`.
template <typename T>
void pack_heads(const Packing& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = round_up(p.width, row_step<T>), units = units_of<T>(width);
  const bool in_place = p.rows && !kPaired<T>;
  for (int64_t head = begin; head < end; ++head) {
    const int64_t b = head / p.heads, h = head % p.heads;
    float* rows = in_place ? p.rows + head * p.padded * width : scratch;
    for (int64_t i = 0; i < p.padded * units; ++i) rows[i] = 0.0f;
    int64_t n = 0;
    for (int64_t j = 0; j < p.tokens; ++j) {
      if (p.real && !p.real[b * p.tokens + j]) continue;
      const T* token = at<T>(p.from, b, j, h);
      if constexpr (kPaired<T>) {
        load_units(token, p.width, width, rows + n * units);
      } else {
        float* row = rows + (p.mean ? 0 : n * width);
        for (int64_t d = 0; d < p.width; ++d) row[d] += p.factor * widen(token[d]);
      }
      ++n;
    }
    for (int64_t d = 0; p.mean && n > 0 && d < width; ++d) rows[d] /= static_cast<float>(n);
    if (p.columns) {
      transpose(p.padded, units, rows, units, p.columns + head * width * p.padded, p.padded);
    }
    if (p.rows && !in_place) {
      stack_of<T>(rows, units, p.padded, width, p.rows + head * p.padded * width);
    }
  }
}

template <typename T>
void unpack_heads(const Unpacking& u, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = round_up(u.width, row_step<T>);
  T* const to = static_cast<T*>(u.to);
  for (int64_t head = begin; head < end; ++head) {
    const int64_t b = head / u.heads, h = head % u.heads;
    int64_t n = 0;
    for (int64_t j = 0; u.mean && j < u.tokens; ++j) n += !u.real || u.real[b * u.tokens + j];
    const float factor = u.mean && n > 0 ? u.factor / static_cast<float>(n) : u.factor;
    int64_t packed = 0;
    for (int64_t j = 0; j < u.tokens; ++j) {
      for (int64_t d = 0; d < width; ++d) scratch[d] = 0.0f;
      if (!u.real || u.real[b * u.tokens + j]) {
        for (int64_t c = 0; c < u.chunks; ++c) {
          const float* sums = u.sums + ((head * u.chunks + c) * u.padded + packed) * width;
          for (int64_t d = 0; d < width; ++d) scratch[d] += sums[d];
        }
        packed += !u.mean;
      }
      store_row(scratch, u.width, factor, to + ((b * u.tokens + j) * u.heads + h) * u.width);
    }
  }
}

void pack(const Packing& p, int64_t begin, int64_t end, float* scratch) {
  by_form(p.dtype, p.mean, [&](auto t) { pack_heads<decltype(t)>(p, begin, end, scratch); });
}

void unpack(const Unpacking& u, int64_t begin, int64_t end, float* scratch) {
  by_form(u.dtype, u.mean, [&](auto t) { unpack_heads<decltype(t)>(u, begin, end, scratch); });
}

}  // namespace

const language_gate::Kernels language_gate_kernels = {
    kLanes, row_step_of, forward_scratch, forward, backward_scratch, backward, pack, unpack,
};

}  // namespace VD_ISA
}  // namespace vd
