// The Python module sslkernels._C: facts of the build. Importing it registers the operators; no tensor crosses it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cuda/floors.h"

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
  m.doc() = "Facts of the build of the sslkernels extension";
  pybind11::class_<sslkernels::Floor>(m, "Floor", "Least bytes of device memory and floating-point operations")
      .def_readonly("bytes", &sslkernels::Floor::bytes)
      .def_readonly("flops", &sslkernels::Floor::flops);
  auto floors = m.def_submodule("floors", "The Floor of each kernel, by the name of its operator");
  using pybind11::arg;
  floors.def("cross_entropy_rows_fwd", &sslkernels::cross_entropy_rows_fwd_floor, arg("valid"), arg("rows"),
             arg("vocab"), arg("element_bytes"), arg("gradient"));
  floors.def("cross_entropy_rows_bwd", &sslkernels::cross_entropy_rows_bwd_floor, arg("valid"), arg("rows"),
             arg("vocab"), arg("element_bytes"));
  floors.def("column_sums", &sslkernels::column_sums_floor, arg("rows"), arg("columns"), arg("element_bytes"));
  floors.def("scale_add", &sslkernels::scale_add_floor, arg("count"), arg("input_bytes"), arg("out_bytes"), arg("add"));
  floors.def("own_negatives", &sslkernels::own_negatives_floor, arg("rows"), arg("count"), arg("dim"),
             arg("element_bytes"), arg("normalise"), arg("gradient"));
  floors.def("random_stream", &sslkernels::random_stream_floor, arg("rows"), arg("columns"), arg("element_bytes"));
  floors.def("gaussian_fwd", &sslkernels::gaussian_fwd_floor, arg("rows"), arg("columns"), arg("samples"),
             arg("element_bytes"));
  floors.def("gaussian_bwd", &sslkernels::gaussian_bwd_floor, arg("rows"), arg("columns"), arg("samples"),
             arg("element_bytes"));
  floors.def("gumbel_rows_fwd", &sslkernels::gumbel_rows_fwd_floor, arg("rows"), arg("columns"), arg("element_bytes"),
             arg("output"), arg("stats"));
  floors.def("gumbel_rows_bwd", &sslkernels::gumbel_rows_bwd_floor, arg("rows"), arg("columns"), arg("element_bytes"),
             arg("grad_bytes"), arg("probabilities"));
  floors.def("probability_sums", &sslkernels::probability_sums_floor, arg("rows"), arg("columns"),
             arg("element_bytes"));
  floors.def("sample_rows", &sslkernels::sample_rows_floor, arg("rows"), arg("columns"), arg("element_bytes"),
             arg("first"));
  floors.def("mask_tokens", &sslkernels::mask_tokens_floor, arg("tokens"), arg("id_bytes"));
  floors.def("negative_sampling_fwd", &sslkernels::negative_sampling_fwd_floor, arg("pairs"), arg("negatives"),
             arg("center_rows"), arg("context_rows"), arg("dim"), arg("element_bytes"), arg("index_bytes"),
             arg("gradient"));
  floors.def("weighted_row_sums", &sslkernels::weighted_row_sums_floor, arg("entries"), arg("rows"), arg("source_rows"),
             arg("dim"), arg("source_bytes"), arg("out_bytes"));
  floors.def("search_codes", &sslkernels::search_codes_floor, arg("rows"), arg("codes"), arg("dim"),
             arg("element_bytes"));
  floors.def("gather_codes", &sslkernels::gather_codes_floor, arg("rows"), arg("codes"), arg("dim"),
             arg("element_bytes"));
  floors.def("code_difference", &sslkernels::code_difference_floor, arg("rows"), arg("codes"), arg("dim"),
             arg("element_bytes"), arg("out_bytes"));
  floors.def("free_energy_fwd", &sslkernels::free_energy_fwd_floor, arg("results"), arg("count"), arg("element_bytes"),
             arg("gradient"));
  floors.def("free_energy_bwd", &sslkernels::free_energy_bwd_floor, arg("results"), arg("count"), arg("element_bytes"),
             arg("minimum"));
  floors.def("prediction_energy_fwd", &sslkernels::prediction_energy_fwd_floor, arg("batch"), arg("count"), arg("dim"),
             arg("element_bytes"), arg("gradient"));
  floors.def("prediction_energy_bwd", &sslkernels::prediction_energy_bwd_floor, arg("batch"), arg("count"), arg("read"),
             arg("dim"), arg("element_bytes"), arg("target"));
  m.def("build_info", &build_info,
        "compiler; torch (version built against); cuda (compiler, '' if none); cuda_architectures; "
        "cuda_ptx (of them, those whose PTX is there for later ones); cpu_isa (in use)");
}
