// Distillation between rows of logits, a block per row. A row of the teacher is read for its maximum and the sum, which
// a thread keeps relative to its maximum so far, and again for the exponentials that replace it; a row of the student,
// with the teacher rows that it is compared with, for the maximum and all sums, and again for its gradient. Blocks of
// long rows are large, so that the rows in flight stay in the L2 cache until they are read again. Every reduction has a
// fixed order.
#include <algorithm>

#include "core/cuda/columns.h"
#include "core/cuda/launch.h"
#include "core/cuda/reduce.h"
#include "vocabulary/distillation.h"

namespace sslkernels {
namespace {

constexpr int kGroupsOfThread = 2;  // at least, of a row
template <class A>                  // threads per block, at most: 64 registers each, float64 128
constexpr int kMostThreads = sizeof(A) == 8 ? 512 : 1024;

// Columns of a thread in turn: 16 bytes of logits, and of the gradient.
template <class A, class G>
constexpr int kColumns = 16 / int(std::min(sizeof(A), sizeof(G)));

// z = scale * logit + offset of kSize columns; -inf beyond the end of the row.
template <class A>
struct LogitRow {
  const A* logits;
  const A* offset;
  A scale;
  int vocab;

  template <int kSize>
  __device__ __forceinline__ void load(int column, A (&z)[kSize]) const {
    load_columns(logits, column, vocab, z);
    A add[kSize] = {};
    if (offset != nullptr) load_columns(offset, column, vocab, add);
#pragma unroll
    for (int k = 0; k < kSize; ++k) z[k] = column + k < vocab ? z[k] * scale + add[k] : A(-INFINITY);
  }
  __device__ __forceinline__ A at(int column) const {
    return logits[column] * scale + (offset == nullptr ? A(0) : offset[column]);
  }
};

// The largest z of some columns and sums over the others. With e = exp(z - maximum): others sums e and
// student_gap e (maximum - z); mass sums q and target_gap q (maximum - z), over all columns. A z of -inf has no e, and
// an infinite gap as soon as there is a maximum. NaN is never the maximum, and reaches the sums.
template <class A>
struct RowSums {
  A maximum;
  A others;
  A student_gap;
  A mass;
  A target_gap;
  int32_t column;
  int32_t unused;

  static __device__ __forceinline__ RowSums identity() { return {A(-INFINITY), A(0), A(0), A(0), A(0), INT32_MAX, 0}; }

  // Selects field by field: selecting a struct would select an address in local memory.
  static __device__ __forceinline__ RowSums chosen(bool first, RowSums a, RowSums b) {
    return {first ? a.maximum : b.maximum,
            first ? a.others : b.others,
            first ? a.student_gap : b.student_gap,
            first ? a.mass : b.mass,
            first ? a.target_gap : b.target_gap,
            first ? a.column : b.column,
            0};
  }
  // Adds the sums `lower`, whose maximum is not larger.
  __device__ __forceinline__ void add(const RowSums& lower) {
    const A distance = maximum - lower.maximum;
    mass += lower.mass;
    target_gap += lower.target_gap;
    if (lower.maximum == A(-INFINITY)) {
      others += lower.others;  // NaN or 0
      if (lower.mass != A(0) && maximum > A(-INFINITY)) target_gap += lower.mass * distance;
      return;
    }
    const A factor = std::exp(-distance), sum = A(1) + lower.others;
    others += factor * sum;
    if (factor != A(0)) student_gap += factor * (lower.student_gap + sum * distance);
    if (lower.mass != A(0)) target_gap += lower.mass * distance;
  }
  static __device__ __forceinline__ RowSums combine(RowSums a, RowSums b) {
    const bool of_a = a.maximum > b.maximum || (a.maximum == b.maximum && a.column <= b.column);
    RowSums top = chosen(of_a, a, b);
    top.add(chosen(of_a, b, a));
    return top;
  }
  __device__ __forceinline__ void visit(A z, A q, int at) {
    if (z > maximum) {
      RowSums top{z, A(0), A(0), q, A(0), at, 0};
      top.add(*this);
      *this = top;
      return;
    }
    mass += q;
    if (z == A(-INFINITY) && maximum == A(-INFINITY)) return;
    const A gap = maximum - z, e = std::exp(-gap);
    others += e;
    if (e != A(0)) student_gap += e * gap;  // 0 where a logit is -inf
    if (q != A(0)) target_gap += q * gap;
  }
};

// Sums that need log q, and the largest q.
template <class A>
struct ComparedSums {
  A entropy;
  A divergence;
  A most;
  int32_t column;
  int32_t unused[sizeof(A) == 8 ? 1 : 2];

  static __device__ __forceinline__ ComparedSums identity() { return {A(0), A(0), A(-INFINITY), INT32_MAX, {}}; }
  static __device__ __forceinline__ ComparedSums combine(ComparedSums a, ComparedSums b) {
    const bool of_b = b.most > a.most || (b.most == a.most && b.column < a.column);
    return {a.entropy + b.entropy, a.divergence + b.divergence, of_b ? b.most : a.most, of_b ? b.column : a.column, {}};
  }
};

template <class A>
using SumsReduction = Reduction<RowSums<A>>;
template <class A>
using ComparedReduction = Reduction<ComparedSums<A>>;
template <class A>
struct Scratch {
  typename SumsReduction<A>::Scratch sums;
  typename ComparedReduction<A>::Scratch compared;
};

// Calls visit(column) for the groups of kSize columns of this thread.
template <int kSize, class Visit>
__device__ __forceinline__ void for_each_group(int vocab, Visit visit) {
  for (int64_t column = int64_t(threadIdx.x) * kSize; column < vocab; column += int64_t(blockDim.x) * kSize) {
    visit(int(column));
  }
}

// Grid: a block per row.
template <class A>
__global__ void __launch_bounds__(kMostThreads<A>, 1) teacher_rows_kernel(const __grid_constant__ TeacherRows rows) {
  constexpr int kSize = kColumns<A, A>;
  const int64_t i = blockIdx.x;
  A* const row = static_cast<A*>(rows.logits) + i * rows.stride;
  const int vocab = int(rows.vocab);
  const LogitRow<A> logits{row, static_cast<const A*>(rows.offset), *static_cast<const A*>(rows.scale), vocab};
  auto sums = RowSums<A>::identity();
  for_each_group<kSize>(vocab, [&](int column) {
    A z[kSize];
    logits.load(column, z);
#pragma unroll
    for (int k = 0; k < kSize; ++k) sums.visit(z[k], A(0), column + k);
  });
  sums = SumsReduction<A>::over_cluster(sums, &reinterpret_cast<Scratch<A>*>(shared_memory())->sums);
  const int best = sums.column < vocab ? sums.column : 0;
  for_each_group<kSize>(vocab, [&](int column) {
    A z[kSize];
    logits.load(column, z);
#pragma unroll
    for (int k = 0; k < kSize; ++k) z[k] = column + k == best ? A(1) : std::exp(z[k] - sums.maximum);
    store_columns(z, row, column, vocab);
  });
  if (threadIdx.x == 0) {
    static_cast<A*>(rows.others)[i] = sums.others + (sums.maximum - sums.maximum);  // NaN without a finite maximum
    rows.best[i] = best;
  }
  SumsReduction<A>::finish();
}

// q of a row.
template <class A>
struct Target {
  const DistillationRows& rows;
  int64_t i;
  int chosen = 0;
  bool wrong = false;  // an index is out of range

  __device__ __forceinline__ Target(const DistillationRows& rows, int64_t i) : rows(rows), i(i) {
    for (int64_t t = 0; t < rows.choices; ++t) {
      chosen += teacher(t) >= 0;
      wrong = wrong || teacher(t) >= rows.teachers;
    }
  }
  __device__ __forceinline__ int64_t teacher(int64_t t) const {
    return rows.index == nullptr ? i : rows.index[i * rows.choices + t];
  }
  __device__ __forceinline__ A share(int64_t t) const {
    return rows.share == nullptr ? A(1) : static_cast<const A*>(rows.share)[i * rows.choices + t];
  }
  __device__ __forceinline__ A others(int64_t k) const { return static_cast<const A*>(rows.teacher_others)[k]; }
  __device__ __forceinline__ const A* row(int64_t k) const {
    return static_cast<const A*>(rows.teacher) + k * rows.teacher_stride;
  }

  template <int kSize>
  __device__ __forceinline__ void load(int column, A (&q)[kSize]) const {
#pragma unroll
    for (int k = 0; k < kSize; ++k) q[k] = A(0);
    for (int64_t t = 0; t < rows.choices; ++t) {
      const int64_t number = teacher(t);
      if (number < 0) continue;
      const A factor = share(t) / (A(1) + others(number));
      A e[kSize];
      load_columns(row(number), column, int(rows.vocab), e);
#pragma unroll
      for (int k = 0; k < kSize; ++k) q[k] += factor * e[k];
    }
  }
  // q and 1 - q of a column, each without cancellation.
  __device__ __forceinline__ void at(int column, A* q, A* rest) const {
    *q = *rest = A(0);
    for (int64_t t = 0; t < rows.choices; ++t) {
      const int64_t number = teacher(t);
      if (number < 0) continue;
      const A factor = share(t) / (A(1) + others(number)), part = factor * row(number)[column];
      *q += part;
      *rest += rows.teacher_best[number] == column ? factor * others(number) : share(t) - part;
    }
  }
  // The column that has more than half of q, -1 if none has. It is the largest column of one of the teachers.
  __device__ __forceinline__ int sure() const {
    for (int64_t t = 0; t < rows.choices; ++t) {
      if (teacher(t) < 0) continue;
      const int64_t best = rows.teacher_best[teacher(t)];
      if (best < 0 || best >= rows.vocab) continue;  // not written by teacher_rows
      const int column = int(best);
      A q, rest;
      at(column, &q, &rest);
      if (q > A(0.5)) return column;
    }
    return -1;
  }
};

// Writes the results of a row without a teacher (0) or with an index out of range (NaN).
template <class A, class G>
__device__ __forceinline__ void write_excluded(const DistillationRows& rows, int64_t i, A value) {
  constexpr int kSize = kColumns<A, G>;
  if (rows.coefficient != nullptr) {
    G* const grad = static_cast<G*>(rows.grad) + i * rows.grad_stride;
    A values[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) values[k] = value;
    for_each_group<kSize>(int(rows.vocab), [&](int column) { store_columns(values, grad, column, int(rows.vocab)); });
  }
  if (threadIdx.x != 0) return;
  static_cast<A*>(rows.loss)[i] = static_cast<A*>(rows.gap)[i] = value;
  if (rows.teacher_entropy != nullptr) {
    static_cast<A*>(rows.teacher_entropy)[i] = static_cast<A*>(rows.student_entropy)[i] = value;
    rows.agreement[i] = false;
  }
}

// Adds one column, which the sums left out because 1 - p and 1 - q are known to their digits there.
template <class A>
__device__ __forceinline__ void add_column(ComparedSums<A>& sums, const Target<A>& target, int column, A p, A rest_of_p,
                                           A log_p) {
  A q, rest_of_q;
  target.at(column, &q, &rest_of_q);
  if (q == A(0)) {
    sums.divergence += p;
    return;
  }
  const A log_q = q > A(0.5) ? std::log1p(-rest_of_q) : std::log(q);
  sums.entropy -= q * log_q;
  sums.divergence += q * (log_q - log_p) + difference(p, q, rest_of_p, rest_of_q);
}

template <class A>
__device__ __forceinline__ ComparedSums<A> compare(const LogitRow<A>& logits, const Target<A>& target,
                                                   const RowSums<A>& sums, A log_sum,
                                                   typename ComparedReduction<A>::Scratch* scratch) {
  constexpr int kSize = kColumns<A, A>;
  const A inverse = A(1) / (A(1) + sums.others);
  const int sure = target.sure();
  auto found = ComparedSums<A>::identity();
  for_each_group<kSize>(logits.vocab, [&](int column) {
    A z[kSize], q[kSize];
    logits.load(column, z);
    target.load(column, q);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if (column + k >= logits.vocab) break;
      if (q[k] > found.most) {
        found.most = q[k];
        found.column = column + k;
      }
      if (column + k == sums.column || column + k == sure) continue;
      const A gap = sums.maximum - z[k], p = std::exp(-gap) * inverse;
      if (q[k] == A(0)) {
        found.divergence += p;
      } else {
        const A log_q = std::log(q[k]);
        found.entropy -= q[k] * log_q;
        found.divergence += q[k] * (log_q + (gap + log_sum)) + (p - q[k]);
      }
    }
  });
  found = ComparedReduction<A>::over_cluster(found, scratch);
  add_column(found, target, sums.column, inverse, sums.others * inverse, -log_sum);
  if (sure >= 0 && sure != sums.column) {
    const A gap = sums.maximum - logits.at(sure), p = std::exp(-gap) * inverse;
    add_column(found, target, sure, p, A(1) - p, -(gap + log_sum));
  }
  return found;
}

// Grid: a block per row. G is the type of the gradient.
template <class A, class G>
__global__ void __launch_bounds__(kMostThreads<A>, 1)
    distillation_rows_kernel(const __grid_constant__ DistillationRows rows) {
  constexpr int kSize = kColumns<A, A>;
  const int64_t i = blockIdx.x;
  const int vocab = int(rows.vocab);
  const Target<A> target(rows, i);
  if (target.chosen == 0 || target.wrong) return write_excluded<A, G>(rows, i, target.wrong ? A(NAN) : A(0));
  const LogitRow<A> logits{static_cast<const A*>(rows.logits) + i * rows.stride, static_cast<const A*>(rows.offset),
                           *static_cast<const A*>(rows.scale), vocab};
  auto* const scratch = reinterpret_cast<Scratch<A>*>(shared_memory());
  auto sums = RowSums<A>::identity();
  for_each_group<kSize>(vocab, [&](int column) {
    A z[kSize], q[kSize];
    logits.load(column, z);
    target.load(column, q);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if (column + k < vocab) sums.visit(z[k], q[k], column + k);
    }
  });
  sums = SumsReduction<A>::over_cluster(sums, &scratch->sums);
  sums.others += sums.maximum - sums.maximum;  // NaN without a finite maximum
  if (sums.column >= vocab) sums.column = 0;
  const A total = A(1) + sums.others, log_sum = std::log1p(sums.others), student_gap = sums.student_gap / total;
  A loss = sums.target_gap + log_sum;
  const bool stats = rows.teacher_entropy != nullptr;
  if (stats || rows.divergence) {
    const ComparedSums<A> found = compare(logits, target, sums, log_sum, &scratch->compared);
    if (rows.divergence) loss = found.divergence + A(0) * (sums.target_gap + sums.others);  // NaN where the row has one
    if (stats && threadIdx.x == 0) {
      static_cast<A*>(rows.teacher_entropy)[i] = found.entropy;
      static_cast<A*>(rows.student_entropy)[i] = student_gap + log_sum;
      rows.agreement[i] = found.column == sums.column;
    }
  }
  if (threadIdx.x == 0) {
    static_cast<A*>(rows.loss)[i] = loss;
    static_cast<A*>(rows.gap)[i] = student_gap - sums.target_gap;
  }
  if (rows.coefficient == nullptr) return;

  constexpr int kWritten = kColumns<A, G>;
  const A coefficient = static_cast<const A*>(rows.coefficient)[i], inverse = A(1) / total;
  A q_best, rest_of_q;
  target.at(sums.column, &q_best, &rest_of_q);
  const A at_best = difference(inverse, q_best, sums.others * inverse, rest_of_q);
  // All threads have read the row's largest logit before one overwrites it.
  __syncthreads();
  G* const grad = static_cast<G*>(rows.grad) + i * rows.grad_stride;
  for_each_group<kWritten>(vocab, [&](int column) {
    A z[kWritten], q[kWritten];
    logits.load(column, z);
    target.load(column, q);
#pragma unroll
    for (int k = 0; k < kWritten; ++k) {
      const A there = column + k == sums.column ? at_best : std::exp(z[k] - sums.maximum) * inverse - q[k];
      z[k] = coefficient * there;
    }
    store_columns(z, grad, column, vocab);
  });
}

// At most kMostThreads, and as few as have kGroupsOfThread groups each.
template <class A>
int threads_for(int64_t vocab) {
  const int64_t wanted = ceil_div(vocab, kColumns<A, A> * kGroupsOfThread);
  return int(std::clamp<int64_t>(ceil_div(wanted, kWarpSize) * kWarpSize, kWarpSize, kMostThreads<A>));
}

template <class A>
void launch_teachers(const TeacherRows& rows, void* stream) {
  const LaunchShape shape{rows.count, threads_for<A>(rows.vocab), sizeof(Scratch<A>), 1};
  launch("teacher_rows_kernel", teacher_rows_kernel<A>, shape, stream, rows);
}

template <class A, class G>
void launch_students(const DistillationRows& rows, void* stream) {
  const LaunchShape shape{rows.count, threads_for<A>(rows.vocab), sizeof(Scratch<A>), 1};
  launch("distillation_rows_kernel", distillation_rows_kernel<A, G>, shape, stream, rows);
}

}  // namespace

void launch_teacher_rows(const TeacherRows& rows, void* stream) {
  check_dim(rows.vocab);
  switch (rows.element) {
    case Element::kFloat:
      return launch_teachers<float>(rows, stream);
    case Element::kDouble:
      return launch_teachers<double>(rows, stream);
    default:
      fail("teacher_rows_kernel takes float32 and float64 logits");
  }
}

void launch_distillation_rows(const DistillationRows& rows, void* stream) {
  check_dim(rows.vocab);
  if (rows.element == Element::kDouble && rows.grad_element == Element::kDouble) {
    return launch_students<double, double>(rows, stream);
  }
  if (rows.element != Element::kFloat || rows.grad_element == Element::kDouble) {
    fail("distillation_rows_kernel takes float32 or float64 logits, and a gradient that is no wider");
  }
  with_element(rows.grad_element, [&](auto zero) {
    if constexpr (sizeof(zero) <= 4) launch_students<float, decltype(zero)>(rows, stream);
  });
}

}  // namespace sslkernels
