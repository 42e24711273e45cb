// From the dispatcher's arguments to the argument struct of an operator. Each operator has one parse_<op> in its
// <op>_bind.h, which both the CPU binding (core/cpu/bind.h) and the CUDA binding (core/cuda/bind.h) call.
//
// The public Python functions have checked what users pass: a failure here is a bug of the package. The caller
// allocates all outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "core/element.h"
#include "core/index.h"

namespace sslkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Library = torch::stable::detail::StableLibrary;
using Shape = std::initializer_list<int64_t>;

inline Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kHalf;
    default:
      STD_TORCH_CHECK(false, "sslkernels: the dtype must be float32, float64, bfloat16 or float16");
  }
}

inline ScalarType accumulation_type(Element element) {
  return element == Element::kDouble ? ScalarType::Double : ScalarType::Float;
}
inline ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// True for int64, false for int32.
inline bool is_wide(const Tensor& tensor, const char* name) {
  const bool wide = tensor.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || tensor.scalar_type() == ScalarType::Int, "sslkernels: ", name, " must be int64 or int32");
  return wide;
}

inline void check_shape(const Tensor& tensor, Shape shape, ScalarType dtype, const char* name) {
  bool same = tensor.dim() == int64_t(shape.size());
  int64_t dim = 0;
  for (const int64_t size : shape) same = same && tensor.size(dim++) == size;
  STD_TORCH_CHECK(same && tensor.scalar_type() == dtype, "sslkernels: wrong shape or dtype of ", name);
}

inline void check_unit_stride(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.stride(last) == 1 || tensor.size(last) <= 1 || tensor.numel() == 0, "sslkernels: ", name,
                  " must have unit stride in its last dimension");
}

inline void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, "sslkernels: ", name, " must have 2 dimensions");
  check_unit_stride(tensor, name);
}

inline void check_contiguous(const Tensor& tensor, Shape shape, ScalarType dtype, const char* name) {
  check_shape(tensor, shape, dtype, name);
  STD_TORCH_CHECK(tensor.is_contiguous(), "sslkernels: ", name, " must be contiguous");
}

// Raises unless the first `count` indices of a CPU tensor are in [0, rows): its kernels follow them unchecked. On a GPU
// the kernels check.
inline void check_indices(const Tensor& index, int64_t count, int64_t rows, const char* name, int64_t first = 0) {
  if (index.is_cuda()) return;
  const bool wide = is_wide(index, name);
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) {
    inside &= in_range(index_at(index.const_data_ptr(), wide, i) - first, rows - first);
  }
  STD_TORCH_CHECK(inside, "sslkernels: ", name, " must be in [", first, ", ", rows, ")");
}

// The same, where -1 stands for none.
inline void check_optional_indices(const Tensor& index, int64_t count, int64_t rows, const char* name) {
  check_indices(index, count, rows, name, -1);
}

inline const void* pointer(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// Pointers to contiguous inputs and outputs after a check of shape and dtype; null for an absent tensor.
template <class T = void>
const T* readable(const Tensor& tensor, Shape shape, ScalarType dtype, const char* name) {
  check_contiguous(tensor, shape, dtype, name);
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T = void>
const T* readable(const OptionalTensor& tensor, Shape shape, ScalarType dtype, const char* name) {
  return tensor ? readable<T>(*tensor, shape, dtype, name) : nullptr;
}
template <class T = void>
T* writable(const Tensor& tensor, Shape shape, ScalarType dtype, const char* name) {
  check_contiguous(tensor, shape, dtype, name);
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T = void>
T* writable(const OptionalTensor& tensor, Shape shape, ScalarType dtype, const char* name) {
  return tensor ? writable<T>(*tensor, shape, dtype, name) : nullptr;
}

}  // namespace sslkernels
