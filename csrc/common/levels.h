// Kernels exist once for each level that they are compiled for; which one runs is decided here.
#pragma once

#include "common/cpu_isa.h"
#include "common/dtype.h"

#if defined(__x86_64__)
#define VD_DECLARE_KERNELS(Kernels, name) \
  VD_DECLARE_VECTOR_KERNELS(Kernels, name) \
  namespace avx512_bf16 { extern const Kernels name; } \
  namespace amx { extern const Kernels name; }
// Where no product of matrices is formed, which is all that the last levels are for.
#define VD_DECLARE_KERNELS_WITHOUT_PRODUCTS(Kernels, name) \
  VD_DECLARE_VECTOR_KERNELS(Kernels, name) \
  namespace avx512_bf16 { using avx512::name; } \
  namespace amx { using avx512::name; }
#define VD_DECLARE_VECTOR_KERNELS(Kernels, name) \
  namespace scalar { extern const Kernels name; } \
  namespace avx2 { extern const Kernels name; } \
  namespace avx512 { extern const Kernels name; }
#define VD_PICK_KERNELS(name, dtype) \
  ([&]() -> decltype(vd::scalar::name)& { \
    switch (vd::level_to_run(dtype)) { \
      case vd::IsaLevel::kAmx: return vd::amx::name; \
      case vd::IsaLevel::kAvx512Bf16: return vd::avx512_bf16::name; \
      case vd::IsaLevel::kAvx512: return vd::avx512::name; \
      case vd::IsaLevel::kAvx2: return vd::avx2::name; \
      default: return vd::scalar::name; \
    } \
  }())
#else
#define VD_DECLARE_KERNELS(Kernels, name) \
  namespace scalar { extern const Kernels name; }
#define VD_DECLARE_KERNELS_WITHOUT_PRODUCTS VD_DECLARE_KERNELS
#define VD_PICK_KERNELS(name, dtype) (vd::level_to_run(dtype), vd::scalar::name)
#endif

namespace vd {

// The best level of this machine, or the one that the environment's VD_CPU_ISA names.
// Throws when that is no level or one that this machine lacks. Levels that add products of bfloat16,
// and nothing else, are for it alone: other dtypes run on the one before them.
IsaLevel level_to_run(Dtype dtype);

}  // namespace vd
