#pragma once

#include "core/bind.h"
#include "vocabulary/distillation.h"

namespace sslkernels {

inline TeacherRows parse_teacher_rows(const Tensor& logits, const OptionalTensor& offset, const Tensor& scale,
                                      const Tensor& others, const Tensor& best) {
  check_matrix(logits, "logits");
  const auto type = accumulation_type(logits);
  STD_TORCH_CHECK(logits.scalar_type() == type, "sslkernels: logits must be float32 or float64");
  TeacherRows rows{};
  rows.element = element_of(logits);
  rows.logits = logits.mutable_data_ptr();
  rows.stride = logits.stride(0);
  rows.count = logits.size(0);
  rows.vocab = logits.size(1);
  rows.offset = readable(offset, {rows.vocab}, type, "offset");
  rows.scale = readable(scale, {1}, type, "scale");
  rows.others = writable(others, {rows.count}, type, "others");
  rows.best = writable<int64_t>(best, {rows.count}, ScalarType::Long, "best");
  return rows;
}

inline DistillationRows parse_distillation_rows(const Tensor& logits, const OptionalTensor& offset, const Tensor& scale,
                                                const Tensor& teacher, const Tensor& teacher_others,
                                                const Tensor& teacher_best, const OptionalTensor& index,
                                                const OptionalTensor& share, const OptionalTensor& coefficient,
                                                const Tensor& loss, const Tensor& gap, const Tensor& teacher_entropy,
                                                const Tensor& student_entropy, const Tensor& agreement, bool divergence,
                                                bool stats) {
  check_matrix(logits, "logits");
  check_matrix(teacher, "teacher");
  const auto type = accumulation_type(logits);
  STD_TORCH_CHECK(logits.scalar_type() == type, "sslkernels: logits must be float32 or float64");
  DistillationRows rows{};
  rows.element = element_of(logits);
  rows.logits = logits.mutable_data_ptr();
  rows.stride = logits.stride(0);
  rows.count = logits.size(0);
  rows.vocab = logits.size(1);
  rows.offset = readable(offset, {rows.vocab}, type, "offset");
  rows.scale = readable(scale, {1}, type, "scale");
  const int64_t teachers = teacher.size(0);
  check_shape(teacher, {teachers, rows.vocab}, type, "teacher");
  rows.teacher = teacher.const_data_ptr();
  rows.teacher_stride = teacher.stride(0);
  rows.teacher_others = readable(teacher_others, {teachers}, type, "teacher_others");
  rows.teacher_best = readable<int64_t>(teacher_best, {teachers}, ScalarType::Long, "teacher_best");
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
