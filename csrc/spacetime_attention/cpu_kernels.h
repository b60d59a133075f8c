// What spacetime_attention's kernels are given: plain pointers and strides.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/levels.h"

namespace vd {
namespace spacetime_attention {

enum class Axis { kTime, kSpace, kJoint };

// [B,T,S,H,D], elements contiguous along D. Strides in elements, 0 where it is broadcast.
struct Video {
  const void* data;
  int64_t batch, frame, patch, head;
};

// [B,G,P,H,D] likewise.
struct Prefix {
  const void* data;
  int64_t batch, group, token, head;
};

// As a Video; one number for all of D where `width` is 0.
struct Gate {
  const void* data;
  Dtype dtype;
  int64_t batch, frame, patch, head, width;
};

// Absent tensors have data == nullptr. Results are contiguous.
struct Arguments {
  Dtype dtype;
  Axis axis;
  int64_t batch, frames, patches, heads, width;  // B, T, S, H, D
  int64_t groups, length;                        // G groups of L tokens
  int64_t prefixes;                              // P
  int64_t window[3];  // half-widths in frames, rows and columns of the grid; -1: unlimited
  int64_t columns;    // of the grid
  bool causal;
  const bool* real;  // keys that may be seen: [B,T] or [B,T,S]
  bool real_patches;
  float scale;
  bool stream;  // results are too large to stay in the cache
  Video query, key, value;
  Prefix prefix_query, prefix_key, prefix_value;
  Gate gate;

  void* out;         // [B,T,S,H,D]
  void* prefix_out;  // [B,G,P,H,D]

  // Backward. Gradients of prefixes and gate are floats, not yet summed where those are broadcast, but
  // for `grad_gate_narrow`: the gate's are of the dtype of all others.
  Video grad_out;
  Prefix grad_prefix_out;
  void *grad_query, *grad_key, *grad_value;                          // [B,T,S,H,D]
  float *grad_prefix_query, *grad_prefix_key, *grad_prefix_value;  // [B,G,P,H,D]
  void* grad_gate;  // [B,T,S,H,D], or [B,T,S,H] for a gate whose width is 0
  bool grad_gate_narrow;
};

struct Kernels {
  int64_t (*tasks)(const Arguments&);  // each some heads of one group
  int64_t (*forward_scratch)(const Arguments&);  // floats that one thread needs
  void (*forward)(const Arguments&, int64_t begin, int64_t end, float* scratch);
  int64_t (*backward_scratch)(const Arguments&);
  void (*backward)(const Arguments&, int64_t begin, int64_t end, float* scratch);
};

}  // namespace spacetime_attention

VD_DECLARE_KERNELS(spacetime_attention::Kernels, spacetime_attention_kernels)

}  // namespace vd
