// Products of pairs of bfloat16 by AMX: tiles of 16 rows of 16 units each, in registers of their own.
//
// Loading another configuration takes longer than some of the products here, so there is one for all:
// every tile is whole. Where a matrix ends within a tile, what follows is multiplied, too.
#pragma once

#include "common/simd.h"

// Sanitizers do not see what tile instructions read and write; for them the same is done in loops.
#if VD_TILES && (defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__))
#define VD_TILES_IN_LOOPS 1
#else
#define VD_TILES_IN_LOOPS 0
#endif

namespace vd {
namespace VD_ISA {

constexpr int kTileSize = 16;  // rows, and units of a row

#if VD_TILES

// While one of these lives, tiles can be used.
class Tiles {
 public:
#if VD_TILES_IN_LOOPS
  Tiles() {}
#else
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, first_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } whole;
    for (int t = 0; t < 8; ++t) {
      whole.row_bytes[t] = kTileSize * sizeof(float);
      whole.rows[t] = kTileSize;
    }
    asm volatile("" : : "r"(&whole) : "memory");  // GCC 12 takes the first bytes alone for read
    _tile_loadconfig(&whole);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
#endif
};

#if VD_TILES_IN_LOOPS
inline thread_local float tiles_in_loops[8][kTileSize][kTileSize];

inline void load_tile(int t, const float* from, int64_t stride) {
  for (int i = 0; i < kTileSize; ++i) store(tiles_in_loops[t][i], load(from + i * stride));
}
inline void store_tile(int t, float* to, int64_t stride) {
  for (int i = 0; i < kTileSize; ++i) store(to + i * stride, load(tiles_in_loops[t][i]));
}
inline void multiply_tiles(int c, int a, int b) {
  for (int i = 0; i < kTileSize; ++i) {
    F sum = load(tiles_in_loops[c][i]);
    for (int p = 0; p < kTileSize; ++p) {
      int32_t unit;
      std::memcpy(&unit, &tiles_in_loops[a][i][p], sizeof unit);
      sum = fma_pairs((F)broadcast(unit), load(tiles_in_loops[b][p]), sum);
    }
    store(tiles_in_loops[c][i], sum);
  }
}
#define VD_ZERO_TILE(t) std::memset(tiles_in_loops[t], 0, sizeof tiles_in_loops[t])
#define VD_LOAD_TILE(t, from, stride) load_tile(t, from, stride)
#define VD_STORE_TILE(t, to, stride) store_tile(t, to, stride)
#define VD_MULTIPLY_TILES(c, a, b) multiply_tiles(c, a, b)
#else
// Macros, as numbers of tiles are part of the instruction.
#define VD_ZERO_TILE(t) _tile_zero(t)
#define VD_LOAD_TILE(t, from, stride) _tile_loadd(t, from, (stride) * sizeof(float))
#define VD_STORE_TILE(t, to, stride) _tile_stored(t, to, (stride) * sizeof(float))
#define VD_MULTIPLY_TILES(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

// One or two tiles of rows by one or two of columns.
template <bool kTwoDown, bool kTwoAcross>
VD_INLINE void multiply_few(int64_t k, const float* a, int64_t sa, const float* b, int64_t sb,
                            float* c, int64_t sc, bool add) {
  constexpr int next = kTileSize;
  if (add) {
    VD_LOAD_TILE(0, c, sc);
    if constexpr (kTwoAcross) VD_LOAD_TILE(1, c + next, sc);
    if constexpr (kTwoDown) VD_LOAD_TILE(2, c + next * sc, sc);
    if constexpr (kTwoDown && kTwoAcross) VD_LOAD_TILE(3, c + next * sc + next, sc);
  } else {
    VD_ZERO_TILE(0);
    if constexpr (kTwoAcross) VD_ZERO_TILE(1);
    if constexpr (kTwoDown) VD_ZERO_TILE(2);
    if constexpr (kTwoDown && kTwoAcross) VD_ZERO_TILE(3);
  }
  for (int64_t p = 0; p < k; p += kTileSize) {
    VD_LOAD_TILE(4, a + p, sa);
    VD_LOAD_TILE(6, b + p * sb, sb);
    VD_MULTIPLY_TILES(0, 4, 6);
    if constexpr (kTwoAcross) {
      VD_LOAD_TILE(7, b + p * sb + next, sb);
      VD_MULTIPLY_TILES(1, 4, 7);
    }
    if constexpr (kTwoDown) {
      VD_LOAD_TILE(5, a + p + next * sa, sa);
      VD_MULTIPLY_TILES(2, 5, 6);
    }
    if constexpr (kTwoDown && kTwoAcross) VD_MULTIPLY_TILES(3, 5, 7);
  }
  VD_STORE_TILE(0, c, sc);
  if constexpr (kTwoAcross) VD_STORE_TILE(1, c + next, sc);
  if constexpr (kTwoDown) VD_STORE_TILE(2, c + next * sc, sc);
  if constexpr (kTwoDown && kTwoAcross) VD_STORE_TILE(3, c + next * sc + next, sc);
}

// One tile of rows by four of columns.
VD_INLINE void multiply_wide(int64_t k, const float* a, int64_t sa, const float* b, int64_t sb,
                             float* c, int64_t sc, bool add) {
  constexpr int next = kTileSize;
  if (add) {
    VD_LOAD_TILE(0, c, sc);
    VD_LOAD_TILE(1, c + next, sc);
    VD_LOAD_TILE(2, c + 2 * next, sc);
    VD_LOAD_TILE(3, c + 3 * next, sc);
  } else {
    VD_ZERO_TILE(0);
    VD_ZERO_TILE(1);
    VD_ZERO_TILE(2);
    VD_ZERO_TILE(3);
  }
  for (int64_t p = 0; p < k; p += kTileSize) {
    const float* row = b + p * sb;
    VD_LOAD_TILE(4, a + p, sa);
    VD_LOAD_TILE(5, row, sb);
    VD_LOAD_TILE(6, row + next, sb);
    VD_LOAD_TILE(7, row + 2 * next, sb);
    VD_MULTIPLY_TILES(0, 4, 5);
    VD_MULTIPLY_TILES(1, 4, 6);
    VD_MULTIPLY_TILES(2, 4, 7);
    VD_LOAD_TILE(5, row + 3 * next, sb);
    VD_MULTIPLY_TILES(3, 4, 5);
  }
  VD_STORE_TILE(0, c, sc);
  VD_STORE_TILE(1, c + next, sc);
  VD_STORE_TILE(2, c + 2 * next, sc);
  VD_STORE_TILE(3, c + 3 * next, sc);
}

// c [m,n] = a [m,k] b [k,n] of units, or c += with `add`. All of m, n, k are rounded up to kTileSize:
// a and b hold zeros up to that in k; in m and n there is room, and what c gets there is of no
// meaning.
inline void multiply_tiled(int64_t m, int64_t n, int64_t k, const float* a, int64_t sa,
                           const float* b, int64_t sb, float* c, int64_t sc, bool add) {
  asm volatile("" ::: "memory");  // what tiles are loaded from has been written
  for (int64_t i = 0; i < m; i += 2 * kTileSize) {
    const bool down = i + kTileSize < m;
    int64_t j = 0;
    for (; !down && j + 3 * kTileSize < n; j += 4 * kTileSize) {
      multiply_wide(k, a + i * sa, sa, b + j, sb, c + i * sc + j, sc, add);
    }
    for (; j < n; j += 2 * kTileSize) {
      const bool across = j + kTileSize < n;
      float* const to = c + i * sc + j;
      if (down && across) {
        multiply_few<true, true>(k, a + i * sa, sa, b + j, sb, to, sc, add);
      } else if (down) {
        multiply_few<true, false>(k, a + i * sa, sa, b + j, sb, to, sc, add);
      } else if (across) {
        multiply_few<false, true>(k, a + i * sa, sa, b + j, sb, to, sc, add);
      } else {
        multiply_few<false, false>(k, a + i * sa, sa, b + j, sb, to, sc, add);
      }
    }
  }
  asm volatile("" ::: "memory");
}

#else

struct Tiles {
  Tiles() {}
};

#endif

}  // namespace VD_ISA
}  // namespace vd
