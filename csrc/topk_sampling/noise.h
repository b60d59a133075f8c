// Words, normals and Gumbels as docs/noise.md specifies them, bit for bit on every instruction set.
//
// Nothing here may be fused or reordered, so `fma` of simd.h has no place in this file.
#pragma once

#include "common/simd.h"
#include "topk_sampling/coefficients.h"

namespace vd {
namespace VD_ISA {

using topk_sampling::kLargestNormal;
using topk_sampling::kLog2;
using topk_sampling::kProbit;

// One counter of Philox lies in each 64-bit lane; only the lower half of a lane counts.
typedef uint64_t W __attribute__((vector_size(4 * kLanes)));

constexpr int kQuads = kLanes / 2;  // counters of a vector; each serves four frames, a quad
// The maps from words work on several vectors in step: one alone would wait for each result.
constexpr int kStep = 4;
constexpr int kGroup = kStep * kLanes;  // what is drawn comes in multiples of this

VD_INLINE W broadcast_word(uint32_t x) { return x - W{}; }

// Products of the lower halves.
VD_INLINE W multiply(W a, W b) {
#if VD_INTRINSICS == 512
  return (W)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif VD_INTRINSICS == 256
  return (W)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// Two words of each counter, in pairs -> four words of half the counters. The counters of the even
// lanes come first, then those of the odd lanes.
VD_INLINE void unpack(W first, W second, U* even, U* odd) {
#if VD_INTRINSICS == 512
  *even = (U)_mm512_unpacklo_epi64((__m512i)first, (__m512i)second);
  *odd = (U)_mm512_unpackhi_epi64((__m512i)first, (__m512i)second);
#elif VD_INTRINSICS == 256
  *even = (U)_mm256_unpacklo_epi64((__m256i)first, (__m256i)second);
  *odd = (U)_mm256_unpackhi_epi64((__m256i)first, (__m256i)second);
#else
  W low, high;
  for (int i = 0; i < kQuads; i += 2) {
    low[i] = first[i], low[i + 1] = second[i];
    high[i] = first[i + 1], high[i + 1] = second[i + 1];
  }
  *even = (U)low;
  *odd = (U)high;
#endif
}

// Philox-4x32-10 for one row.
//
// Of the counter (quad, sample, row low, row high) the first rounds mix quad and sample only a
// little: what they make of quad and row alone is kept in a table, and what they make of sample
// and row in two words. Seven and a half rounds remain.
class Philox {
 public:
  Philox(uint64_t seed, uint64_t row) {
    for (uint32_t i = 0; i < kRounds; ++i) {
      key_[i][0] = static_cast<uint32_t>(seed) + i * 0x9E3779B9;
      key_[i][1] = static_cast<uint32_t>(seed >> 32) + i * 0xBB67AE85;
    }
    row_high_ = static_cast<uint32_t>(row >> 32);
    row_product_ = (row & 0xffffffff) * kSecond;
  }

  static constexpr int64_t table_floats(int64_t padded) { return 2 * padded; }

  // The table of these quads, padded by others, which are nobody's, to `padded` frames.
  void prepare(const int32_t* quads, int64_t count, int64_t padded, float* table) const {
    for (int64_t start = 0; start < padded / 4; start += kQuads, table += 4 * kLanes) {
      W state[4] = {};
      for (int lane = 0; lane < kQuads; ++lane) {
        // so that `unpack` puts them in order
        const int64_t i = start + lane / 2 + lane % 2 * (kQuads / 2);
        const uint64_t quad = i < count ? quads[i] : 0;
        const uint64_t p0 = quad * kFirst;
        const uint64_t p1 = ((p0 >> 32) ^ row_high_ ^ key_[0][1]) * kSecond;
        const uint64_t mixed = (p1 >> 32) ^ (row_product_ & 0xffffffff) ^ key_[1][0];
        const uint64_t next = mixed * kFirst;
        state[0][lane] = p0;
        state[1][lane] = p1 ^ key_[2][0];
        state[2][lane] = (next >> 32) ^ key_[2][1];
        state[3][lane] = next;
      }
      std::memcpy(table, state, sizeof state);
    }
  }

  // Words of one sample, one for each frame of the table.
  void words(const float* table, int64_t padded, uint32_t sample, float* to) const {
    const uint64_t product = ((row_product_ >> 32) ^ sample ^ key_[0][0]) * kFirst;
    const W high = broadcast_word(static_cast<uint32_t>(product >> 32) ^ key_[1][1]);
    const W low = broadcast_word(static_cast<uint32_t>(product));
    const W first = broadcast_word(kFirst), second = broadcast_word(kSecond);
    for (int64_t i = 0; i < padded; i += 2 * kLanes, table += 4 * kLanes, to += 2 * kLanes) {
      const auto state = [&](int i) { return (W)load(table + i * kLanes); };
      W p1 = multiply(state(0) ^ high, second);
      W c0 = (p1 >> 32) ^ state(1), c1 = p1, c2 = state(2) ^ low, c3 = state(3);
      for (int round = 3; round < kRounds; ++round) {
        const W p0 = multiply(c0, first);
        p1 = multiply(c2, second);
        c0 = (p1 >> 32) ^ (c1 ^ broadcast_word(key_[round][0]));
        c2 = (p0 >> 32) ^ (c3 ^ broadcast_word(key_[round][1]));
        c1 = p1;
        c3 = p0;
      }
      U even, odd;
      unpack((c0 & 0xffffffff) | (c1 << 32), (c2 & 0xffffffff) | (c3 << 32), &even, &odd);
      store(to, (F)even);
      store(to + kLanes, (F)odd);
    }
  }

 private:
  static constexpr int kRounds = 10;
  static constexpr uint32_t kFirst = 0xD2511F53, kSecond = 0xCD9E8D57;
  uint32_t key_[kRounds][2];
  uint32_t row_high_;
  uint64_t row_product_;
};

template <int kTerms>
VD_INLINE void polynomial(const float (&coefficients)[kTerms], const F* x, F* sum) {
  for (int v = 0; v < kStep; ++v) sum[v] = broadcast(coefficients[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) {
    for (int v = 0; v < kStep; ++v) sum[v] = sum[v] * x[v] + coefficients[i];
  }
}

// y = (1 + h) 2^k with 1/sqrt(2) <= 1 + h < sqrt(2).
VD_INLINE void split(F y, F* h, I* k) {
  const I bits = float_to_bits(y);
  *k = (bits - 0x3F3504F3) >> 23;
  *h = bits_to_float(bits - (*k << 23)) - 1.0f;
}

VD_INLINE void log2_of(const F* h, const I* k, F* out) {
  polynomial(kLog2, h, out);
  for (int v = 0; v < kStep; ++v) out[v] = out[v] * h[v] + __builtin_convertvector(k[v], F);
}

// n words, in place, become normals; n is a multiple of kGroup.
inline void normals(float* words, int64_t n) {
  for (int64_t i = 0; i < n; i += kStep * kLanes) {
    F h[kStep], log2[kStep], root[kStep], size[kStep];
    I k[kStep], word[kStep], end[kStep];  // end: distance from the nearer end
    for (int v = 0; v < kStep; ++v) {
      word[v] = float_to_bits(load(words + i + v * kLanes));
      end[v] = word[v] ^ (word[v] >> 31);
      const F tail = __builtin_convertvector(end[v], F) + 0.5f;
      split((tail * 0x1p-30f) * (1.0f - tail * 0x1p-32f), h + v, k + v);
    }
    log2_of(h, k, log2);
    for (int v = 0; v < kStep; ++v) root[v] = sqrt(3.0f - log2[v]) - 4.0f;
    polynomial(kProbit, root, size);
    for (int v = 0; v < kStep; ++v) {
      const F centre = __builtin_convertvector(0x7fffffff - end[v], F) + 0.5f;
      const I z = float_to_bits(size[v] * (centre * 0x1p-31f));
      store(words + i + v * kLanes, bits_to_float(z ^ (~word[v] & INT32_MIN)));
    }
  }
}

// n words, in place, become Gumbels; n is a multiple of kGroup.
inline void gumbels(float* words, int64_t n) {
  for (int64_t i = 0; i < n; i += kStep * kLanes) {
    F h[kStep], exponential[kStep], log2[kStep];
    I k[kStep], word[kStep];
    for (int v = 0; v < kStep; ++v) {
      word[v] = float_to_bits(load(words + i + v * kLanes));
      const I upper = word[v] >> 31;
      const F p = (__builtin_convertvector(word[v] ^ upper, F) + 0.5f) * 0x1p-32f;
      split(select(upper, 1.0f - p, p), h + v, k + v);
      h[v] = select(k[v] == 0, -p, h[v]);  // 1 - p so close to 1 that p is known better
    }
    log2_of(h, k, exponential);
    for (int v = 0; v < kStep; ++v) split(-exponential[v], h + v, k + v);
    log2_of(h, k, log2);
    for (int v = 0; v < kStep; ++v) {
      store(words + i + v * kLanes, 0x1.774f2ap-2f - log2[v] * 0x1.62e430p-1f);
    }
  }
}

}  // namespace VD_ISA
}  // namespace vd
