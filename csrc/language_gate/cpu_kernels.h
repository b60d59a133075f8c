// What language_gate's kernels are given: plain pointers and strides.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/levels.h"

namespace vd {
namespace language_gate {

enum class Reduction { kSoftmax, kMax, kMean };

// [B,L,H,D] or [B,M,H,D]: elements are contiguous along the last dimension.
struct Tokens {
  const void* data;
  int64_t batch, token, head;  // strides in elements
};

// Packs the real tokens of each question as floats times `factor`, or their mean alone.
struct Packing {
  Dtype dtype;
  Tokens from;
  int64_t tokens, heads, width, padded;
  const bool* real;  // [B,M] or nullptr
  float factor;
  bool mean;
  float* columns;  // [B,H,width rounded up,padded], or
  float* rows;     // [B,H,padded,width rounded up], or neither: backward packs for itself
};

// The way back for gradients: sums over chunks go to the real tokens, zeros to the others.
struct Unpacking {
  Dtype dtype;
  int64_t tokens, heads, width, padded, chunks;
  const bool* real;
  float factor;
  bool mean;
  float* sums;  // [B,H,chunks,padded,width rounded up]; nullptr where a task unpacks its own
  void* to;     // [B,M,H,width]; nullptr where it is not wanted
};

// Absent tensors have data == nullptr. Results are contiguous.
struct Arguments {
  Dtype dtype;
  int64_t batch, length, heads, width, channels;  // B, L, H, D, Dv
  Tokens query, value;
  const float* bias;  // [H] or [H,Dv]
  Reduction reduction;
  float scale;
  bool per_channel;

  // The question, packed: of each question its real tokens alone, in floats (or in pairs of bfloat16,
  // which take half of the room; see pairs.h), keys times scale unless in pairs. Forward finds keys
  // in columns [B,H,D',padded] and gate values in rows [B,H,padded,Dv'], where D' and Dv' are D and
  // Dv rounded up to whole vectors.
  int64_t padded;        // most real tokens of a question, rounded up likewise
  const int64_t* count;  // [B] real tokens
  Packing key, gate_value;

  bool stream;  // results are too large to stay in the cache
  void* out;    // [B,L,H,Dv]
  void* gate;   // [B,L,H] or [B,L,H,Dv]

  // Backward. A chunk is a stretch of the L tokens whose sums are formed in one go. `whole`: a task
  // has all chunks of its heads, adds up their sums itself and unpacks them.
  Tokens grad_out, grad_gate;
  void* grad_query;  // [B,L,H,D]
  void* grad_value;  // [B,L,H,Dv]
  int64_t chunks;
  bool whole;
  Unpacking grad_key, grad_gate_value;
  float* grad_bias;  // [B,H,chunks] or [B,H,chunks,Dv']
};

struct Kernels {
  int lanes;  // what tokens of the question are rounded up to
  int64_t (*row_step)(Dtype, bool mean);  // what D and Dv are rounded up to
  int64_t (*forward_scratch)(const Arguments&);  // floats that one thread needs
  // Blocks begin .. end of B * ceil(L / kBlock): a block is kBlock tokens with all their heads.
  void (*forward)(const Arguments&, int64_t begin, int64_t end, float* scratch);
  int64_t (*backward_scratch)(const Arguments&);
  // Tasks begin .. end of B * ceil(H / kHeads), times chunks unless `whole`.
  void (*backward)(const Arguments&, int64_t begin, int64_t end, float* scratch);
  // Heads begin .. end of B * H. Scratch: padded * (width rounded up).
  void (*pack)(const Packing&, int64_t begin, int64_t end, float* scratch);
  // Scratch: width rounded up.
  void (*unpack)(const Unpacking&, int64_t begin, int64_t end, float* scratch);
};

constexpr int64_t kBlock = 48;
constexpr int64_t kHeads = 4;  // whose gradients one task forms: they lie side by side

}  // namespace language_gate

VD_DECLARE_KERNELS(language_gate::Kernels, language_gate_kernels)

}  // namespace vd
