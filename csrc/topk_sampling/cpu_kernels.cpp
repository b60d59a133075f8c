// topk_sample and topk_gather for one instruction set.
#ifndef VD_BFLOAT16_ALONE  // avx512's serve there, too

#include "topk_sampling/cpu_kernels.h"

#include "common/carve.h"
#include "common/simd.h"
#include "topk_sampling/choice.h"
#include "topk_sampling/gather.h"
#include "topk_sampling/noise.h"

namespace vd {
namespace VD_ISA {
namespace {

using topk_sampling::Choice;
using topk_sampling::Kernels;

constexpr int kSamples = 8;  // whose noise is held at a time to be summed

int32_t* take_integers(Carver* room, int64_t count) {
  return reinterpret_cast<int32_t*>(room->take(count));
}

int64_t choice_scratch(const Choice& c) {
  const int64_t padded = round_up(c.frames, kGroup);
  // Of a RowNoise, of a Chooser, keys, noise, two sums; chosen frames twice; what rounding takes.
  return padded / 4 + padded + Philox::table_floats(padded) + Chooser::scratch_floats(padded) +
         (1 + kSamples + 2) * padded + 2 * c.slots + 16 * kLanes;
}

// Frames of a row that noise can be drawn for, by the quad: those with a frame whose score is at
// least `least` when it is raised by `reach`. They have positions 0 .. padded(), in time order.
class RowNoise {
 public:
  RowNoise(const Choice& c, int64_t row, float reach, float least, Carver* room)
      : c_(c), row_(row), philox_(c.seed, c.row_offset + row) {
    const int64_t all = (c.frames + 3) / 4;
    quad_ = take_integers(room, all);
    scores_ = room->take(round_up(c.frames, kGroup));
    const float* scores = c.scores + row * c.frames;
    for (int64_t q = 0; q < all; ++q) {
      bool wanted = false;
      for (int64_t t = 4 * q; t < end_of(q); ++t) wanted |= scores[t] + reach >= least;
      quad_[quads_] = static_cast<int32_t>(q);
      quads_ += wanted;
    }
    pick(scores, -__builtin_inff(), scores_);
    if (!c.noise) {
      float* table = room->take(Philox::table_floats(padded()));
      philox_.prepare(quad_, quads_, padded(), table);
      table_ = table;
    }
  }

  int64_t padded() const { return round_up(4 * quads_, kGroup); }
  const float* scores() const { return scores_; }
  int64_t frame(int64_t position) const { return 4 * quad_[position / 4] + position % 4; }

  void normals_of(int64_t sample, float* z) const {
    if (given(sample, z)) return;
    philox_.words(table_, padded(), static_cast<uint32_t>(sample), z);
    normals(z, padded());
  }

  void gumbels_of(float* z) const {
    if (given(0, z)) return;
    philox_.words(table_, padded(), 0, z);
    gumbels(z, padded());
  }

  // What a row of N floats holds at our positions; `fill` where there is no frame.
  void pick(const float* from, float fill, float* to) const {
    for (int64_t i = 0; i < quads_; ++i) {
      const int64_t start = 4 * quad_[i], count = end_of(quad_[i]) - start;
      for (int64_t t = 0; t < count; ++t) to[4 * i + t] = from[start + t];
      for (int64_t t = count; t < 4; ++t) to[4 * i + t] = fill;
    }
    for (int64_t i = 4 * quads_; i < padded(); ++i) to[i] = fill;
  }

  // The inverse; other frames are left as they are.
  void place(const float* from, float* to) const {
    for (int64_t i = 0; i < quads_; ++i) {
      for (int64_t t = 4 * quad_[i]; t < end_of(quad_[i]); ++t) to[t] = from[4 * i + t % 4];
    }
  }

 private:
  int64_t end_of(int64_t quad) const {
    return 4 * quad + 4 < c_.frames ? 4 * quad + 4 : c_.frames;
  }

  bool given(int64_t sample, float* z) const {
    if (!c_.noise) return false;
    pick(c_.noise + row_ * c_.noise_row + sample * c_.noise_sample, 0.0f, z);
    return true;
  }

  const Choice& c_;
  int64_t row_;
  Philox philox_;
  int64_t quads_ = 0;
  int32_t* quad_;
  float* scores_;
  const float* table_ = nullptr;
};

struct Samples {
  int64_t row, chunk, begin, end;
};

Samples samples_of(const Choice& c, int64_t task) {
  const int64_t chunk = task % c.chunks;
  const int64_t each = round_up((c.samples + c.chunks - 1) / c.chunks, kSamples);
  const int64_t begin = chunk * each < c.samples ? chunk * each : c.samples;
  return {task / c.chunks, chunk, begin, begin + each < c.samples ? begin + each : c.samples};
}

// Writes a row's choice, one-hot where weights are wanted; `frame_of` a position.
template <typename FrameOf>
VD_INLINE void write_choice(const Choice& c, int64_t row, const int32_t* chosen, int64_t found,
                            const FrameOf& frame_of) {
  for (int64_t k = 0; k < c.slots; ++k) {
    const int64_t slot = row * c.slots + k;
    c.indices[slot] = k < found ? frame_of(chosen[k]) : -1;
    c.slot_mask[slot] = k < found;
    if (c.weights && k < found) c.weights[slot * c.frames + c.indices[slot]] = 1.0f;
  }
}

int64_t unordered(const Choice& c, int64_t begin, int64_t end) {
  const float* scores = c.scores + begin * c.frames;
  const int64_t count = (end - begin) * c.frames;
  const float infinity = __builtin_inff();
  int64_t i = 0, ordered = 0;
  I of_lane = {};
  for (; i + kLanes <= count; i += kLanes) of_lane -= load(scores + i) < broadcast(infinity);
  for (int lane = 0; lane < kLanes; ++lane) ordered += of_lane[lane];
  for (; i < count; ++i) ordered += scores[i] < infinity;
  return count - ordered;
}

void hard(const Choice& c, int64_t begin, int64_t end, float* scratch) {
  Carver room(scratch);
  const int64_t padded = round_up(c.frames, kLanes);
  float* keys = room.take(padded);
  float* chooser_room = room.take(Chooser::scratch_floats(padded));
  int32_t* chosen = take_integers(&room, c.slots);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t t = 0; t < c.frames; ++t) keys[t] = c.scores[row * c.frames + t];
    for (int64_t t = c.frames; t < padded; ++t) keys[t] = -__builtin_inff();
    Chooser chooser(padded, c.slots, chooser_room);
    const int64_t found = chooser.choose(keys, c.by_score, chosen);
    write_choice(c, row, chosen, found, [](int64_t position) { return position; });
  }
}

// --- "perturbed" ---------------------------------------------------------------------------------

// The unperturbed choice of a row, as `hard` has written it.
struct Base {
  const int64_t* frames;
  int64_t count;
  float worst;  // score

  Base(const Choice& c, int64_t row) : frames(c.indices + row * c.slots) {
    for (count = 0; count < c.slots && frames[count] >= 0; ++count) {
      const float score = c.scores[row * c.frames + frames[count]];
      if (count == 0 || score < worst) worst = score;
    }
  }
};

// How far noise can move a score.
float reach_of(const Choice& c) {
  return c.noise ? __builtin_inff() : static_cast<float>(c.sigma) * kLargestNormal;
}

// Frames that a sample can choose: K keys are at least base.worst - reach, rounded, as rounding
// keeps order. A frame that cannot get there needs no noise.
RowNoise noise_of_reachable(const Choice& c, int64_t row, const Base& base, Carver* room) {
  return RowNoise(c, row, reach_of(c), base.worst - reach_of(c), room);
}

// Every real frame of a row.
RowNoise noise_of_all(const Choice& c, int64_t row, Carver* room) {
  return RowNoise(c, row, 0.0f, kLowest, room);
}

// Whether every sample chooses as the scores do.
bool is_certain(const Choice& c, int64_t row, const Base& base) {
  if (c.by_score) return false;  // the order may still differ
  const float reach = reach_of(c), least = base.worst - reach;
  int64_t reachable = 0;
  for (int64_t t = 0; t < c.frames; ++t) {
    reachable += c.scores[row * c.frames + t] + reach >= least;
  }
  return reachable == base.count;
}

// A row of which some samples are drawn, one after the other.
class Sampler {
 public:
  Sampler(const Choice& c, const RowNoise& noise, Carver* room)
      : c_(c),
        noise_(noise),
        keys_(room->take(noise.padded())),
        chosen_(take_integers(room, c.slots)),
        chooser_(noise.padded(), c.slots, room->take(Chooser::scratch_floats(noise.padded()))) {}

  // Draws Z of a sample and chooses; returns how many frames it chose, at most K.
  int64_t draw(int64_t sample, float* z) {
    noise_.normals_of(sample, z);
    const float sigma = static_cast<float>(c_.sigma);
    for (int64_t i = 0; i < noise_.padded(); i += kLanes) {
      // rounded twice, as specified
      store(keys_ + i, load(noise_.scores() + i) + load(z + i) * sigma);
    }
    return chooser_.choose(keys_, c_.by_score, chosen_);
  }

  int64_t position(int64_t slot) const { return chosen_[slot]; }
  int64_t frame(int64_t slot) const { return noise_.frame(chosen_[slot]); }

 private:
  const Choice& c_;
  const RowNoise& noise_;
  float* keys_;
  int32_t* chosen_;
  Chooser chooser_;
};

void perturbed(const Choice& c, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) {
    const Samples samples = samples_of(c, task);
    const Base base(c, samples.row);
    if (base.count == 0) continue;
    int32_t* counts = reinterpret_cast<int32_t*>(c.weights) + samples.row * c.slots * c.frames;
    const auto count = [&](int64_t slot, int64_t frame, int64_t times) {
      int32_t* const to = counts + slot * c.frames + frame;
      if (c.chunks == 1) {
        *to += static_cast<int32_t>(times);
      } else {  // other chunks count here, too; integers may be added in any order
        __atomic_fetch_add(to, static_cast<int32_t>(times), __ATOMIC_RELAXED);
      }
    };
    if (is_certain(c, samples.row, base)) {
      for (int64_t k = 0; k < base.count; ++k) {
        count(k, base.frames[k], samples.end - samples.begin);
      }
      continue;
    }
    Carver room(scratch);
    const RowNoise noise = noise_of_reachable(c, samples.row, base, &room);
    Sampler sampler(c, noise, &room);
    float* z = room.take(noise.padded());
    for (int64_t i = samples.begin; i < samples.end; ++i) {
      const int64_t found = sampler.draw(i, z);
      for (int64_t k = 0; k < found; ++k) count(k, sampler.frame(k), 1);
    }
  }
}

void counts_to_weights(const Choice& c, int64_t begin, int64_t end) {
  const F samples = broadcast(static_cast<float>(c.samples));
  const int64_t cells = c.slots * c.frames;
  int64_t i = begin * cells;
  for (; i + kLanes <= end * cells; i += kLanes) {
    store(c.weights + i, __builtin_convertvector(float_to_bits(load(c.weights + i)), F) / samples);
  }
  for (; i < end * cells; ++i) {
    int32_t count;
    std::memcpy(&count, c.weights + i, sizeof count);
    c.weights[i] = static_cast<float>(count) / static_cast<float>(c.samples);
  }
}

// What a chunk adds to a row's gradient. With c_i what sample i gains over the base:
struct Sums {
  float* weighted;  // [N] sum of (c_i - shift) Z_i; for "diagonal" what is to be divided by n sigma
  float* plain;     // [N] sum of Z_i
  float* shift;     // near the mean of c_i, lest sums of it drown what differs
  float* excess;    // sum of c_i - shift
};

int64_t sums_floats(const Choice& c) { return 2 * c.frames + 2; }

Sums sums_of(const Choice& c, int64_t row, int64_t chunk) {
  float* own = c.sums + (row * c.chunks + chunk) * sums_floats(c);
  return {own, own + c.frames, own + 2 * c.frames, own + 2 * c.frames + 1};
}

void sum_exact(const Choice& c, const Samples& samples, const Base& base, const Sums& sums,
               Carver room) {
  const float* grad = c.grad + samples.row * c.slots * c.frames;
  const RowNoise noise = noise_of_all(c, samples.row, &room);
  const int64_t padded = noise.padded();
  Sampler sampler(c, noise, &room);
  float* z = room.take(kSamples * padded);
  float* weighted = room.take(padded);
  float* plain = room.take(padded);
  for (int64_t i = 0; i < padded; ++i) weighted[i] = plain[i] = 0.0f;

  for (int64_t first = samples.begin; first < samples.end; first += kSamples) {
    const int64_t left = samples.end - first, count = left < kSamples ? left : kSamples;
    float gain[kSamples], mean = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t found = sampler.draw(first + i, z + i * padded);
      gain[i] = 0.0f;
      for (int64_t k = 0; k < found; ++k) {
        const float* own = grad + k * c.frames;
        gain[i] += own[sampler.frame(k)] - own[base.frames[k]];
      }
      mean += gain[i] / static_cast<float>(count);
    }
    if (first == samples.begin && c.samples > 1) *sums.shift = mean;
    for (int64_t i = 0; i < count; ++i) {
      gain[i] -= *sums.shift;
      *sums.excess += gain[i];
    }
    for (int64_t t = 0; t < padded; t += kLanes) {
      F with = {}, without = {};
      for (int64_t i = 0; i < count; ++i) {
        const F own = load(z + i * padded + t);
        with = fma(broadcast(gain[i]), own, with);
        without += own;
      }
      store(weighted + t, load(weighted + t) + with);
      store(plain + t, load(plain + t) + without);
    }
  }
  noise.place(weighted, sums.weighted);
  noise.place(plain, sums.plain);
}

void sum_diagonal(const Choice& c, const Samples& samples, const Base& base, const Sums& sums,
                  Carver room) {
  const float* grad = c.grad + samples.row * c.slots * c.frames;
  const RowNoise noise = noise_of_reachable(c, samples.row, base, &room);
  Sampler sampler(c, noise, &room);
  float* z = room.take(noise.padded());
  for (int64_t i = samples.begin; i < samples.end; ++i) {
    const int64_t found = sampler.draw(i, z);
    for (int64_t k = 0; k < found; ++k) {
      const int64_t t = sampler.frame(k);
      sums.weighted[t] += grad[k * c.frames + t] * z[sampler.position(k)];
    }
  }
}

void perturbed_backward(const Choice& c, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) {
    const Samples samples = samples_of(c, task);
    const Sums sums = sums_of(c, samples.row, samples.chunk);
    for (int64_t i = 0; i < sums_floats(c); ++i) sums.weighted[i] = 0.0f;
    const Base base(c, samples.row);
    if (base.count == 0) continue;
    if (c.diagonal) {
      sum_diagonal(c, samples, base, sums, Carver(scratch));
    } else if (!is_certain(c, samples.row, base)) {
      sum_exact(c, samples, base, sums, Carver(scratch));
    }
  }
}

void add_chunks(const Choice& c, int64_t begin, int64_t end) {
  // Division, not multiplication by its inverse: that of a tiny sigma is infinite.
  const double others = c.diagonal || c.samples == 1 ? c.samples : c.samples - 1;
  const double divisor = others * c.sigma;
  for (int64_t row = begin; row < end; ++row) {
    double mean = 0.0;
    for (int64_t chunk = 0; c.samples > 1 && chunk < c.chunks; ++chunk) {
      const Samples samples = samples_of(c, row * c.chunks + chunk);
      const Sums sums = sums_of(c, row, chunk);
      mean += *sums.excess + static_cast<double>(*sums.shift) * (samples.end - samples.begin);
    }
    mean /= static_cast<double>(c.samples);
    for (int64_t t = 0; t < c.frames; ++t) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < c.chunks; ++chunk) {
        const Sums sums = sums_of(c, row, chunk);
        sum += sums.weighted[t] - (mean - *sums.shift) * sums.plain[t];
      }
      const bool real = c.scores[row * c.frames + t] >= kLowest;
      c.grad_scores[row * c.frames + t] = real ? static_cast<float>(sum / divisor) : 0.0f;
    }
  }
}

// --- "gumbel" ------------------------------------------------------------------------------------

// Keys of a row with their noise added, where the noise lies.
void gumbel_keys(const RowNoise& noise, float* keys) {
  noise.gumbels_of(keys);
  for (int64_t i = 0; i < noise.padded(); i += kLanes) {
    store(keys + i, load(noise.scores() + i) + load(keys + i));
  }
}

void gumbel(const Choice& c, int64_t begin, int64_t end, float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    Carver room(scratch);
    const RowNoise noise = noise_of_all(c, row, &room);
    float* keys = room.take(noise.padded());
    gumbel_keys(noise, keys);
    Chooser chooser(noise.padded(), c.slots,
                    room.take(Chooser::scratch_floats(noise.padded())));
    int32_t* chosen = take_integers(&room, c.slots);
    const int64_t found = chooser.choose(keys, c.by_score, chosen);
    write_choice(c, row, chosen, found, [&](int64_t position) { return noise.frame(position); });
  }
}

void gumbel_backward(const Choice& c, int64_t begin, int64_t end, float* scratch) {
  const F temperature = broadcast(c.temperature);
  for (int64_t row = begin; row < end; ++row) {
    Carver room(scratch);
    const RowNoise noise = noise_of_all(c, row, &room);
    const int64_t padded = noise.padded();
    float* keys = room.take(padded);
    gumbel_keys(noise, keys);
    Chooser chooser(padded, c.slots, room.take(Chooser::scratch_floats(padded)));
    int32_t* picks = take_integers(&room, c.slots);
    const int64_t found = chooser.choose(keys, true, picks);

    float* grad = room.take(padded);
    float* shares = room.take(padded);
    float* sum = room.take(padded);
    for (int64_t i = 0; i < padded; ++i) sum[i] = 0.0f;
    const int64_t* slots = c.indices + row * c.slots;
    for (int64_t j = 0; j < found; ++j) {
      int64_t slot = 0;
      while (slot + 1 < c.slots && slots[slot] != noise.frame(picks[j])) ++slot;
      noise.pick(c.grad + (row * c.slots + slot) * c.frames, 0.0f, grad);
      // p = softmax of what is left, of which the pick is the largest. G less its value at the pick
      // says the same, without cancellation where the pick has nearly all of p.
      const F largest = broadcast(keys[picks[j]]), at_pick = broadcast(grad[picks[j]]);
      F total = {}, with_grad = {};
      for (int64_t i = 0; i < padded; i += kLanes) {
        const F share = exp((load(keys + i) - largest) / temperature);
        const F gain = load(grad + i) - at_pick;
        store(shares + i, share);
        store(grad + i, gain);
        total += share;
        with_grad = fma(share, gain, with_grad);
      }
      const float scale = 1.0f / reduce_add(total);
      const F mean = broadcast(reduce_add(with_grad) * scale);
      for (int64_t i = 0; i < padded; i += kLanes) {
        const F share = load(shares + i) * scale;
        store(sum + i, fma(share, load(grad + i) - mean, load(sum + i)));
      }
      keys[picks[j]] = -__builtin_inff();
    }
    for (int64_t i = 0; i < padded; i += kLanes) store(sum + i, load(sum + i) / temperature);
    float* to = c.grad_scores + row * c.frames;
    for (int64_t t = 0; t < c.frames; ++t) to[t] = 0.0f;
    noise.place(sum, to);
  }
}

// --- topk_gather ---------------------------------------------------------------------------------

void gather(const Gather& g, int64_t begin, int64_t end, float* scratch) {
  by_dtype(g.dtype, [&](auto t) { gather_parts<decltype(t)>(g, begin, end, scratch); });
}

void gather_backward_values(const Gather& g, int64_t begin, int64_t end, float* scratch) {
  by_dtype(g.dtype, [&](auto t) { grad_values_parts<decltype(t)>(g, begin, end, scratch); });
}

void gather_backward_weights(const Gather& g, int64_t begin, int64_t end, float* scratch) {
  by_dtype(g.dtype, [&](auto t) { grad_weights_parts<decltype(t)>(g, begin, end, scratch); });
}

}  // namespace

constexpr topk_sampling::Kernels topk_sampling_kernels = {
    choice_scratch, sums_floats,       unordered,          hard,       gumbel, gumbel_backward,
    perturbed,      counts_to_weights, perturbed_backward, add_chunks,
    gather_scratch, gather,            gather_backward_values,         gather_backward_weights,
};

}  // namespace VD_ISA
}  // namespace vd

#endif  // VD_BFLOAT16_ALONE
