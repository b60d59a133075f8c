// Sequences of a few tokens, too short to fill the tiles of products. Rows stay where they lie: scores
// are sums along D, and all of a sequence's fit into a few vectors.
#pragma once

#include "common/carve.h"
#include "spacetime_attention/sequence.h"

namespace vd {
namespace VD_ISA {
namespace spacetime_attention {

constexpr int kMostFew = kLanes < 8 ? 4 : 8;

inline bool are_few(const Arguments& a) {
  return a.length <= kMostFew && a.prefixes == 0 && a.width % kLanes == 0;
}

// --- vectors of scores ---------------------------------------------------------------------------

// Each lane gets what the lane has whose number differs in the bit `step`.
template <int step>
VD_INLINE F exchange(F x) {
#if VD_INTRINSICS == 512
  if constexpr (step == 1) return (F)_mm512_permute_ps((__m512)x, 0xb1);
  if constexpr (step == 2) return (F)_mm512_permute_ps((__m512)x, 0x4e);
  if constexpr (step == 4) return (F)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1);
  if constexpr (step == 8) return (F)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e);
#elif VD_INTRINSICS == 256
  if constexpr (step == 1) return (F)_mm256_permute_ps((__m256)x, 0xb1);
  if constexpr (step == 2) return (F)_mm256_permute_ps((__m256)x, 0x4e);
  if constexpr (step == 4) return (F)_mm256_permute2f128_ps((__m256)x, (__m256)x, 0x01);
#else
  F y{};
  for (int i = 0; i < kLanes; ++i) y[i] = x[i ^ step];
  return y;
#endif
}

// Sums of pairs of lanes: of a where the lane's number lacks the bit `step`, of b where it has it.
template <int step>
VD_INLINE F fold(F a, F b) {
  I high{};
  VD_UNROLL for (int i = 0; i < kLanes; ++i) high[i] = (i & step) ? -1 : 0;
  return select(high, b, a) + exchange<step>(select(high, a, b));
}

// Lane r gets the sum over all lanes of x[r].
template <int step = 1>
VD_INLINE F sums_of(F* x) {
  if constexpr (step == kLanes) {
    return x[0];
  } else {
    VD_UNROLL for (int r = 0; r < kLanes / step; r += 2) x[r / 2] = fold<step>(x[r], x[r + 1]);
    return sums_of<2 * step>(x);
  }
}

// In each lane the sum, or the maximum, over its group of kN lanes.
template <int kN, int step = 1>
VD_INLINE F group_sum(F x) {
  if constexpr (step == kN) return x;
  else return group_sum<kN, 2 * step>(x + exchange<step>(x));
}
template <int kN, int step = 1>
VD_INLINE F group_max(F x) {
  if constexpr (step == kN) return x;
  else return group_max<kN, 2 * step>(max(x, exchange<step>(x)));
}

// --- a sequence of at most kN tokens -------------------------------------------------------------

// A number for each query and key, [kN,kN].
template <int kN>
struct Square {
  static constexpr int kVectors = kN * kN / kLanes, kRows = kLanes / kN;  // of vectors; in each
  F vectors[kVectors];
};

// a_i . b_j of rows of `width` elements.
template <int kN, typename A, typename B>
VD_INLINE Square<kN> products(const A* const* a, const B* const* b, int64_t width) {
  using S = Square<kN>;
  S found;
  for (int v = 0; v < S::kVectors; ++v) {
    F sums[kLanes];
    VD_UNROLL for (int r = 0; r < kLanes; ++r) sums[r] = F{};
    for (int64_t d = 0; d < width; d += kLanes) {
      F right[kN];
      VD_UNROLL for (int j = 0; j < kN; ++j) right[j] = load(b[j] + d);
      VD_UNROLL for (int i = 0; i < S::kRows; ++i) {
        const F left = load(a[v * S::kRows + i] + d);
        VD_UNROLL for (int j = 0; j < kN; ++j) {
          sums[i * kN + j] = fma(left, right[j], sums[i * kN + j]);
        }
      }
    }
    found.vectors[v] = sums_of(sums);
  }
  return found;
}

// write(i, d, vector) of the sums over j of w_ij rows_j, or w_ji rows_j, for the first `count` i.
template <int kN, bool kTransposed, typename T, typename Write>
VD_INLINE void mix(const Square<kN>& weights, const T* const* rows, int64_t count, int64_t width,
                   const Write& write) {
  float w[kN * kN];
  for (int v = 0; v < Square<kN>::kVectors; ++v) store(w + v * kLanes, weights.vectors[v]);
  for (int64_t d = 0; d < width; d += kLanes) {
    F row[kN];
    VD_UNROLL for (int j = 0; j < kN; ++j) row[j] = load(rows[j] + d);
    for (int64_t i = 0; i < count; ++i) {
      F sum{};
      VD_UNROLL for (int j = 0; j < kN; ++j) {
        sum = fma(broadcast(w[kTransposed ? j * kN + i : i * kN + j]), row[j], sum);
      }
      write(i, d, sum);
    }
  }
}

template <typename T>
VD_INLINE void write_vector(T* to, F x, bool around_cache) {
  if (around_cache) {
    stream(to, x);
  } else {
    store(to, x);
  }
}

// Scratch memory.
struct FewRoom {
  int64_t width;
  Carver carve;
  float *zeros, *gate, *grads;  // grads: two times [kMostFew, width]

  FewRoom(const Arguments& a, float* scratch)
      : width(a.width),
        carve(scratch),
        zeros(carve.take(width)),
        gate(carve.take(width)),
        grads(carve.take(2 * kMostFew * width)) {
    for (int64_t d = 0; scratch && d < width; ++d) zeros[d] = 0.0f;
  }
};

inline int64_t few_scratch(const Arguments& a) { return FewRoom(a, nullptr).carve.used(); }

// Which keys the tokens of a sequence may see: the same for all heads.
template <int kN>
struct Sight {
  I shown[Square<kN>::kVectors];
  bool real[kN];

  explicit Sight(const Sequence& s) {
    const Arguments& a = s.a;
    int32_t all[kN + 1];
    for (int i = 0; i <= kN; ++i) all[i] = i;
    float row[kN * kN];
    for (int j = 0; j < kN; ++j) real[j] = j < a.length && s.real(j);
    for (int i = 0; i < kN; ++i) {
      for (int j = 0; j < kN; ++j) row[i * kN + j] = 0.0f;
      if (limited(a) && i < a.length) hide(s, all, i, a.length, row + i * kN, 1);
      for (int j = 0; j < kN; ++j) {
        if (!real[j]) row[i * kN + j] = kHidden;
      }
    }
    for (int v = 0; v < Square<kN>::kVectors; ++v) shown[v] = load(row + v * kLanes) == 0.0f;
  }
};

// Rows of a sequence's tokens, zeros in place of those beyond it and of keys that are not real.
template <int kN, typename T>
struct FewRows {
  const T* at[kN];

  FewRows(const Sequence& s, const Video& x, const bool* real, const float* zeros) {
    const Walk<T> walk(s, x);
    for (int i = 0; i < kN; ++i) {
      const bool here = i < s.a.length && (!real || real[i]);
      at[i] = here ? walk[i] : reinterpret_cast<const T*>(zeros);
    }
  }

  // Of the next head.
  void advance(const Video& x, const float* zeros) {
    for (int i = 0; i < kN; ++i) {
      if (at[i] != reinterpret_cast<const T*>(zeros)) at[i] += x.head;
    }
  }
};

template <int kN>
VD_INLINE Square<kN> softmax(Square<kN> scores, const Sight<kN>& sight, float scale) {
  for (int v = 0; v < Square<kN>::kVectors; ++v) {
    const F s = select(sight.shown[v], scores.vectors[v] * scale, broadcast(kHidden));
    const F largest = group_max<kN>(s);
    const F e = exp(s - select(largest > kHidden, largest, F{}));
    const F sum = group_sum<kN>(e);
    scores.vectors[v] = select(sum > 0.0f, e / sum, F{});
  }
  return scores;
}

// visit(s, query, key, value, sight, ahead) for each sequence of the tasks, which takes `steps` steps
// ahead.
template <int kN, typename T, typename Visit>
VD_INLINE void for_each_few(const Arguments& a, int64_t begin, int64_t end, const FewRoom& room,
                            int64_t steps, const Visit& visit) {
  const int64_t heads = heads_at_once(a);
  for (int64_t task = begin; task < end; ++task) {
    Sequence s(a, task, heads);
    const int64_t end_head = smaller(s.h + heads, a.heads);
    Ahead ahead = ahead_of<T>(a, task, end, heads, (end_head - s.h) * steps);
    const Sight<kN> sight(s);
    FewRows<kN, T> query(s, a.query, nullptr, room.zeros);
    FewRows<kN, T> key(s, a.key, sight.real, room.zeros);
    FewRows<kN, T> value(s, a.value, sight.real, room.zeros);
    for (; s.h < end_head; ++s.h) {
      visit(s, query, key, value, sight, &ahead);
      query.advance(a.query, room.zeros);
      key.advance(a.key, room.zeros);
      value.advance(a.value, room.zeros);
    }
  }
  finish_streams();
}

template <int kN, typename T>
void forward_few_of(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  const FewRoom room(a, scratch);
  T* const out = static_cast<T*>(a.out);
  const bool around = a.stream && can_stream(out, a.width);
  const int64_t vectors = a.length * (a.width / kLanes);  // of a sequence
  for_each_few<kN, T>(
      a, begin, end, room, vectors,
      [&](const Sequence& s, const auto& query, const auto& key, const auto& value,
          const Sight<kN>& sight, Ahead* ahead) {
        const Square<kN> p = softmax(products<kN>(query.at, key.at, a.width), sight, a.scale);
        if (!a.gate.data) {
          return mix<kN, false>(p, value.at, a.length, a.width, [&](int64_t i, int64_t d, F sum) {
            ahead->step(1);
            write_vector(out + s.row(i) * a.width + d, sum, around);
          });
        }
        mix<kN, false>(p, value.at, a.length, a.width, [&](int64_t i, int64_t d, F sum) {
          ahead->step(1);
          store(room.grads + i * a.width + d, sum);
        });
        for (int64_t i = 0; i < a.length; ++i) {
          float* const row = room.grads + i * a.width;
          const GateRow gate = gate_of(s, i, room.gate);
          if (gate.whole) multiply(row, 1.0f, room.gate, a.width, row);
          write_row(row, a.width, gate.factor, out + s.row(i) * a.width, around);
        }
      });
}

// dL/d out of token i in `grad`, and `out` where a gate needs its gradient: writes that, and applies
// the gate to `grad`.
template <typename T>
void gate_gradient(const Sequence& s, int64_t i, float* out, float* row, float* grad) {
  const Arguments& a = s.a;
  if (!a.gate.data) return;
  if (a.grad_gate && a.gate.width == 0) {
    F sum = {};
    for (int64_t d = 0; d < a.width; d += kLanes) sum = fma(load(grad + d), load(out + d), sum);
    static_cast<float*>(a.grad_gate)[s.row(i)] = reduce_add(sum);
  } else if (a.grad_gate) {
    multiply(out, 1.0f, grad, a.width, out);
    write_gate_row<T>(s, i, out, 1.0f);
  }
  const GateRow gate = gate_of(s, i, row);
  multiply(grad, gate.factor, gate.whole ? row : nullptr, a.width, grad);
}

template <int kN, typename T>
void backward_few_of(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  const FewRoom room(a, scratch);
  const int64_t vectors = a.length * (a.width / kLanes);
  const int64_t results =
      (a.grad_query != nullptr) + (a.grad_key != nullptr) + (a.grad_value != nullptr);
  const auto write_to = [&](void* to, const Sequence& s, float factor, const bool* real,
                            Ahead* ahead) {
    T* const rows = static_cast<T*>(to);
    const bool around = a.stream && can_stream(rows, a.width);
    return [=, &a, &s](int64_t i, int64_t d, F sum) {
      ahead->step(1);
      const F x = real && !real[i] ? F{} : sum * factor;
      write_vector(rows + s.row(i) * a.width + d, x, around);
    };
  };
  for_each_few<kN, T>(
      a, begin, end, room, results * vectors,
      [&](const Sequence& s, const auto& query, const auto& key, const auto& value,
          const Sight<kN>& sight, Ahead* ahead) {
        const Square<kN> p = softmax(products<kN>(query.at, key.at, a.width), sight, a.scale);
        const Walk<T> walk(s, a.grad_out);
        float* const out = room.grads + kN * a.width;
        if (a.grad_gate) {
          mix<kN, false>(p, value.at, a.length, a.width, [&](int64_t i, int64_t d, F sum) {
            store(out + i * a.width + d, sum);
          });
        }
        const float* grad[kN];
        for (int64_t i = 0; i < kN; ++i) {
          grad[i] = room.zeros;
          if (i >= a.length) continue;
          float* const row = room.grads + i * a.width;
          load_row(walk[i], a.width, row);
          gate_gradient<T>(s, i, out + i * a.width, room.gate, row);
          grad[i] = row;
        }
        Square<kN> ds = products<kN>(grad, value.at, a.width);
        for (int v = 0; v < Square<kN>::kVectors; ++v) {
          const F share = p.vectors[v];
          ds.vectors[v] = share * (ds.vectors[v] - group_sum<kN>(share * ds.vectors[v]));
        }
        if (a.grad_query) {
          mix<kN, false>(ds, key.at, a.length, a.width,
                         write_to(a.grad_query, s, a.scale, nullptr, ahead));
        }
        if (a.grad_key) {
          mix<kN, true>(ds, query.at, a.length, a.width,
                        write_to(a.grad_key, s, a.scale, sight.real, ahead));
        }
        if (a.grad_value) {
          mix<kN, true>(p, grad, a.length, a.width,
                        write_to(a.grad_value, s, 1.0f, sight.real, ahead));
        }
      });
}

template <typename T>
void forward_few(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  if (a.length <= 4) return forward_few_of<4, T>(a, begin, end, scratch);
  if constexpr (kMostFew == 8) forward_few_of<8, T>(a, begin, end, scratch);
}

template <typename T>
void backward_few(const Arguments& a, int64_t begin, int64_t end, float* scratch) {
  if (a.length <= 4) return backward_few_of<4, T>(a, begin, end, scratch);
  if constexpr (kMostFew == 8) backward_few_of<8, T>(a, begin, end, scratch);
}

}  // namespace spacetime_attention
}  // namespace VD_ISA
}  // namespace vd
