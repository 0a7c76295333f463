// phydi_kernels._host: what the compiled parts of the package were built from and for.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <sstream>
#include <string>

namespace py = pybind11;

namespace {

py::tuple split(const std::string& text) {
  py::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    parts.append(part);
  }
  return py::tuple(parts);
}

py::dict build_info() {
  py::dict info;
  info["version"] = PHYDI_VERSION;
  info["compiler"] = PHYDI_COMPILER;
  info["build_type"] = PHYDI_BUILD_TYPE;
  info["instruction_sets"] = split(PHYDI_INSTRUCTION_SETS);
  info["cuda_architectures"] = split(PHYDI_CUDA_ARCHITECTURES);
  info["torch_version"] = PHYDI_TORCH_VERSION;
  info["torch_target_version"] = std::uint64_t{PHYDI_TORCH_TARGET_VERSION};
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m, py::mod_gil_not_used()) {
  m.doc() = "What the compiled parts of phydi_kernels were built from and for.";
  m.def("build_info", &build_info,
        "Returns version, compiler, build_type, instruction_sets, cuda_architectures, torch_version (of the headers) "
        "and torch_target_version (the oldest torch the library loads into, as TORCH_TARGET_VERSION).");
}
