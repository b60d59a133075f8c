#include "common/levels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace vd {

namespace {

bool can_run(const CpuFeatures& features, IsaLevel level) {
  if (!is_compiled(level) || !supports(features, level)) return false;
  if (level != IsaLevel::kAmx) return true;
  static const bool granted = ask_for_tiles();
  return granted;
}

std::string runnable(const CpuFeatures& features) {
  std::string names;
  for (const IsaLevel level : kIsaLevels) {
    if (!can_run(features, level)) continue;
    names += (names.empty() ? "" : ", ") + std::string(isa_level_name(level));
  }
  return names;
}

IsaLevel wanted_level() {
  static const CpuFeatures features = detect_cpu_features();
  static const IsaLevel best = [] {
    IsaLevel found = IsaLevel::kScalar;
    for (const IsaLevel level : kIsaLevels) {
      if (can_run(features, level)) found = level;
    }
    return found;
  }();
  const char* wanted = std::getenv("VD_CPU_ISA");
  if (!wanted || !*wanted) return best;
  for (const IsaLevel level : kIsaLevels) {
    if (std::strcmp(wanted, isa_level_name(level)) != 0) continue;
    if (can_run(features, level)) return level;
  }
  throw std::runtime_error("VD_CPU_ISA must be one of " + runnable(features) + ", got \"" +
                           wanted + "\"");
}

}  // namespace

IsaLevel level_to_run(Dtype dtype) {
  const IsaLevel level = wanted_level();
  return dtype == Dtype::kBFloat16 || level < IsaLevel::kAvx512Bf16 ? level : IsaLevel::kAvx512;
}

}  // namespace vd
