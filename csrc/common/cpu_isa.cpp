#include "common/cpu_isa.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace vd {

const char* isa_level_name(IsaLevel level) {
  switch (level) {
    case IsaLevel::kScalar:
      return "scalar";
    case IsaLevel::kAvx2:
      return "avx2";
    case IsaLevel::kAvx512:
      return "avx512";
    case IsaLevel::kAvx512Bf16:
      return "avx512_bf16";
    case IsaLevel::kAmx:
      return "amx";
  }
  return "unknown";
}

#if defined(__x86_64__)

namespace {

struct CpuidLeaf {
  uint32_t eax = 0;
  uint32_t ebx = 0;
  uint32_t ecx = 0;
  uint32_t edx = 0;
};

// All zero when the processor does not know the leaf, so that every feature in it reads as absent.
CpuidLeaf cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidLeaf out;
  __get_cpuid_count(leaf, subleaf, &out.eax, &out.ebx, &out.ecx, &out.edx);
  return out;
}

constexpr bool bit(uint64_t word, int index) { return ((word >> index) & 1) != 0; }

constexpr bool all_set(uint64_t word, uint64_t bits) { return (word & bits) == bits; }

// XCR0: the register states that the operating system saves at a context switch. Written as
// assembly because the intrinsic would need this file to be compiled with -mxsave.
uint64_t read_xcr0() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

constexpr uint64_t kXcr0Avx = 0x6;       // SSE and the upper halves of ymm
constexpr uint64_t kXcr0Avx512 = 0xe6;   // and opmask, upper halves of zmm0-15, zmm16-31
constexpr uint64_t kXcr0Amx = 0x60000;   // tile configuration and tile data
constexpr int kXfeatureTileData = 18;

// Linux grants tile registers only to a process that asks. Asking is not undone and makes every
// signal frame larger, so here it is only read whether the kernel would grant it; `ask_for_tiles` is
// called before their first use.
bool kernel_grants_amx() {
#if defined(__linux__)
  constexpr int kArchGetXcompSupp = 0x1021;
  uint64_t supported = 0;
  if (syscall(SYS_arch_prctl, kArchGetXcompSupp, &supported) != 0) return false;
  return bit(supported, kXfeatureTileData);
#else
  return false;
#endif
}

}  // namespace

CpuFeatures detect_cpu_features() {
  CpuFeatures f;
  const CpuidLeaf leaf1 = cpuid(1, 0);
  const bool osxsave = bit(leaf1.ecx, 27);
  if (!osxsave) return f;  // without it xgetbv faults, and no wide register is saved

  const uint64_t xcr0 = read_xcr0();
  const CpuidLeaf leaf7 = cpuid(7, 0);
  const CpuidLeaf leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : CpuidLeaf{};

  f.bmi2 = bit(leaf7.ebx, 8);
  if (all_set(xcr0, kXcr0Avx)) {
    f.fma = bit(leaf1.ecx, 12);
    f.f16c = bit(leaf1.ecx, 29);
    f.avx2 = bit(leaf7.ebx, 5);
  }
  if (all_set(xcr0, kXcr0Avx512)) {
    f.avx512f = bit(leaf7.ebx, 16);
    f.avx512dq = bit(leaf7.ebx, 17);
    f.avx512bw = bit(leaf7.ebx, 30);
    f.avx512vl = bit(leaf7.ebx, 31);
    f.avx512_vnni = bit(leaf7.ecx, 11);
    f.avx512_fp16 = bit(leaf7.edx, 23);
    f.avx512_bf16 = bit(leaf7_1.eax, 5);
  }
  if (all_set(xcr0, kXcr0Amx) && kernel_grants_amx()) {
    f.amx_bf16 = bit(leaf7.edx, 22);
    f.amx_tile = bit(leaf7.edx, 24);
    f.amx_int8 = bit(leaf7.edx, 25);
  }
  return f;
}

#else

CpuFeatures detect_cpu_features() { return CpuFeatures{}; }

#endif

bool ask_for_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

bool is_compiled(IsaLevel level) {
#if defined(__x86_64__)
  return level <= IsaLevel::kAmx;
#else
  return level == IsaLevel::kScalar;
#endif
}

bool supports(const CpuFeatures& f, IsaLevel level) {
  switch (level) {
    case IsaLevel::kScalar:
      return true;
    case IsaLevel::kAvx2:
      return f.avx2 && f.fma && f.f16c && f.bmi2;
    case IsaLevel::kAvx512:
      return supports(f, IsaLevel::kAvx2) && f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl;
    case IsaLevel::kAvx512Bf16:
      return supports(f, IsaLevel::kAvx512) && f.avx512_bf16;
    case IsaLevel::kAmx:
      return supports(f, IsaLevel::kAvx512Bf16) && f.amx_tile && f.amx_bf16;
  }
  return false;
}

}  // namespace vd
