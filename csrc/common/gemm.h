// Products of small matrices that lie in a core's cache.
#pragma once

#include "common/tiles.h"

namespace vd {
namespace VD_ISA {

// Registers of a tile: kTileRows * kTileVectors sums, kTileVectors of b, one of a.
constexpr int kTileVectors = 2;
constexpr int kTileRows = kLanes == 16 ? 12 : 6;

// Element (i, p) of a lies at a[i * row + p * col].
struct Strides {
  int64_t row;
  int64_t col;
};

// One element of a, in all lanes.
template <bool kPairs>
VD_INLINE F operand(const float* a) {
  if constexpr (!kPairs) return broadcast(*a);
  int32_t unit;  // as an integer: as a float it might be no number
  std::memcpy(&unit, a, sizeof unit);
  return (F)broadcast(unit);
}

template <bool kPairs, int kRows, int kVectors>
VD_INLINE void tile(int64_t k, const float* a, Strides sa, const float* b, int64_t sb, float* c,
                    int64_t sc, bool add) {
  F sums[kRows][kVectors];
  VD_UNROLL for (int i = 0; i < kRows; ++i) {
    VD_UNROLL for (int v = 0; v < kVectors; ++v) sums[i][v] = add ? load(c + i * sc + v * kLanes) : F{};
  }
  for (int64_t p = 0; p < k; ++p) {
    F row[kVectors];
    VD_UNROLL for (int v = 0; v < kVectors; ++v) row[v] = load(b + p * sb + v * kLanes);
    VD_UNROLL for (int i = 0; i < kRows; ++i) {
      const F x = operand<kPairs>(a + i * sa.row + p * sa.col);
      VD_UNROLL for (int v = 0; v < kVectors; ++v) {
        sums[i][v] = kPairs ? fma_pairs(x, row[v], sums[i][v]) : fma(x, row[v], sums[i][v]);
      }
    }
  }
  VD_UNROLL for (int i = 0; i < kRows; ++i) {
    VD_UNROLL for (int v = 0; v < kVectors; ++v) store(c + i * sc + v * kLanes, sums[i][v]);
  }
}

// A tile of m rows, kLeast <= m <= kMost.
template <bool kPairs, int kLeast, int kMost, int kVectors>
VD_INLINE void tile_of(int64_t m, int64_t k, const float* a, Strides sa, const float* b, int64_t sb,
                       float* c, int64_t sc, bool add) {
  constexpr int kMiddle = (kLeast + kMost) / 2;
  if constexpr (kLeast == kMost) {
    tile<kPairs, kMost, kVectors>(k, a, sa, b, sb, c, sc, add);
  } else if (m <= kMiddle) {
    tile_of<kPairs, kLeast, kMiddle, kVectors>(m, k, a, sa, b, sb, c, sc, add);
  } else {
    tile_of<kPairs, kMiddle + 1, kMost, kVectors>(m, k, a, sa, b, sb, c, sc, add);
  }
}

// Tiles are as alike as they can be: one of few rows would leave multipliers waiting for sums.
template <bool kPairs, int kVectors>
void columns(int64_t m, int64_t k, const float* a, Strides sa, const float* b, int64_t sb, float* c,
             int64_t sc, bool add) {
  const int32_t tiles = static_cast<int32_t>((m + kTileRows - 1) / kTileRows);
  int32_t left = tiles;
  for (int64_t i = 0; i < m; --left) {
    const int64_t rows = (static_cast<int32_t>(m - i) + left - 1) / left;
    tile_of<kPairs, 1, kTileRows, kVectors>(rows, k, a + i * sa.row, sa, b, sb, c + i * sc, sc, add);
    i += rows;
  }
}

// c [m,n] = a [m,k] b [k,n], or c += with `add`. Rows of b and c are sb and sc floats apart and hold
// n rounded up to kLanes; what c gets there is of no meaning. Each sum runs over p in order. With
// kPairs a and b hold units of two bfloat16 each, and k counts units; tiles need what tiles.h says, and
// rows of a without gaps.
template <bool kPairs = false>
void gemm(int64_t m, int64_t n, int64_t k, const float* a, Strides sa, const float* b,
                 int64_t sb, float* c, int64_t sc, bool add) {
#if VD_TILES
  if constexpr (kPairs) return multiply_tiled(m, n, k, a, sa.row, b, sb, c, sc, add);
#endif
  int64_t j = 0;
  for (; j + kLanes < n; j += kTileVectors * kLanes) {
    columns<kPairs, kTileVectors>(m, k, a, sa, b + j, sb, c + j, sc, add);
  }
  if (j < n) columns<kPairs, 1>(m, k, a, sa, b + j, sb, c + j, sc, add);
}

#if VD_INTRINSICS == 512
constexpr int kSquare = 16;

// The transpose of sixteen vectors, in place.
VD_INLINE void transpose_vectors(__m512* r) {
  __m512 s[16];
  VD_UNROLL for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  VD_UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
  // r[4 i + j] now holds, in each quarter, columns of rows 4 i .. 4 i + 4.
  VD_UNROLL for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(r[j], r[j + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(r[j], r[j + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0xdd);
    r[j] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[j + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[j + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[j + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

VD_INLINE void transpose_square(const float* from, int64_t sf, float* to, int64_t st) {
  __m512 r[16];
  VD_UNROLL for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * sf);
  transpose_vectors(r);
  VD_UNROLL for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + i * st, r[i]);
}
#elif VD_INTRINSICS
constexpr int kSquare = 8;

// Eight rows of eight floats become columns.
VD_INLINE void transpose_square(const float* from, int64_t sf, float* to, int64_t st) {
  __m256 r[8], s[8];
  VD_UNROLL for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * sf);
  VD_UNROLL for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  VD_UNROLL for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
  VD_UNROLL for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * st, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * st, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#else
constexpr int kSquare = 4;

VD_INLINE void transpose_square(const float* from, int64_t sf, float* to, int64_t st) {
  VD_UNROLL for (int i = 0; i < kSquare; ++i) {
    VD_UNROLL for (int j = 0; j < kSquare; ++j) to[j * st + i] = from[i * sf + j];
  }
}
#endif

// to [n,m] = the transpose of from [m,n], both rounded up to whole vectors: there is room for that,
// and what lies beyond m and n goes to where it is of no meaning either. sf and st are the distances
// of their rows.
inline void transpose(int64_t m, int64_t n, const float* from, int64_t sf, float* to, int64_t st) {
  for (int64_t i = 0; i < round_up(m, kLanes); i += kSquare) {
    for (int64_t j = 0; j < round_up(n, kLanes); j += kSquare) {
      transpose_square(from + i * sf + j, sf, to + j * st + i, st);
    }
  }
}

}  // namespace VD_ISA
}  // namespace vd
