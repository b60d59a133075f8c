// Products of bfloat16 without widening them: two elements, neighbours in the dimension that is summed
// over, lie in the place of one float (a unit), and one instruction multiplies and adds both. Where
// there is no such instruction, the same operands are floats and a unit is one element.
#pragma once

#include "common/gemm.h"

namespace vd {
namespace VD_ISA {

template <typename T>
constexpr bool kPaired = false;
#if VD_PAIRS
template <>
inline constexpr bool kPaired<BFloat16> = true;
#endif

// Whether products of such units are formed by tiles.
template <typename T>
constexpr bool kTiled = VD_TILES && kPaired<T>;

// Units of n elements.
template <typename T>
constexpr int64_t units_of(int64_t n) {
  return kPaired<T> ? (n + 1) / 2 : n;
}

// Elements that a row is rounded up to, so that its units fill whole vectors.
template <typename T>
constexpr int64_t row_step = kPaired<T> ? 2 * kLanes : kLanes;

// What the rows of a stack, and of a product, are rounded up to where there has to be room for it.
template <typename T>
constexpr int64_t stack_step = kTiled<T> ? 2 * kTileSize : kLanes;

// Units that a sum over n elements takes. Tiles take more than there are: those are zero.
template <typename T>
constexpr int64_t units_summed(int64_t n) {
  return kTiled<T> ? round_up(units_of<T>(n), kTileSize) : units_of<T>(n);
}

// n elements as units, zeros up to `width`, a multiple of row_step.
template <typename T>
VD_INLINE void load_units(const T* from, int64_t n, int64_t width, float* to, float factor = 1.0f) {
  if constexpr (!kPaired<T>) return load_row(from, n, to, factor);
  constexpr int64_t step = 2 * kLanes;
  int64_t i = 0;
  for (; i + step <= n; i += step) std::memcpy(to + i / 2, from + i, sizeof(F));
  for (int64_t zero = i; zero < width; zero += step) store(to + zero / 2, F{});
  for (; i < n; ++i) std::memcpy(reinterpret_cast<T*>(to) + i, from + i, sizeof(T));
}

#if VD_NARROWS_TWO
// Where elements 0, 32, 1, 33, ... of two vectors, or 0, 16, 1, 17, ... of one lie: the lower half of
// each row woven with the other's, and from lane 16 on the upper.
VD_INLINE __m512i woven(int first, int apart) {
  U places;
  VD_UNROLL for (int i = 0; i < kLanes; ++i) {
    places[i] = static_cast<uint32_t>(first + i) | static_cast<uint32_t>(first + i + apart) << 16;
  }
  return (__m512i)places;
}
#endif

// Rows to sum over: a matrix's rows, `stride` units apart. What is multiplied by them has one unit for
// each unit of rows.
struct Stack {
  const float* data;
  int64_t stride;
};

// The sum over rows [n, width] of units, `stride` apart, needs them as they are if a unit is one
// element, and two rows woven into one if it is two: in `room`, units_summed(n) * width.
template <typename T>
VD_INLINE Stack stack_of(const float* rows, int64_t stride, int64_t n, int64_t width, float* room) {
  if constexpr (!kPaired<T>) return {rows, stride};
  for (int64_t i = 0; i < n; i += 2) {
    const auto* even = reinterpret_cast<const BFloat16*>(rows + i * stride);
    const auto* odd = reinterpret_cast<const BFloat16*>(rows + (i + 1) * stride);
    float* const to = room + i / 2 * width;
#if VD_NARROWS_TWO
    for (int64_t d = 0; d < width; d += 2 * kLanes) {
      const __m512i a = _mm512_loadu_si512(even + d);
      const __m512i b = i + 1 < n ? _mm512_loadu_si512(odd + d) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(a, woven(0, 32), b));
      _mm512_storeu_si512(to + d + kLanes, _mm512_permutex2var_epi16(a, woven(16, 32), b));
    }
    continue;
#endif
    for (int64_t d = 0; d < width; d += kLanes) {
      const U low = (U)load(even + d) >> 16;
      store(to + d, i + 1 < n ? (F)(low | (U)load(odd + d)) : (F)low);
    }
  }
  for (int64_t d = units_of<T>(n) * width; d < units_summed<T>(n) * width; d += kLanes) {
    store(room + d, F{});
  }
  return {room, width};
}

// A left operand, as gemm takes it.
struct Left {
  const float* data;
  Strides strides;
};

// Of weights [n, stride], a column for each row of the product, what multiplies a stack of n rows.
// `room` holds units_summed(n) * stride.
template <typename T>
VD_INLINE Left over_rows(const float* weights, int64_t n, int64_t stride, int64_t columns,
                         float* room) {
  if constexpr (!kPaired<T>) return {weights, {1, stride}};
#if VD_TILES
  const int64_t summed = units_summed<T>(n);
  for (int64_t i = 0; i < columns; i += kTileSize) {
    for (int64_t unit = 0; unit < summed; unit += kTileSize) {
      __m512 units[kTileSize];
      VD_UNROLL for (int r = 0; r < kTileSize; ++r) {
        const int64_t j = 2 * (unit + r);
        const F low = j < n ? load(weights + j * stride + i) : F{};
        const F high = j + 1 < n ? load(weights + (j + 1) * stride + i) : F{};
        units[r] = _mm512_castsi512_ps(
            _mm512_permutexvar_epi16(woven(0, 16), (__m512i)narrowed_both(low, high)));
      }
      transpose_vectors(units);
      VD_UNROLL for (int r = 0; r < kTileSize; ++r) {
        _mm512_storeu_ps(room + (i + r) * summed + unit, units[r]);
      }
    }
  }
  return {room, {summed, 1}};
#endif
  for (int64_t j = 0; j < n; j += 2) {
    const float* from = weights + j * stride;
    float* const to = room + j / 2 * stride;
    for (int64_t i = 0; i < columns; i += kLanes) {
#if VD_NARROWS_TWO
      const U both = narrowed_both(load(from + i), j + 1 < n ? load(from + stride + i) : F{});
      _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(woven(0, 16), (__m512i)both));
      continue;
#endif
      const U low = rounded(load(from + i));
      store(to + i, j + 1 < n ? (F)(low | rounded(load(from + stride + i)) << 16) : (F)low);
    }
  }
  return {room, {1, stride}};
}

// Of weights [n, stride], a row for each row of the product, what multiplies a stack of `columns`
// rows. `room` holds n * units_summed(stride), with n rounded up to whole tiles if there are any.
template <typename T>
VD_INLINE Left over_columns(const float* weights, int64_t n, int64_t stride, int64_t columns,
                            float* room) {
  if constexpr (!kPaired<T>) return {weights, {stride, 1}};
  const int64_t step = units_summed<T>(stride);
  for (int64_t j = 0; j < n; ++j) {
    auto* const to = reinterpret_cast<BFloat16*>(room + j * step);
    for (int64_t i = 0; i < columns; i += kLanes) store(to + i, load(weights + j * stride + i));
    // Their partners in the stack are no rows.
    for (int64_t i = columns; i < 2 * units_summed<T>(columns); ++i) to[i] = BFloat16{0};
  }
  return {room, {step, 1}};
}

}  // namespace VD_ISA
}  // namespace vd
