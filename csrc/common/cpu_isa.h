// Which instruction sets this machine can run, asked of the processor and of the operating system.
#pragma once

#include <array>

namespace vd {

// The levels kernels are compiled for, in the order they are preferred from last to first.
enum class IsaLevel { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx };

inline constexpr std::array<IsaLevel, 5> kIsaLevels = {
    IsaLevel::kScalar, IsaLevel::kAvx2, IsaLevel::kAvx512, IsaLevel::kAvx512Bf16, IsaLevel::kAmx};

const char* isa_level_name(IsaLevel level);

// True where both the processor has the instructions and the kernel saves their registers.
// Anything that is not x86-64 answers with all false: it runs the scalar level.
struct CpuFeatures {
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;
  bool bmi2 = false;
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512dq = false;
  bool avx512vl = false;
  bool avx512_vnni = false;
  bool avx512_bf16 = false;
  bool avx512_fp16 = false;
  bool amx_tile = false;
  bool amx_bf16 = false;
  bool amx_int8 = false;
};

CpuFeatures detect_cpu_features();

// Asks the operating system for AMX's tile registers, for the whole process. False when they are
// refused: there are none, or a thread's stack for signals is too small for them.
bool ask_for_tiles();

// Whether setup.py compiles kernels for a level.
bool is_compiled(IsaLevel level);

// A level is supported when every feature that its kernels may use is there.
bool supports(const CpuFeatures& features, IsaLevel level);

}  // namespace vd
