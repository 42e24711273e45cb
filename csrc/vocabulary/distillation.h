// Distillation between rows of logits: arguments of its kernels; `stream` is a cudaStream_t. A row of the student is
// compared with the mean of some rows of the teacher.
//
// A is the accumulation type, float or double, which is also the type of the logits. With z = scale * logit + offset:
//
//   teacher  Q_k = exp(z_k - max z_k) / (1 + others_k)     others_k: the sum of the exponentials but the largest, 1
//   student  p_i = exp(z_i - m_i) / (1 + others_i)         q_i = sum_t share_it Q_(index_it)
//   loss_i = sum_v q_iv (m_i - z_iv) + log1p(others_i)     gradient: coefficient_i (p_i - q_i)
//
// Every term of the loss is at least 0, and sums leave the largest exponential out: a confident row keeps its loss.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/element.h"
#include "core/host_device.h"

namespace sslkernels {

// The logits become exp(z - max z).
struct TeacherRows {
  Element element;
  void* logits;
  int64_t stride;
  int64_t count;
  int64_t vocab;
  const void* offset;  // A (vocab), or null
  const void* scale;   // A (1)
  void* others;        // A (count)
  int64_t* best;       // (count): the column of the largest logit
};

struct DistillationRows {
  Element element;
  void* logits;
  int64_t stride;
  int64_t count;
  int64_t vocab;
  const void* offset;
  const void* scale;
  const void* teacher;  // the exponentials that teacher_rows wrote
  int64_t teacher_stride;
  int64_t teachers;
  const void* teacher_others;
  const int64_t* teacher_best;
  const int64_t* index;  // (count, choices), or null: row i
  const void* share;     // A (count, choices): weights that sum to 1; 0: none. A row of none is left out.
  int64_t choices;
  const void* coefficient;  // A (count), or null: no gradient
  void* loss;               // A (count), like the gap: the mean of m - z under p minus its mean under q
  void* gap;
  void* teacher_entropy;  // A (count), like the student's; null: no statistics
  void* student_entropy;
  bool* agreement;  // whether q and p are largest in the same column
  void* grad;       // (count, vocab), if there are coefficients; may be the logits, and on a CPU is
  int64_t grad_stride;
  Element grad_element;
  bool divergence;  // subtract the entropy of q
};

namespace {  // one copy for each instruction set of the CPU

// p - q of one column, where 1 - p and 1 - q are known without cancellation too.
template <class A>
SSLKERNELS_HD A difference(A p, A q, A rest_of_p, A rest_of_q) {
  return p > A(0.5) && q > A(0.5) ? rest_of_q - rest_of_p : p - q;
}

}  // namespace

// Rows [begin, end).
SSLKERNELS_CPU_KERNELS(void teacher_rows(const TeacherRows& rows, int64_t begin, int64_t end);
                       void distillation_rows(const DistillationRows& rows, int64_t begin, int64_t end);)

// A row with an index out of range has NaN results.
void launch_teacher_rows(const TeacherRows& rows, void* stream);
void launch_distillation_rows(const DistillationRows& rows, void* stream);

}  // namespace sslkernels
