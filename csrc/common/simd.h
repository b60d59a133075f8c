// Vectors of floats as wide as the instruction set that this file is compiled for.
//
// Kernels are compiled once for each level of cpu_isa.h (those that add products of bfloat16 alone for
// it alone), each time into a namespace of its own (VD_ISA, a word that setup.py sets), and must not
// use templates of std or torch: the linker keeps one copy of those, and it might be the one with
// instructions that this machine lacks.
//
// Floating-point contraction is off (setup.py): where a multiply-add is fused, it says `fma`.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

// VD_INTRINSICS is the width in bits that intrinsics are used for. VD_LANES may be set to try wide code
// on a narrow machine, which then does without them.
#if defined(VD_LANES)
#define VD_INTRINSICS 0
#elif defined(__AVX512F__)
#include <immintrin.h>
#define VD_LANES 16
#define VD_INTRINSICS 512
#elif defined(__AVX2__)
#include <immintrin.h>
#define VD_LANES 8
#define VD_INTRINSICS 256
#else
#define VD_LANES 4
#define VD_INTRINSICS 0
#endif

// Whether products of bfloat16 are formed as they lie in memory, two at a time; see pairs.h. It may be
// set to try that on a machine without the instruction.
#if !defined(VD_PAIRS) && defined(__AVX512BF16__)
#define VD_PAIRS 1
#endif

// Whether those products are formed by tiles; see tiles.h.
#if VD_PAIRS && defined(__AMX_BF16__)
#define VD_TILES 1
#else
#define VD_TILES 0
#endif

#define VD_INLINE inline __attribute__((always_inline))
#define VD_UNROLL _Pragma("GCC unroll 16")

namespace vd {

// Sixteen-bit floats in memory; arithmetic is on floats.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

namespace VD_ISA {

constexpr int kLanes = VD_LANES;

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

VD_INLINE F broadcast(float x) { return x - F{}; }
VD_INLINE I broadcast(int32_t x) { return x - I{}; }

VD_INLINE F load(const float* from) {
  F x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
VD_INLINE void store(float* to, F x) { std::memcpy(to, &x, sizeof x); }

VD_INLINE F bits_to_float(I bits) { return (F)bits; }
VD_INLINE I float_to_bits(F x) { return (I)x; }

VD_INLINE F select(I where, F yes, F no) { return where ? yes : no; }

// a * b + c in one rounding where the machine has it.
VD_INLINE F fma(F a, F b, F c) {
#if VD_INTRINSICS == 512
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VD_INTRINSICS == 256
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Of units, two bfloat16 in a float's place: c + a0 * b0 + a1 * b1.
VD_INLINE F fma_pairs(F a, F b, F c) {
#if defined(__AVX512BF16__) && VD_INTRINSICS == 512
  return (F)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  const U low = (U)a << 16, other = (U)b << 16;
  c = fma((F)low, (F)other, c);
  return fma((F)((U)a & 0xffff0000), (F)((U)b & 0xffff0000), c);
#endif
}

VD_INLINE F max(F a, F b) {
#if VD_INTRINSICS == 512
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif VD_INTRINSICS == 256
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

VD_INLINE F sqrt(F x) {
#if VD_INTRINSICS == 512
  return (F)_mm512_sqrt_ps((__m512)x);
#elif VD_INTRINSICS == 256
  return (F)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// Lanes where `where` is set, as bits.
VD_INLINE uint32_t movemask(I where) {
#if VD_INTRINSICS == 512
  return _mm512_movepi32_mask((__m512i)where);
#elif VD_INTRINSICS == 256
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)where));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(where[i] != 0) << i;
  return bits;
#endif
}

// Sums and maxima over lanes: halves are folded, always in the same order.
#if VD_INTRINSICS
VD_INLINE __m128 halves_added(__m256 x) {
  return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}
VD_INLINE __m128 halves_max(__m256 x) {
  return _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}
#endif
#if VD_INTRINSICS == 512
VD_INLINE __m256 halves_added(__m512 x) {
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
VD_INLINE __m256 halves_max(__m512 x) {
  return _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
#endif

VD_INLINE float reduce_add(F x) {
#if VD_INTRINSICS == 512
  __m128 y = halves_added(halves_added((__m512)x));
#elif VD_INTRINSICS == 256
  __m128 y = halves_added((__m256)x);
#endif
#if VD_INTRINSICS
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
#else
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
#endif
}
VD_INLINE float reduce_max(F x) {
#if VD_INTRINSICS == 512
  __m128 y = halves_max(halves_max((__m512)x));
#elif VD_INTRINSICS == 256
  __m128 y = halves_max((__m256)x);
#endif
#if VD_INTRINSICS
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
#else
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  }
  return x[0];
#endif
}

// --- sixteen-bit floats: widening is exact, narrowing rounds to nearest, ties to even ------------

VD_INLINE float widen(float x) { return x; }

VD_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

VD_INLINE float widen(Half x) {
  // Shift exponent and fraction into a float's place; a multiplication mends the exponent's bias,
  // for subnormals too. Infinities and NaN need the largest exponent.
  uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  wide *= 0x1p112f;
  std::memcpy(&bits, &wide, sizeof wide);
  if (wide >= 0x1p16f) bits |= 0x7f800000;
  bits |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

VD_INLINE void narrow(float x, float* to) { *to = x; }

VD_INLINE void narrow(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>(nan ? 0x7fc0 : rounded);
}

VD_INLINE void narrow(float x, Half* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds to 2^16 or more
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // below 2^-14: adding 1/2 leaves units of 2^-24 as the last bit
    float size;
    std::memcpy(&size, &bits, sizeof size);
    size += 0.5f;
    std::memcpy(&half, &size, sizeof half);
    half -= 0x3f000000;
  } else {
    half = (bits + 0xc8000fff + ((bits >> 13) & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

VD_INLINE F load(const BFloat16* from) {
  H bits;
  std::memcpy(&bits, from, sizeof bits);
  return (F)(__builtin_convertvector(bits, U) << 16);
}

VD_INLINE F load(const Half* from) {
#if VD_INTRINSICS == 512
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif VD_INTRINSICS == 256
  return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  F x;
  for (int i = 0; i < kLanes; ++i) x[i] = widen(from[i]);
  return x;
#endif
}

// As bfloat16, in the lower half of each lane.
VD_INLINE U rounded(F x) {
#if defined(__AVX512BF16__) && VD_INTRINSICS == 512
  return __builtin_convertvector((H)_mm512_cvtneps_pbh((__m512)x), U);
#else
  const U bits = (U)x;
  return x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0 - U{};
#endif
}

// As the bits of what a pointer points to.
VD_INLINE H narrowed(F x, const BFloat16*) {
#if defined(__AVX512BF16__) && VD_INTRINSICS == 512
  return (H)_mm512_cvtneps_pbh((__m512)x);
#else
  return __builtin_convertvector(rounded(x), H);
#endif
}

template <typename T>
constexpr bool is_bfloat16 = false;
template <>
inline constexpr bool is_bfloat16<BFloat16> = true;

// Whether two vectors are narrowed to bfloat16 at once.
#if defined(__AVX512BF16__) && VD_INTRINSICS == 512
#define VD_NARROWS_TWO 1
VD_INLINE U narrowed_both(F first, F second) {
  return (U)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
#endif

VD_INLINE H narrowed(F x, const Half*) {
#if VD_INTRINSICS == 512
  return (H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif VD_INTRINSICS == 256
  return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  H bits;
  for (int i = 0; i < kLanes; ++i) {
    Half one;
    narrow(x[i], &one);
    bits[i] = one.bits;
  }
  return bits;
#endif
}

template <typename T>
VD_INLINE void store(T* to, F x) {
  const H bits = narrowed(x, to);
  std::memcpy(to, &bits, sizeof bits);
}

// run(T{}) for what tensors hold.
template <typename Run>
VD_INLINE void by_dtype(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kFloat:
      return run(float{});
    case Dtype::kBFloat16:
      return run(BFloat16{});
    case Dtype::kHalf:
      return run(Half{});
  }
}

// The same for what kernels are run for. Levels that add products of bfloat16, and nothing else, are run
// for it alone (levels.h), and compiled for it alone.
template <typename Run>
VD_INLINE void by_own_dtype(Dtype dtype, const Run& run) {
#if defined(VD_BFLOAT16_ALONE)
  (void)dtype;
  run(BFloat16{});
#else
  by_dtype(dtype, run);
#endif
}

// --- rows: n elements that need not fill whole vectors -------------------------------------------

// n elements as floats times `factor`, zeros up to a multiple of kLanes.
template <typename T>
VD_INLINE void load_row(const T* from, int64_t n, float* to, float factor = 1.0f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i) * factor);
  if (i == n) return;
  store(to + i, F{});
  for (; i < n; ++i) to[i] = widen(from[i]) * factor;
}

// The first n of floats whose number is padded to a multiple of kLanes, times `factor`.
template <typename T>
VD_INLINE void store_row(const float* from, int64_t n, float factor, T* to) {
  int64_t i = 0;
#if VD_NARROWS_TWO
  for (; is_bfloat16<T> && i + 2 * kLanes <= n; i += 2 * kLanes) {
    const U both = narrowed_both(load(from + i) * factor, load(from + i + kLanes) * factor);
    std::memcpy(to + i, &both, sizeof both);
  }
#endif
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i) * factor);
  for (; i < n; ++i) narrow(from[i] * factor, to + i);
}

// Whether whole vectors of T at this address can be written around the cache.
template <typename T>
VD_INLINE bool can_stream(const T* to, int64_t n) {
  constexpr int64_t bytes = sizeof(T) * kLanes;
  return n * sizeof(T) % bytes == 0 && reinterpret_cast<uintptr_t>(to) % bytes == 0;
}

// Sanitizers do not see what goes around the cache.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define VD_STREAMS 0
#else
#define VD_STREAMS VD_INTRINSICS
#endif

// Like `store`, around the cache: for results that nobody reads soon. Needs `can_stream`.
VD_INLINE void stream(float* to, F x) {
#if VD_STREAMS == 512
  _mm512_stream_ps(to, (__m512)x);
#elif VD_STREAMS == 256
  _mm256_stream_ps(to, (__m256)x);
#else
  store(to, x);
#endif
}
template <typename T>
VD_INLINE void stream(T* to, F x) {
#if VD_STREAMS == 512
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)narrowed(x, to));
#elif VD_STREAMS == 256
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)narrowed(x, to));
#else
  store(to, x);
#endif
}

// The first n of floats, times `factor`; n fills whole vectors.
template <typename T>
VD_INLINE void stream_row(const float* from, int64_t n, float factor, T* to) {
  int64_t i = 0;
#if VD_NARROWS_TWO && VD_STREAMS
  for (; is_bfloat16<T> && i + 2 * kLanes <= n; i += 2 * kLanes) {
    const U both = narrowed_both(load(from + i) * factor, load(from + i + kLanes) * factor);
    if (reinterpret_cast<uintptr_t>(to + i) % sizeof both != 0) break;
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), (__m512i)both);
  }
#endif
  for (; i < n; i += kLanes) stream(to + i, load(from + i) * factor);
}

// Streamed data is seen by other threads only after this.
VD_INLINE void finish_streams() {
#if VD_INTRINSICS
  _mm_sfence();
#endif
}

// --- functions -----------------------------------------------------------------------------------

// e^x for x <= 88, with a relative error below 2e-7; 0 below -87.
VD_INLINE F exp(F x) {
  const F bounded = max(broadcast(-88.0f), x);
  // x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to an integer in the low bits.
  const F shifted = fma(bounded, broadcast(0x1.715476p+0f), broadcast(0x1.8p23f));
  const F n = shifted - 0x1.8p23f;
  F r = fma(n, broadcast(-0x1.62e400p-1f), bounded);
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  F p = broadcast(0x1.6a1f60p-10f);
  p = fma(p, r, broadcast(0x1.123cccp-7f));
  p = fma(p, r, broadcast(0x1.555904p-5f));
  p = fma(p, r, broadcast(0x1.55548ep-3f));
  p = fma(p, r, broadcast(0x1.fffffcp-2f));
  p = fma(p * r, r, r) + 1.0f;
  const F result = (F)((U)p + ((U)shifted << 23));
  return x < -87.0f ? F{} : result;
}

// 1 / (1 + e^-x)
VD_INLINE F sigmoid(F x) {
  const F less = -x;
  return 1.0f / (1.0f + exp(less > 88.0f ? broadcast(88.0f) : less));
}

}  // namespace VD_ISA
}  // namespace vd
