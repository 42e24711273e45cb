// The Python module sslkernels._C: build information. Importing it registers the operators; no tensor crosses it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/cpu/isa.h"

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> words;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find(' ', begin) == std::string::npos ? text.size() : text.find(' ', begin);
    if (end > begin) words.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return words;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = SSLKERNELS_COMPILER;
  info["torch"] = SSLKERNELS_BUILD_TORCH;
  info["cuda"] = SSLKERNELS_CUDA_COMPILER;
  info["cuda_architectures"] = split(SSLKERNELS_CUDA_ARCHITECTURES);
  info["cuda_ptx"] = split(SSLKERNELS_CUDA_PTX);
  info["cpu_isa"] = sslkernels::isa_name(sslkernels::current_isa());
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of the sslkernels extension";
  m.def("build_info", &build_info,
        "compiler; torch (version built against); cuda (compiler, '' if none); cuda_architectures; "
        "cuda_ptx (architectures with PTX for later devices); cpu_isa (in use)");
}
