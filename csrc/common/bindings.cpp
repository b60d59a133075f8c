// vd_kernels._C: tells what was compiled and what this machine can run. It links neither torch nor
// CUDA, so it loads wherever Python does.
#include <pybind11/pybind11.h>

#include "common/cpu_isa.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "Clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "GCC " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

// No date and no path: the same sources and compiler give the same file.
py::dict build_info() {
  py::dict info;
  info["version"] = VD_VERSION;
  info["compiler"] = kCompiler;
  info["cpp_standard"] = static_cast<long>(__cplusplus);
  py::list levels;
  for (const vd::IsaLevel level : vd::kIsaLevels) {
    if (vd::is_compiled(level)) levels.append(vd::isa_level_name(level));
  }
  info["cpu_isa"] = py::tuple(levels);
  info["cuda_architectures"] = py::make_tuple();
  return info;
}

py::dict cpu_features() {
  const vd::CpuFeatures f = vd::detect_cpu_features();
  py::dict out;
  out["avx2"] = f.avx2;
  out["fma"] = f.fma;
  out["f16c"] = f.f16c;
  out["bmi2"] = f.bmi2;
  out["avx512f"] = f.avx512f;
  out["avx512bw"] = f.avx512bw;
  out["avx512dq"] = f.avx512dq;
  out["avx512vl"] = f.avx512vl;
  out["avx512_vnni"] = f.avx512_vnni;
  out["avx512_bf16"] = f.avx512_bf16;
  out["avx512_fp16"] = f.avx512_fp16;
  out["amx_tile"] = f.amx_tile;
  out["amx_bf16"] = f.amx_bf16;
  out["amx_int8"] = f.amx_int8;
  return out;
}

py::tuple cpu_isa_levels() {
  const vd::CpuFeatures features = vd::detect_cpu_features();
  py::list levels;
  for (const vd::IsaLevel level : vd::kIsaLevels) {
    if (vd::supports(features, level)) levels.append(vd::isa_level_name(level));
  }
  return py::tuple(levels);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What was compiled into vd_kernels, and which instruction sets this machine can run.";
  m.def("build_info", &build_info,
        "dict: version (str), compiler (str), cpp_standard (int, __cplusplus), cpu_isa (tuple of "
        "levels compiled), cuda_architectures (tuple of sm numbers compiled).");
  m.def("cpu_features", &cpu_features,
        "dict of feature name to bool: True where the processor and the operating system both "
        "support it.");
  m.def("cpu_isa_levels", &cpu_isa_levels,
        "tuple of the levels this machine can run, lowest first: scalar, avx2, avx512, "
        "avx512_bf16, amx.");
}
