#pragma once

#include "core/bind.h"
#include "vocabulary/distillation.h"

namespace sslkernels {

// Logits that a kernel overwrites, and the scale and offset that turn them into z.
template <class Rows>
Rows parse_logit_rows(const Tensor& logits, const OptionalTensor& offset, const Tensor& scale) {
  check_matrix(logits, "logits");
  const auto type = accumulation_type(logits);
  STD_TORCH_CHECK(logits.scalar_type() == type, "sslkernels: logits must be float32 or float64");
  Rows rows{};
  rows.element = element_of(logits);
  rows.logits = logits.mutable_data_ptr();
  rows.stride = logits.stride(0);
  rows.count = logits.size(0);
  rows.vocab = logits.size(1);
  rows.offset = readable(offset, {rows.vocab}, type, "offset");
  rows.scale = readable(scale, {1}, type, "scale");
  return rows;
}

inline TeacherRows parse_teacher_rows(const Tensor& logits, const OptionalTensor& offset, const Tensor& scale,
                                      const Tensor& others, const Tensor& best) {
  auto rows = parse_logit_rows<TeacherRows>(logits, offset, scale);
  const auto type = accumulation_type(logits);
  rows.others = writable(others, {rows.count}, type, "others");
  rows.best = writable<int64_t>(best, {rows.count}, ScalarType::Long, "best");
  return rows;
}

inline DistillationRows parse_distillation_rows(const Tensor& logits, const OptionalTensor& offset, const Tensor& scale,
                                                const Tensor& teacher, const Tensor& teacher_others,
                                                const Tensor& teacher_best, const OptionalTensor& index,
                                                const OptionalTensor& share, const OptionalTensor& coefficient,
                                                const Tensor& loss, const Tensor& gap, const Tensor& teacher_entropy,
                                                const Tensor& student_entropy, const Tensor& agreement,
                                                const OptionalTensor& grad, bool divergence, bool stats) {
  auto rows = parse_logit_rows<DistillationRows>(logits, offset, scale);
  check_matrix(teacher, "teacher");
  const auto type = accumulation_type(logits);
  const int64_t teachers = rows.teachers = teacher.size(0);
  check_shape(teacher, {teachers, rows.vocab}, type, "teacher");
  rows.teacher = teacher.const_data_ptr();
  rows.teacher_stride = teacher.stride(0);
  rows.teacher_others = readable(teacher_others, {teachers}, type, "teacher_others");
  rows.teacher_best = readable<int64_t>(teacher_best, {teachers}, ScalarType::Long, "teacher_best");
  check_indices(teacher_best, teachers, rows.vocab, "teacher_best");
  STD_TORCH_CHECK(index.has_value() == share.has_value(), "sslkernels: index and share go together");
  rows.choices = 1;
  if (index) {
    STD_TORCH_CHECK(index->dim() == 2, "sslkernels: index must have 2 dimensions");
    rows.choices = index->size(1);
    rows.index = readable<int64_t>(*index, {rows.count, rows.choices}, ScalarType::Long, "index");
    rows.share = readable(share, {rows.count, rows.choices}, type, "share");
    check_optional_indices(*index, rows.count * rows.choices, teachers, "index");
  } else {
    STD_TORCH_CHECK(teachers == rows.count, "sslkernels: without an index there is a teacher for each row");
  }
  rows.coefficient = readable(coefficient, {rows.count}, type, "coefficient");
  STD_TORCH_CHECK(coefficient.has_value() == grad.has_value(), "sslkernels: coefficient and grad go together");
  rows.grad_element = rows.element;
  if (grad) {
    check_matrix(*grad, "grad");
    check_shape(*grad, {rows.count, rows.vocab}, grad->scalar_type(), "grad");
    rows.grad_element = element_of(*grad);
    rows.grad = grad->mutable_data_ptr();
    rows.grad_stride = grad->stride(0);
    const bool in_place = rows.grad == rows.logits && rows.grad_stride == rows.stride;
    STD_TORCH_CHECK(logits.is_cuda() || in_place || rows.count == 0, "sslkernels: grad must be the logits on a CPU");
  }
  rows.loss = writable(loss, {rows.count}, type, "loss");
  rows.gap = writable(gap, {rows.count}, type, "gap");
  if (stats) {
    rows.teacher_entropy = writable(teacher_entropy, {rows.count}, type, "teacher_entropy");
    rows.student_entropy = writable(student_entropy, {rows.count}, type, "student_entropy");
    rows.agreement = writable<bool>(agreement, {rows.count}, ScalarType::Bool, "agreement");
  }
  rows.divergence = divergence;
  return rows;
}

}  // namespace sslkernels
