// Kernels exist once for each level that they are compiled for; which one runs is decided here.
#pragma once

#include "common/cpu_isa.h"

#if defined(__x86_64__)
#define VD_DECLARE_KERNELS(Kernels, name) \
  VD_DECLARE_VECTOR_KERNELS(Kernels, name) \
  namespace amx { extern const Kernels name; }
// Where no product of matrices is formed, which is all that tiles are for.
#define VD_DECLARE_KERNELS_WITHOUT_TILES(Kernels, name) \
  VD_DECLARE_VECTOR_KERNELS(Kernels, name) \
  namespace amx { using avx512_bf16::name; }
#define VD_DECLARE_VECTOR_KERNELS(Kernels, name) \
  namespace scalar { extern const Kernels name; } \
  namespace avx2 { extern const Kernels name; } \
  namespace avx512 { extern const Kernels name; } \
  namespace avx512_bf16 { extern const Kernels name; }
#define VD_PICK_KERNELS(name)                                              \
  (vd::level_to_run() == vd::IsaLevel::kAmx        ? vd::amx::name         \
   : vd::level_to_run() == vd::IsaLevel::kAvx512Bf16 ? vd::avx512_bf16::name \
   : vd::level_to_run() == vd::IsaLevel::kAvx512   ? vd::avx512::name      \
   : vd::level_to_run() == vd::IsaLevel::kAvx2     ? vd::avx2::name        \
                                                   : vd::scalar::name)
#else
#define VD_DECLARE_KERNELS(Kernels, name) \
  namespace scalar { extern const Kernels name; }
#define VD_DECLARE_KERNELS_WITHOUT_TILES VD_DECLARE_KERNELS
#define VD_PICK_KERNELS(name) (vd::level_to_run(), vd::scalar::name)
#endif

namespace vd {

// The best level of this machine, or the one that the environment's VD_CPU_ISA names.
// Throws when that is no level or one that this machine lacks.
IsaLevel level_to_run();

}  // namespace vd
