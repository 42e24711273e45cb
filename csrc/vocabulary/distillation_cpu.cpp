// Distillation between rows of logits: loss, statistics, and the student's gradient in place.
//
// A row is processed in blocks that stay in the L1 cache, and stays in the L2 cache from pass to pass: one for the
// maximum; one for the exponentials, which replace the logits, and the sums; one for the gradient. Statistics and the
// entropy of the teacher take one more. Block sums are accumulated in double.
#include <limits>

#include "core/cpu/vector_math.h"
#include "vocabulary/distillation.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kBlock = 2048;

template <class A>
struct Logits {
  const A* raw;
  const A* offset;
  A scale;

  // z of columns [begin, begin + count), in `out`.
  void block(int64_t begin, int64_t count, A* out) const {
    const A* in = raw + begin;
    const A factor = scale;
    if (offset == nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) out[j] = in[j] * factor;
    } else {
      const A* add = offset + begin;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) out[j] = fused(in[j], factor, add[j]);
    }
  }

  A at(int64_t column) const {
    A z;
    block(column, 1, &z);
    return z;
  }

  // The largest z of the block, NaN left out.
  A block_max(int64_t begin, int64_t count) const {
    const A* in = raw + begin;
    const A factor = scale;
    A largest = -std::numeric_limits<A>::infinity();
    if (offset == nullptr) {
#pragma omp simd reduction(max : largest)
      for (int64_t j = 0; j < count; ++j) {
        const A z = in[j] * factor;
        largest = z > largest ? z : largest;
      }
    } else {
      const A* add = offset + begin;
#pragma omp simd reduction(max : largest)
      for (int64_t j = 0; j < count; ++j) {
        const A z = fused(in[j], factor, add[j]);
        largest = z > largest ? z : largest;
      }
    }
    return largest;
  }
};

// run(begin, count) over the blocks of [begin, end).
template <class Run>
void blocks(int64_t begin, int64_t end, Run run) {
  for (; begin < end; begin += kBlock) run(begin, end - begin < kBlock ? end - begin : kBlock);
}

template <class Run>
void blocks_without(int64_t column, int64_t vocab, Run run) {
  blocks(0, column, run);
  blocks(column + 1, vocab, run);
}

template <class A>
struct Largest {
  A value = -std::numeric_limits<A>::infinity();
  int64_t column = 0;

  // NaN never wins. The column is the lowest of equals.
  void update(const A* values, int64_t begin, int64_t count) {
    A largest = value;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < count; ++j) largest = values[j] > largest ? values[j] : largest;
    if (!(largest > value)) return;
    value = largest;
    int64_t j = 0;
    while (values[j] != largest) ++j;
    column = begin + j;
  }

  // NaN for a row whose largest logit is infinite or NaN: it has no softmax.
  double poison() const { return double(value - value); }
};

template <class A>
Largest<A> largest_of(const Logits<A>& logits, int64_t vocab) {
  Largest<A> largest;
  A z[kBlock];
  blocks(0, vocab, [&](int64_t begin, int64_t count) {
    if (!(logits.block_max(begin, count) > largest.value)) return;
    logits.block(begin, count, z);  // only to find the column
    largest.update(z, begin, count);
  });
  return largest;
}

template <class A>
void teacher_row(const TeacherRows& rows, int64_t i) {
  A* row = static_cast<A*>(rows.logits) + i * rows.stride;
  const Logits<A> logits{row, static_cast<const A*>(rows.offset), *static_cast<const A*>(rows.scale)};
  const Largest<A> largest = largest_of(logits, rows.vocab);
  double others = largest.poison();
  A z[kBlock];
  blocks_without(largest.column, rows.vocab, [&](int64_t begin, int64_t count) {
    logits.block(begin, count, z);
    A* out = row + begin;
    A sum = 0;
    const A anchor = largest.value;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) {
      const A e = exp_nonpositive(z[j] - anchor);
      sum += e;
      out[j] = e;
    }
    others += sum;
  });
  row[largest.column] = 1;
  static_cast<A*>(rows.others)[i] = A(others);
  rows.best[i] = largest.column;
}

// q of a row: factor * block(...).
template <class A>
class Target {
 public:
  Target(const DistillationRows& rows, int64_t i) : rows_(rows), i_(i) {
    for (int64_t t = 0; t < rows.choices; ++t) {
      if (teacher(t) < 0) continue;
      last_ = t;
      ++chosen_;
    }
    if (chosen_ == 1) factor = factor_of(last_);
  }

  bool empty() const { return chosen_ == 0; }

  // A row of the teacher itself, or the mixture of several in `buffer`.
  const A* block(int64_t begin, int64_t count, A* buffer) const {
    if (chosen_ == 1) return row(last_) + begin;
    bool first = true;
    for (int64_t t = 0; t < rows_.choices; ++t) {
      if (teacher(t) < 0) continue;
      const A weight = factor_of(t);
      const A* in = row(t) + begin;
      if (first) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) buffer[j] = weight * in[j];
      } else {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) buffer[j] = fused(weight, in[j], buffer[j]);
      }
      first = false;
    }
    return buffer;
  }

  // q and 1 - q of a column.
  void at(int64_t column, A* q, A* rest) const {
    *q = *rest = 0;
    for (int64_t t = 0; t < rows_.choices; ++t) {
      if (teacher(t) < 0) continue;
      const A weight = factor_of(t), e = row(t)[column];
      *q += weight * e;
      *rest += rows_.teacher_best[teacher(t)] == column ? weight * others(t) : share(t) - weight * e;
    }
  }

  // The column that has more than half of q, -1 if none has. It is the largest column of one of the teachers.
  int64_t sure() const {
    for (int64_t t = 0; t < rows_.choices; ++t) {
      if (teacher(t) < 0) continue;
      const int64_t column = rows_.teacher_best[teacher(t)];
      A q, rest;
      at(column, &q, &rest);
      if (q > A(0.5)) return column;
    }
    return -1;
  }

  A factor = 1;

 private:
  int64_t teacher(int64_t t) const { return rows_.index == nullptr ? i_ : rows_.index[i_ * rows_.choices + t]; }
  A share(int64_t t) const {
    return rows_.share == nullptr ? A(1) : static_cast<const A*>(rows_.share)[i_ * rows_.choices + t];
  }
  A others(int64_t t) const { return static_cast<const A*>(rows_.teacher_others)[teacher(t)]; }
  A factor_of(int64_t t) const { return share(t) / (A(1) + others(t)); }
  const A* row(int64_t t) const { return static_cast<const A*>(rows_.teacher) + teacher(t) * rows_.teacher_stride; }

  const DistillationRows& rows_;
  int64_t i_, last_ = 0, chosen_ = 0;
};

template <class A>
void leave_out(const DistillationRows& rows, int64_t i, A* row) {
  static_cast<A*>(rows.loss)[i] = static_cast<A*>(rows.gap)[i] = 0;
  if (rows.teacher_entropy != nullptr) {
    static_cast<A*>(rows.teacher_entropy)[i] = static_cast<A*>(rows.student_entropy)[i] = 0;
    rows.agreement[i] = false;
  }
  if (rows.coefficient == nullptr) return;
  for (int64_t j = 0; j < rows.vocab; ++j) row[j] = 0;
}

// Sums of a row over p and q, both up to a factor.
struct Sums {
  double others = 0;       // e = exp(z - m) of the other columns
  double student_gap = 0;  // e (m - z)
  double target_gap = 0;   // q (m - z)
};

template <class A>
Sums sums_of(const Logits<A>& logits, const Target<A>& target, const Largest<A>& largest, int64_t vocab, A* stored) {
  Sums sums;
  sums.others = largest.poison();
  A z[kBlock], mixture[kBlock];
  blocks_without(largest.column, vocab, [&](int64_t begin, int64_t count) {
    logits.block(begin, count, z);
    const A* q = target.block(begin, count, mixture);
    A* out = stored == nullptr ? z : stored + begin;
    const A anchor = largest.value;
    A sum = 0, student_gap = 0, target_gap = 0;
#pragma omp simd reduction(+ : sum, student_gap, target_gap)
    for (int64_t j = 0; j < count; ++j) {
      const A gap = anchor - z[j];
      const A e = exp_nonpositive(-gap);
      sum += e;
      student_gap += e == A(0) ? e : e * gap;  // 0 where a logit is -inf
      target_gap += q[j] == A(0) ? q[j] : q[j] * gap;
      out[j] = e;
    }
    sums.others += sum;
    sums.student_gap += student_gap;
    sums.target_gap += target_gap;
  });
  if (stored != nullptr) stored[largest.column] = 1;
  return sums;
}

// Sums that need log q, and so a second pass over the row.
template <class A>
struct Comparison {
  double entropy = 0;     // entropy of q
  double divergence = 0;  // divergence of p from q, as a sum of terms that are at least 0
  Largest<A> target;
};

// The student's largest column and the column with more than half of q are added last, from 1 - p and 1 - q, which keep
// their digits where p and q are near 1.
template <class A>
Comparison<A> compare(const Logits<A>& logits, const Target<A>& target, const Largest<A>& largest, A others,
                      int64_t vocab, A* stored) {
  Comparison<A> found;
  A z[kBlock], mixture[kBlock];
  const A anchor = largest.value, log_sum = std::log1p(others), inverse = A(1) / (A(1) + others);
  const int64_t best = largest.column, sure = target.sure(), apart[] = {best, sure};
  const A gap_of_sure = sure < 0 || sure == best ? A(0) : anchor - logits.at(sure);  // before the row is overwritten
  blocks(0, vocab, [&](int64_t begin, int64_t count) {
    logits.block(begin, count, z);
    const A* unscaled = target.block(begin, count, mixture);
    A* out = stored == nullptr ? z : stored + begin;
    const A factor = target.factor;
    A entropy = 0, divergence = 0;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) mixture[j] = factor * unscaled[j];
    found.target.update(mixture, begin, count);
    for (const int64_t column : apart) {
      if (column < begin || column >= begin + count) continue;
      z[column - begin] = -std::numeric_limits<A>::infinity();
      mixture[column - begin] = 0;
    }
#pragma omp simd reduction(+ : entropy, divergence)
    for (int64_t j = 0; j < count; ++j) {
      const A gap = anchor - z[j], q = mixture[j];
      const A e = exp_nonpositive(-gap), p = e * inverse;
      const A log_q = log_positive(q);
      entropy -= q == A(0) ? q : q * log_q;
      divergence += q == A(0) ? p : q * (log_q + (gap + log_sum)) + (p - q);
      out[j] = e;
    }
    found.entropy += entropy;
    found.divergence += divergence;
  });
  const auto add = [&](int64_t column, A gap, A e, A rest_of_p) {
    const A p = e * inverse;
    A q, rest_of_q;
    target.at(column, &q, &rest_of_q);
    const A log_q = q > A(0.5) ? std::log1p(-rest_of_q) : std::log(q);
    found.entropy -= q == A(0) ? q : q * log_q;
    found.divergence += q == A(0) ? p : q * (log_q + (gap + log_sum)) + difference(p, q, rest_of_p, rest_of_q);
    if (stored != nullptr) stored[column] = e;
  };
  add(best, A(0), A(1), others * inverse);
  if (sure >= 0 && sure != best) {
    const A e = exp_nonpositive(-gap_of_sure);
    add(sure, gap_of_sure, e, A(1) - e * inverse);
  }
  return found;
}

template <class A>
void distillation_row(const DistillationRows& rows, int64_t i) {
  A* row = static_cast<A*>(rows.logits) + i * rows.stride;
  const Target<A> target(rows, i);
  if (target.empty()) return leave_out(rows, i, row);
  const Logits<A> logits{row, static_cast<const A*>(rows.offset), *static_cast<const A*>(rows.scale)};
  const Largest<A> largest = largest_of(logits, rows.vocab);
  const bool stats = rows.teacher_entropy != nullptr, compared = stats || rows.divergence;
  A* stored = rows.coefficient == nullptr ? nullptr : row;
  const Sums sums = sums_of(logits, target, largest, rows.vocab, compared ? nullptr : stored);
  const double log_sum = std::log1p(sums.others), student_gap = sums.student_gap / (1 + sums.others);
  const double target_gap = sums.target_gap * double(target.factor);
  static_cast<A*>(rows.loss)[i] = A(target_gap + log_sum);
  static_cast<A*>(rows.gap)[i] = A(student_gap - target_gap);
  if (compared) {
    const Comparison<A> found = compare(logits, target, largest, A(sums.others), rows.vocab, stored);
    const double poison = 0 * (sums.others + target_gap);  // NaN where the row has one
    if (rows.divergence) static_cast<A*>(rows.loss)[i] = A(found.divergence + poison);
    if (stats) {
      static_cast<A*>(rows.teacher_entropy)[i] = A(found.entropy);
      static_cast<A*>(rows.student_entropy)[i] = A(student_gap + log_sum);
      rows.agreement[i] = found.target.column == largest.column;
    }
  }
  if (stored == nullptr) return;

  const A coefficient = static_cast<const A*>(rows.coefficient)[i], total = A(1 + sums.others);
  A q, rest_of_q;
  target.at(largest.column, &q, &rest_of_q);
  const A at_largest = difference(A(1) / total, q, A(sums.others) / total, rest_of_q);
  const A student_factor = coefficient / total, target_factor = coefficient * target.factor;
  A mixture[kBlock];
  blocks(0, rows.vocab, [&](int64_t begin, int64_t count) {
    const A* in = target.block(begin, count, mixture);
    A* out = row + begin;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) out[j] = student_factor * out[j] - target_factor * in[j];
  });
  row[largest.column] = coefficient * at_largest;
}

template <class Run>
void with_accumulation(Element element, Run run) {
  element == Element::kDouble ? run(double{}) : run(float{});
}

}  // namespace

void teacher_rows(const TeacherRows& rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    with_accumulation(rows.element, [&](auto zero) { teacher_row<decltype(zero)>(rows, i); });
  }
}

void distillation_rows(const DistillationRows& rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    with_accumulation(rows.element, [&](auto zero) { distillation_row<decltype(zero)>(rows, i); });
  }
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
