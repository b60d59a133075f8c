// topk_sample's kernels for NVIDIA GPUs: a warp has the frames of a row and its samples, one at a
// time.
//
// Keys stay in registers and are chosen by bisection: a threshold that as many of them reach as are
// to be chosen. Counts are integers, which may be added in any order; no two warps add to one
// float. vd_kernels/topk_sampling/triton_kernels.py divides the work likewise and tells more of it.
#pragma once

#include "topk_sampling/draw.h"

namespace vd {
namespace topk_sampling {
namespace {

constexpr unsigned kWarp = 0xffffffff;
constexpr int kWarps = 4;                    // of a block, each with work of its own
constexpr int32_t kNever = INT32_MIN;        // below every key
constexpr float kLowest = -0x1.fffffep127f;  // real keys are not below it
constexpr int kQuads = 32, kTogether = 8;    // of a block of `gradient_kernel`: quads and samples

// Blocks that are to fit on a multiprocessor, when each lane has so many frames.
constexpr int blocks_of(int own) { return own <= 8 ? 4 : own <= 16 ? 3 : 2; }

// What kernels are given; pointers that are not are nullptr.
struct Choice {
  int64_t rows, scores_row, row_offset, noise_row, noise_sample, grad_row, grad_slot;
  int32_t frames, slots, samples, each;
  const float* scores;
  const int64_t* seed;
  const float* noise;  // [R,n,N]
  const float* grad;   // [R,K,N]
  float sigma, temperature;
  bool by_score, gumbel;
  int64_t* indices;  // [R,K]
  float* weights;    // [R,K,N], zeros before
  // [R,2N+3]: how many frames can be chosen, a threshold that every choice reaches, how many
  // frames are chosen; the frames that can be chosen; each frame's slot in the choice, or -1.
  int32_t* plan;
  float* gains;  // [R,n]
  float* sums;   // [R,groups,N]
  float* to;     // [R,N]

  __host__ __device__ int64_t groups() const { return (samples + each - 1) / each; }
};

__device__ __forceinline__ int lane() { return threadIdx.x & 31; }
__device__ __forceinline__ float no_noise() { return -__int_as_float(0x7f800000); }

// What is no number is not to be chosen, either.
__device__ __forceinline__ float score_at(const float* scores, int frame) {
  const float x = scores[frame];
  return x > no_noise() ? x : no_noise();
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(kWarp, x, apart);
  return x;
}
__device__ __forceinline__ float min_of_warp(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x = fminf(x, __shfl_xor_sync(kWarp, x, apart));
  return x;
}

// Some of a row's frames, kOwn of them in each lane. Their positions, in time order, are frames
// themselves, of which a lane has whole quads, or numbers in a list.
template <int kOwn, bool kListed>
struct Tile {
  static_assert(kListed || kOwn % 4 == 0);

  static __device__ __forceinline__ int position(int e) {
    return kListed ? 32 * e + lane() : 128 * (e / 4) + 4 * lane() + e % 4;
  }

  // use(e, rank) for each of a lane's marked positions (bit e of `marked`), with its rank among all
  // marked positions of the warp.
  template <typename Use>
  static __device__ __forceinline__ void ranked(uint32_t marked, const Use& use) {
    const unsigned below = (1u << lane()) - 1;
    int before = 0;
    if constexpr (kListed) {
#pragma unroll
      for (int e = 0; e < kOwn; ++e) {
        const unsigned marks = __ballot_sync(kWarp, marked >> e & 1);
        if (marked >> e & 1) use(e, before + __popc(marks & below));
        before += __popc(marks);
      }
    } else {
#pragma unroll
      for (int first = 0; first < kOwn; first += 4) {
        int rank = before;
#pragma unroll
        for (int e = first; e < first + 4; ++e) {
          const unsigned marks = __ballot_sync(kWarp, marked >> e & 1);
          rank += __popc(marks & below);
          before += __popc(marks);
        }
#pragma unroll
        for (int e = first; e < first + 4; ++e) {
          if (marked >> e & 1) use(e, rank++);
        }
      }
    }
  }

  // Noise of a sample, given or drawn, for frames of the tile; `map` of words.
  template <typename Map>
  static __device__ __forceinline__ void draw(const Choice& c, int64_t row, uint64_t seed,
                                              int sample, const int (&frame)[kOwn],
                                              const Map& map, float (&z)[kOwn]) {
    if (c.noise) {
      const float* const given = c.noise + row * c.noise_row + sample * c.noise_sample;
#pragma unroll
      for (int e = 0; e < kOwn; ++e) z[e] = frame[e] < c.frames ? given[frame[e]] : 0.0f;
      return;
    }
    const uint64_t number = static_cast<uint64_t>(c.row_offset + row);
#pragma unroll
    for (int e = 0; e < kOwn; e += kListed ? 1 : 4) {
      const Words words = philox(frame[e] / 4, sample, number, seed);
      if constexpr (kListed) {
        const uint32_t low = frame[e] & 1 ? words.word[1] : words.word[0];
        const uint32_t high = frame[e] & 1 ? words.word[3] : words.word[2];
        z[e] = map(frame[e] & 2 ? high : low);
      } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) z[e + w] = map(words.word[w]);
      }
    }
  }

  static __device__ __forceinline__ int reaching(const int32_t (&key)[kOwn], int32_t threshold) {
    int count = 0;
#pragma unroll
    for (int e = 0; e < kOwn; ++e) count += key[e] >= threshold;
    return __reduce_add_sync(kWarp, count);
  }

  static __device__ __forceinline__ int32_t largest(const int32_t (&key)[kOwn]) {
    int32_t most = key[0];
#pragma unroll
    for (int e = 1; e < kOwn; ++e) most = max(most, key[e]);
    return __reduce_max_sync(kWarp, most);
  }

  // Marks the `count` best keys; as many or more are not below `least`. Among equals the first.
  static __device__ __forceinline__ uint32_t chosen(const int32_t (&key)[kOwn], int32_t least,
                                                    int count) {
    // `reached` keys, `count` or more, reach `low`; fewer reach `high`.
    int32_t low = least, high = largest(key) + 1;
    int reached = reaching(key, low);
    while (reached != count) {
      const int32_t middle = (low & high) + ((low ^ high) >> 1);
      if (middle <= low) break;
      const int passed = reaching(key, middle);
      if (passed >= count) {
        low = middle;
        reached = passed;
      } else {
        high = middle;
      }
    }
    uint32_t marked = 0, equal = 0;
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      marked |= static_cast<uint32_t>(key[e] >= low) << e;
      equal |= static_cast<uint32_t>(key[e] == low) << e;
    }
    if (reached > count) {  // the worst of them are all equal, and the first of these stay
      const int stay = __reduce_add_sync(kWarp, __popc(equal)) - (reached - count);
      ranked(equal, [&](int e, int rank) {
        if (rank >= stay) marked &= ~(1u << e);
      });
    }
    return marked;
  }

  // The position of the best key, the first one of equals.
  static __device__ __forceinline__ int best(const int32_t (&key)[kOwn]) {
    const int32_t most = largest(key);
    int first = INT32_MAX;
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      if (key[e] == most) first = min(first, position(e));
    }
    return __reduce_min_sync(kWarp, first);
  }
};

// The work of this warp, a row and in it a group of samples, if there is any.
__device__ __forceinline__ bool find_work(int64_t count, int64_t* work) {
  *work = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  return *work < count;
}

template <int kOwn>
__device__ __forceinline__ void load_row(const Choice& c, int64_t row, int (&frame)[kOwn],
                                         float (&score)[kOwn], int* real) {
  *real = 0;
#pragma unroll
  for (int e = 0; e < kOwn; ++e) {
    frame[e] = Tile<kOwn, false>::position(e);
    const bool inside = frame[e] < c.frames;
    score[e] = inside ? score_at(c.scores + row * c.scores_row, frame[e]) : no_noise();
    *real += score[e] > no_noise();
  }
  *real = __reduce_add_sync(kWarp, *real);
}

template <int kOwn>
__device__ __forceinline__ void add_gumbels(const Choice& c, int64_t row,
                                            const int (&frame)[kOwn], float (&key)[kOwn]) {
  float g[kOwn];
  Tile<kOwn, false>::draw(c, row, *c.seed, 0, frame, [](uint32_t w) { return gumbel_of(w); }, g);
#pragma unroll
  for (int e = 0; e < kOwn; ++e) key[e] = plus(key[e], g[e]);
}

// The choice of each row, under Gumbel noise if so wanted; and the plan.
template <int kOwn>
__global__ void __launch_bounds__(32 * kWarps, blocks_of(kOwn)) choice_kernel(const Choice c) {
  using Own = Tile<kOwn, false>;
  int64_t row;
  if (!find_work(c.rows, &row)) return;
  int frame[kOwn], real, slot[kOwn];
  float score[kOwn];
  load_row(c, row, frame, score, &real);
  const int found = min(real, c.slots);
  int32_t key[kOwn];
  {
    float noisy[kOwn];
#pragma unroll
    for (int e = 0; e < kOwn; ++e) noisy[e] = score[e];
    if (c.gumbel) add_gumbels(c, row, frame, noisy);
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      key[e] = ordinal_of(noisy[e]);
      slot[e] = -1;
    }
  }
  if (c.by_score) {
    for (int k = 0; k < found; ++k) {
      const int best = Own::best(key);
#pragma unroll
      for (int e = 0; e < kOwn; ++e) {
        if (frame[e] == best) {
          slot[e] = k;
          key[e] = kNever;
        }
      }
    }
  } else {
    const uint32_t chosen = Own::chosen(key, ordinal_of(kLowest), found);
    Own::ranked(chosen, [&](int e, int rank) { slot[e] = rank; });
  }
  if (c.indices) {
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      if (slot[e] >= 0) c.indices[row * c.slots + slot[e]] = frame[e];
    }
    for (int k = found + lane(); k < c.slots; k += 32) c.indices[row * c.slots + k] = -1;
  }
  if (c.weights) {
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      if (slot[e] >= 0) c.weights[(row * c.slots + slot[e]) * c.frames + frame[e]] = 1.0f;
    }
  }
  if (!c.plan) return;
  // A sample's best K keys are at least the worst score less what noise can take from it, rounded,
  // as rounding keeps order. A frame that cannot get there needs no noise.
  const float reach = c.noise ? -no_noise() : times(c.sigma, kLargestNormal);
  float worst = -no_noise();
#pragma unroll
  for (int e = 0; e < kOwn; ++e) {
    if (slot[e] >= 0) worst = fminf(worst, score[e]);
  }
  const float least = plus(min_of_warp(worst), -reach);
  uint32_t reachable = 0;
#pragma unroll
  for (int e = 0; e < kOwn; ++e) {
    const bool in = score[e] > no_noise() && plus(score[e], reach) >= least;
    reachable |= static_cast<uint32_t>(in) << e;
  }
  int32_t* const plan = c.plan + row * (2 * c.frames + 3);
  const int count = __reduce_add_sync(kWarp, __popc(reachable));
  if (lane() == 0) {
    plan[0] = count;
    plan[1] = ordinal_of(fmaxf(least, kLowest));
    plan[2] = found;
  }
  Own::ranked(reachable, [&](int e, int rank) { plan[3 + rank] = frame[e]; });
#pragma unroll
  for (int e = 0; e < kOwn; ++e) {
    if (frame[e] < c.frames) plan[3 + c.frames + frame[e]] = slot[e];
  }
}

enum class What { kCounts, kGains, kSums };

// Samples begin .. end of a row. `certain` more choose as the scores do.
template <int kOwn, bool kListed, What kWhat>
__device__ void draw_samples(const Choice& c, int64_t work, int64_t row, int begin, int end,
                             int certain) {
  using Own = Tile<kOwn, kListed>;
  const int32_t* const plan = c.plan + row * (2 * c.frames + 3);
  const int reachable = plan[0], least = plan[1], found = plan[2];
  const int64_t* const indices = c.indices + row * c.slots;
  int32_t* const counts =
      reinterpret_cast<int32_t*>(c.weights) + row * c.slots * static_cast<int64_t>(c.frames);
  const float* const grad = c.grad + row * c.grad_row;
  const uint64_t seed = *c.seed;
  int frame[kOwn], usual[kOwn], hits[kOwn];
  float score[kOwn], total[kOwn];
#pragma unroll
  for (int e = 0; e < kOwn; ++e) {
    const int position = Own::position(e);
    const bool inside = position < (kListed ? reachable : c.frames);
    // Beyond the last frame there is none that noise was given for.
    frame[e] = kListed ? (inside ? plan[3 + position] : c.frames) : position;
    score[e] = inside ? score_at(c.scores + row * c.scores_row, frame[e]) : no_noise();
    usual[e] = inside ? plan[3 + c.frames + frame[e]] : -1;
    hits[e] = certain;
    total[e] = 0.0f;
  }
  for (int sample = begin; sample < end; ++sample) {
    float z[kOwn], gain = 0.0f;
    int32_t key[kOwn];
    Own::draw(c, row, seed, sample, frame, [](uint32_t w) { return normal_of(w); }, z);
#pragma unroll
    for (int e = 0; e < kOwn; ++e) key[e] = ordinal_of(plus(score[e], times(z[e], c.sigma)));
    const auto use = [&](int e, int slot) {
      if constexpr (kWhat == What::kCounts) {
        if (slot == usual[e]) {
          ++hits[e];
        } else {
          atomicAdd(counts + static_cast<int64_t>(slot) * c.frames + frame[e], 1);
        }
      } else {
        const float* const own = grad + slot * c.grad_slot;
        if constexpr (kWhat == What::kSums) {
          total[e] += own[frame[e]] * z[e];
        } else if (slot != usual[e]) {
          gain += own[frame[e]] - own[indices[slot]];
        }
      }
    };
    if (c.by_score) {
      for (int slot = 0; slot < found; ++slot) {
        const int best = Own::best(key);
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {
          if (Own::position(e) == best) {
            use(e, slot);
            key[e] = kNever;
          }
        }
      }
    } else {
      Own::ranked(Own::chosen(key, least, found), use);
    }
    if constexpr (kWhat == What::kGains) {
      gain = sum_of_warp(gain);
      if (lane() == 0) c.gains[row * c.samples + sample] = gain;
    }
  }
#pragma unroll
  for (int e = 0; e < kOwn; ++e) {
    if constexpr (kWhat == What::kCounts) {
      if (usual[e] >= 0 && hits[e] > 0) {
        atomicAdd(counts + static_cast<int64_t>(usual[e]) * c.frames + frame[e], hits[e]);
      }
    } else if constexpr (kWhat == What::kSums) {
      if (frame[e] < c.frames) c.sums[work * c.frames + frame[e]] = total[e];
    }
  }
}

template <int kOwn, What kWhat>
__global__ void __launch_bounds__(32 * kWarps, blocks_of(kOwn)) sample_kernel(const Choice c) {
  int64_t work;
  if (!find_work(c.rows * c.groups(), &work)) return;
  const int64_t row = work / c.groups();
  const int begin = static_cast<int>(work % c.groups()) * c.each;
  int end = min(begin + c.each, c.samples), certain = 0;
  const int32_t* const plan = c.plan + row * (2 * c.frames + 3);
  const int reachable = plan[0], found = plan[2];
  const bool same = kWhat != What::kSums && !c.by_score && reachable == found;
  if (same || found == 0) {  // every sample chooses as the scores do
    certain = end - begin;
    end = begin;
  }
  if (reachable <= 64) {
    draw_samples<2, true, kWhat>(c, work, row, begin, end, certain);
  } else if (reachable <= 128) {
    draw_samples<4, true, kWhat>(c, work, row, begin, end, certain);
  } else {
    draw_samples<kOwn, false, kWhat>(c, work, row, begin, end, certain);
  }
}

__global__ void share_kernel(float* weights, int64_t count, float samples) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) weights[i] = __fdiv_rn(__int2float_rn(__float_as_int(weights[i])), samples);
}

// 1 / ((n - 1) sigma) sum_i (c_i - mean c) Z_it of a row for kQuads quads of frames.
__global__ void __launch_bounds__(kQuads * kTogether) gradient_kernel(const Choice c) {
  __shared__ float parts[kTogether][4][kQuads];
  const int64_t blocks = (c.frames + 4 * kQuads - 1) / (4 * kQuads);
  const int64_t row = blockIdx.x / blocks;
  const int quad = static_cast<int>(blockIdx.x % blocks) * kQuads + lane();
  const int part = threadIdx.x / 32;
  const float* const gains = c.gains + row * c.samples;
  float mean = 0.0f, size = 0.0f;
  for (int i = lane(); i < c.samples; i += 32) {
    mean += gains[i];
    size = fmaxf(size, fabsf(gains[i]));
  }
  // Of one sample alone there is no mean to take away.
  mean = c.samples > 1 ? sum_of_warp(mean) / static_cast<float>(c.samples) : 0.0f;
  const bool differs = __any_sync(kWarp, size != 0.0f);  // else no noise is needed

  const uint64_t seed = *c.seed, number = static_cast<uint64_t>(c.row_offset + row);
  float sum[4] = {};
  for (int i = part; differs && i < c.samples; i += kTogether) {
    const float gain = gains[i] - mean;
    if (c.noise) {
      const float* const given = c.noise + row * c.noise_row + i * c.noise_sample;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int frame = 4 * quad + w;
        if (frame < c.frames) sum[w] = __fmaf_rn(gain, given[frame], sum[w]);
      }
    } else {
      const Words words = philox(quad, i, number, seed);
#pragma unroll
      for (int w = 0; w < 4; ++w) sum[w] = __fmaf_rn(gain, normal_of(words.word[w]), sum[w]);
    }
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) parts[part][w][lane()] = sum[w];
  __syncthreads();
  if (part >= 4) return;
  const int frame = 4 * quad + part;
  if (frame >= c.frames) return;
  float all = 0.0f;
#pragma unroll
  for (int i = 0; i < kTogether; ++i) all += parts[i][part][lane()];
  const bool real = score_at(c.scores + row * c.scores_row, frame) > no_noise();
  // One after the other: their product may be too small for a float.
  const float others = static_cast<float>(max(c.samples - 1, 1));
  c.to[row * c.frames + frame] = real ? __fdiv_rn(__fdiv_rn(all, others), c.sigma) : 0.0f;
}

template <int kOwn>
__global__ void __launch_bounds__(32 * kWarps, blocks_of(kOwn))
    gumbel_backward_kernel(const Choice c) {
  using Own = Tile<kOwn, false>;
  int64_t row;
  if (!find_work(c.rows, &row)) return;
  int frame[kOwn], real;
  float key[kOwn], total[kOwn];
  load_row(c, row, frame, key, &real);
  uint32_t is_real = 0;
#pragma unroll
  for (int e = 0; e < kOwn; ++e) {
    is_real |= static_cast<uint32_t>(key[e] > no_noise()) << e;
    total[e] = 0.0f;
  }
  add_gumbels(c, row, frame, key);
  const int found = min(real, c.slots);
  const int64_t* const indices = c.indices + row * c.slots;
  for (int j = 0; j < found; ++j) {
    int32_t order[kOwn];
#pragma unroll
    for (int e = 0; e < kOwn; ++e) order[e] = ordinal_of(key[e]);
    const int pick = Own::best(order);
    float best = no_noise();
#pragma unroll
    for (int e = 0; e < kOwn; ++e) best = frame[e] == pick ? key[e] : best;
    best = -min_of_warp(-best);
    int slot = c.slots - 1;
    for (int k = lane(); k < c.slots; k += 32) {
      if (indices[k] == pick) slot = k;
    }
    slot = __reduce_min_sync(kWarp, slot);
    // p = softmax of what is left. G less its value at the pick says the same, without cancellation
    // where the pick has nearly all of p.
    const float* const grad = c.grad + row * c.grad_row + slot * c.grad_slot;
    const float at_pick = grad[pick];
    float share[kOwn], all = 0.0f, with_gain = 0.0f;
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      share[e] = is_real >> e & 1 ? expf((key[e] - best) / c.temperature) : 0.0f;
      all += share[e];
      if (frame[e] < c.frames) with_gain += share[e] * (grad[frame[e]] - at_pick);
    }
    const float scale = 1.0f / sum_of_warp(all);
    const float mean = sum_of_warp(with_gain) * scale;
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      if (frame[e] >= c.frames) continue;
      total[e] += share[e] * scale * (grad[frame[e]] - at_pick - mean);
      if (frame[e] == pick) key[e] = no_noise();
    }
  }
#pragma unroll
  for (int e = 0; e < kOwn; ++e) {
    if (frame[e] >= c.frames) continue;
    c.to[row * c.frames + frame[e]] = is_real >> e & 1 ? total[e] / c.temperature : 0.0f;
  }
}

}  // namespace
}  // namespace topk_sampling
}  // namespace vd
