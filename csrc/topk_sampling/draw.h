// Words, normals and Gumbels as docs/noise.md specifies them, one at a time, on host and device.
//
// Nothing here may be fused: on the device by intrinsics that never are, on the host by the
// compiler's flags.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "topk_sampling/coefficients.h"

#if defined(__CUDACC__)
#define VD_BOTH __host__ __device__ __forceinline__
#else
#define VD_BOTH inline
#endif

namespace vd {
namespace topk_sampling {

#if defined(__CUDA_ARCH__)
VD_BOTH float times(float a, float b) { return __fmul_rn(a, b); }
VD_BOTH float plus(float a, float b) { return __fadd_rn(a, b); }
VD_BOTH float root_of(float x) { return __fsqrt_rn(x); }
VD_BOTH float to_float(int32_t x) { return __int2float_rn(x); }
#else
VD_BOTH float times(float a, float b) { return a * b; }
VD_BOTH float plus(float a, float b) { return a + b; }
VD_BOTH float root_of(float x) { return std::sqrt(x); }
VD_BOTH float to_float(int32_t x) { return static_cast<float>(x); }
#endif

VD_BOTH int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
VD_BOTH float of_bits(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Integers in the order of floats; + 0.0 makes -0.0 the 0.0 that it equals.
VD_BOTH int32_t ordinal_of(float x) {
  const int32_t bits = bits_of(plus(x, 0.0f));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

struct Words {
  uint32_t word[4];
};

// Philox-4x32-10.
VD_BOTH Words philox(uint32_t quad, uint32_t sample, uint64_t row, uint64_t seed) {
  uint32_t c0 = quad, c1 = sample;
  uint32_t c2 = static_cast<uint32_t>(row), c3 = static_cast<uint32_t>(row >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Horner's rule from coefficient kTerm down; the device wants them as constants.
template <int kTerm>
VD_BOTH float log2_terms(float sum, float h) {
  constexpr float coefficient = kLog2[kTerm];
  sum = plus(times(sum, h), coefficient);
  if constexpr (kTerm > 0) {
    return log2_terms<kTerm - 1>(sum, h);
  } else {
    return sum;
  }
}
template <int kTerm>
VD_BOTH float probit_terms(float sum, float root) {
  constexpr float coefficient = kProbit[kTerm];
  sum = plus(times(sum, root), coefficient);
  if constexpr (kTerm > 0) {
    return probit_terms<kTerm - 1>(sum, root);
  } else {
    return sum;
  }
}

// y = (1 + h) 2^k with 1/sqrt(2) <= 1 + h < sqrt(2).
VD_BOTH float split(float y, int32_t* k) {
  const int32_t bits = bits_of(y);
  *k = (bits - 0x3F3504F3) >> 23;
  return plus(of_bits(bits - *k * (1 << 23)), -1.0f);
}

// log2((1 + h) 2^k).
VD_BOTH float log2_of(float h, int32_t k) {
  constexpr float highest = kLog2[8];
  return plus(times(log2_terms<7>(highest, h), h), to_float(k));
}

VD_BOTH float normal_of(uint32_t word) {
  const int32_t bits = static_cast<int32_t>(word);
  const int32_t end = bits ^ (bits >> 31);  // distance from the nearer end
  const float tail = plus(to_float(end), 0.5f), centre = plus(to_float(0x7fffffff - end), 0.5f);
  int32_t k;
  const float h = split(times(times(tail, 0x1p-30f), plus(1.0f, -times(tail, 0x1p-32f))), &k);
  const float root = plus(root_of(plus(3.0f, -log2_of(h, k))), -4.0f);
  constexpr float highest = kProbit[10];
  const float size = times(probit_terms<9>(highest, root), times(centre, 0x1p-31f));
  return bits < 0 ? size : -size;
}

VD_BOTH float gumbel_of(uint32_t word) {
  const int32_t bits = static_cast<int32_t>(word);
  const float p = times(plus(to_float(bits ^ (bits >> 31)), 0.5f), 0x1p-32f);
  int32_t k;
  float h = split(bits < 0 ? plus(1.0f, -p) : p, &k);
  if (k == 0) h = -p;  // 1 - p so close to 1 that p is known better
  h = split(-log2_of(h, k), &k);
  return plus(0x1.774f2ap-2f, -times(log2_of(h, k), 0x1.62e430p-1f));
}

}  // namespace topk_sampling
}  // namespace vd
