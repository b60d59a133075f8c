// What topk_sample's and topk_gather's kernels are given: plain pointers and strides.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/levels.h"

namespace vd {
namespace topk_sampling {

// A choice of K of N frames. Of a tensor that a kernel does not take, data is nullptr.
struct Choice {
  int64_t rows, frames, slots;  // R, N, K
  const float* scores;          // [R,N], -inf in frames that are not to be chosen
  bool by_score;                // slots best first, not in time order

  // Noise: given, or else drawn for row row_offset + r.
  uint64_t seed, row_offset;
  const float* noise;  // [R,n,N]: contiguous along frames
  int64_t noise_row, noise_sample;

  float* weights;    // [R,K,N]; zeros when a kernel gets them
  int64_t* indices;  // [R,K]
  bool* slot_mask;   // [R,K]

  // "perturbed": a row's n samples are divided into chunks of one task each.
  double sigma;
  int64_t samples, chunks;

  // Backward.
  const float* grad;  // [R,K,N]
  bool diagonal;
  float temperature;
  float* sums;         // [R,chunks,sums_floats]: what a chunk adds to the gradient
  float* grad_scores;  // [R,N]
};

// Of one row with E values in each frame; rows and frames of `values`, `grad` have any strides.
struct Gather {
  Dtype dtype;
  int64_t rows, frames, slots, width;  // R, N, K, E
  const void* values;                  // [R,N,E]
  int64_t values_row, values_frame;
  const float* weights;    // [R,K,N], or [R,N] where indices are given
  const int64_t* indices;  // [R,K]
  void* out;               // [R,K,E]
  int64_t part;            // of E, that one task takes

  // Backward.
  const void* grad;  // [R,K,E]
  int64_t grad_row, grad_slot;
  void* grad_values;    // [R,N,E]
  float* grad_weights;  // as weights
};

// Kernels do tasks begin .. end; `scratch` holds what choice_scratch or gather_scratch says.
struct Kernels {
  int64_t (*choice_scratch)(const Choice&);
  int64_t (*sums_floats)(const Choice&);
  // A task is a row ...
  int64_t (*unordered)(const Choice&, int64_t begin, int64_t end);  // scores NaN or +inf
  void (*hard)(const Choice&, int64_t begin, int64_t end, float* scratch);
  void (*gumbel)(const Choice&, int64_t begin, int64_t end, float* scratch);
  void (*gumbel_backward)(const Choice&, int64_t begin, int64_t end, float* scratch);
  // ... or a chunk of one: integer counts in `weights`, and then what they amount to
  void (*perturbed)(const Choice&, int64_t begin, int64_t end, float* scratch);
  void (*counts_to_weights)(const Choice&, int64_t begin, int64_t end);
  void (*perturbed_backward)(const Choice&, int64_t begin, int64_t end, float* scratch);
  void (*add_chunks)(const Choice&, int64_t begin, int64_t end);

  int64_t (*gather_scratch)(const Gather&);
  // Tasks are R * ceil(E / part) parts of rows, or R * ceil(N / kFrames) for the weights.
  void (*gather)(const Gather&, int64_t begin, int64_t end, float* scratch);
  void (*gather_backward_values)(const Gather&, int64_t begin, int64_t end, float* scratch);
  void (*gather_backward_weights)(const Gather&, int64_t begin, int64_t end, float* scratch);
};

constexpr int64_t kWidth = 2048;  // values of all rows that lie in the cache while they are summed
constexpr int64_t kFrames = 48;

}  // namespace topk_sampling

VD_DECLARE_KERNELS_WITHOUT_PRODUCTS(topk_sampling::Kernels, topk_sampling_kernels)

}  // namespace vd
