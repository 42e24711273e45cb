// Gaussian samples and their divergence: the rows in blocks that stay in the cache, of which mean and logvar are read
// once, for all samples, and the noise is made where it is used.
#include "gaussian.h"

#include <algorithm>
#include <limits>

#include "element.h"
#include "noise_lanes.h"
#include "vector_math.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

static_assert(kGaussianChunk == 4 * kGroups, "a chunk is a block of groups");

// Rows of one chunk of columns, at most kGroups groups: element (i, j) is number i * pitch + j of a buffer, and those
// between `count` and `pitch` belong to no column.
struct Batch {
  int64_t row;
  int64_t rows;
  int64_t column;
  int64_t count;
  int64_t pitch;

  int64_t size() const { return rows * pitch; }
  // visit(row, place in the buffer, how many) of what lies together in rows `stride` apart.
  template <class Visit>
  void for_each_run(int64_t stride, Visit visit) const {
    if (stride == pitch && count == pitch) return visit(row, 0, size());
    for (int64_t i = 0; i < rows; ++i) visit(row + i, i * pitch, count);
  }
};

struct Task {
  int64_t begin;  // rows
  int64_t end;
  int64_t block;  // of the partial sums
  int64_t chunk;
};

int64_t groups_of(int64_t columns) { return (columns + 3) / 4; }

Task task_of(const Gaussian& inputs, bool has_sums, int64_t index) {
  const int64_t rows = gaussian_rows_of_task(inputs, has_sums), chunks = gaussian_chunks(inputs);
  const int64_t block = index / chunks;
  return {block * rows, std::min(inputs.rows, (block + 1) * rows), block, index % chunks};
}

template <class Visit>
void for_each_batch(const Gaussian& inputs, const Task& task, Visit visit) {
  const int64_t column = task.chunk * kGaussianChunk, count = std::min(kGaussianChunk, inputs.columns - column);
  const int64_t most = gaussian_rows_of_batch(inputs);
  for (int64_t row = task.begin; row < task.end; row += most) {
    visit(Batch{row, std::min(most, task.end - row), column, count, 4 * groups_of(count)});
  }
}

// The numbers of the groups for Philox.
void number_groups(const Gaussian& inputs, const Batch& batch, uint64_t* group) {
  const int64_t of_row = groups_of(inputs.columns), count = batch.pitch / 4;
  for (int64_t i = 0; i < batch.rows; ++i) {
    const int64_t row = batch.row + i, row_id = inputs.row_ids == nullptr ? row : inputs.row_ids[row];
    const uint64_t first = uint64_t(row_id) * uint64_t(of_row) + uint64_t(batch.column / 4);
    for (int64_t g = 0; g < count; ++g) group[i * count + g] = first + uint64_t(g);
  }
}

// Asks for what the next batch of these rows reads, or writes where kWrite: the hardware foresees no page's first
// lines.
template <class T, bool kWrite = false>
void prefetch_next(const void* rows, int64_t stride, const Batch& batch, int64_t all_rows) {
  const int64_t row = batch.row + batch.rows, left = all_rows - row;
  if (rows == nullptr || left <= 0 || stride == 0) return;
  const Batch next{row, left < batch.rows ? left : batch.rows, batch.column, batch.count, batch.pitch};
  const T* data = static_cast<const T*>(rows) + batch.column;
  next.for_each_run(stride, [&](int64_t first, int64_t, int64_t count) __attribute__((always_inline)) {
    const char* run = reinterpret_cast<const char*>(data + first * stride);
    for (int64_t at = 0; at < count * int64_t(sizeof(T)); at += 64) __builtin_prefetch(run + at, kWrite, 2);
  });
}

template <class T, class A>
void load_rows(const GaussianRows& rows, const Batch& batch, A* out) {
  const T* data = static_cast<const T*>(rows.data) + batch.column;
  batch.for_each_run(rows.stride,
                     [&](int64_t row, int64_t at, int64_t count) { load(data + row * rows.stride, count, out + at); });
}

template <class T, class A>
void store_rows(const A* in, const Batch& batch, int64_t stride, T* data) {
  batch.for_each_run(stride, [&](int64_t row, int64_t at, int64_t count) {
    store(in + at, count, data + row * stride + batch.column);
  });
}

template <class A>
A sum_of(const A* values, int64_t count) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += values[j];
  return sum;
}

template <class A>
struct Inputs {
  A mean[kGaussianChunk] = {};
  A logvar[kGaussianChunk] = {};  // clamped
  A scale[kGaussianChunk] = {};   // exp(logvar / 2)
  A prior_mean[kGaussianChunk] = {};
  A prior_logvar[kGaussianChunk] = {};
};

template <class T, class A>
void load_prior(const Gaussian& inputs, const Batch& batch, Inputs<A>& values) {
  if (inputs.prior_mean.data == nullptr) return;
  load_rows<T>(inputs.prior_mean, batch, values.prior_mean);
  load_rows<T>(inputs.prior_logvar, batch, values.prior_logvar);
}

template <class T>
void prefetch_inputs(const Gaussian& inputs, const Batch& batch) {
  for (const GaussianRows& rows : {inputs.mean, inputs.logvar, inputs.prior_mean, inputs.prior_logvar}) {
    prefetch_next<T>(rows.data, rows.stride, batch, inputs.rows);
  }
}

bool is_bounded(const Gaussian& inputs) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  return inputs.low > -kInfinity || inputs.high < kInfinity;
}

template <class T, class A>
void load_logvar(const Gaussian& inputs, const Batch& batch, Inputs<A>& values) {
  load_rows<T>(inputs.logvar, batch, values.logvar);
  if (is_bounded(inputs)) {
    const A low = A(inputs.low), high = A(inputs.high);
#pragma omp simd
    for (int64_t j = 0; j < batch.size(); ++j) values.logvar[j] = clamp(values.logvar[j], low, high);
  }
#pragma omp simd
  for (int64_t j = 0; j < batch.size(); ++j) values.scale[j] = vector_exp(A(0.5) * values.logvar[j]);
}

// visit(j, t, inverse_scale, expm1, excess) of every element: its place against the prior, whose scale is
// 1 / inverse_scale, and exp(d) - 1 and exp(d) - 1 - d of the difference d of the logarithms of the variances.
template <class A, class Visit>
void for_each_element(const Gaussian& inputs, int64_t size, const Inputs<A>& values, Visit visit) {
  if (inputs.prior_mean.data == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) {
      const A scale = values.scale[j];
      A expm1, excess;
      expm1_terms(values.logvar[j], scale * scale, &expm1, &excess);
      visit(j, values.mean[j], A(1), expm1, excess);
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) {
      const A inverse_scale = vector_exp(A(-0.5) * values.prior_logvar[j]);
      const A d = values.logvar[j] - values.prior_logvar[j];
      A expm1, excess;
      expm1_terms(d, vector_exp(d), &expm1, &excess);
      visit(j, (values.mean[j] - values.prior_mean[j]) * inverse_scale, inverse_scale, expm1, excess);
    }
  }
}

template <class A>
void find_kl(const Gaussian& inputs, int64_t size, const Inputs<A>& values, A* __restrict kl) {
  for_each_element(inputs, size, values, [=](int64_t j, A t, A, A, A excess) __attribute__((always_inline)) {
    kl[j] = divergence(t, excess);
  });
}

// --- Forward ------------------------------------------------------------------------------------------------------

template <class T, class A>
void draw_samples(const GaussianForward& forward, const Batch& batch, const Inputs<A>& values) {
  const Gaussian& inputs = forward.inputs;
  const uint64_t seed = uint64_t(*inputs.seed);
  uint64_t group[kGroups];
  float noise[kGaussianChunk];
  number_groups(inputs, batch, group);
  for (int64_t k = 0; k < inputs.samples; ++k) {
    normals_of_groups(seed, group, uint64_t(k), batch.size() / 4, noise);
    T* z = static_cast<T*>(forward.z) + k * forward.z_at.sample_stride + batch.column;
    batch.for_each_run(forward.z_at.row_stride, [&](int64_t row, int64_t at, int64_t count) {
      const A *mean = values.mean + at, *scale = values.scale + at;
      const float* eps = noise + at;
      T* __restrict out = z + row * forward.z_at.row_stride;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) from_float(fused(scale[j], A(eps[j]), mean[j]), &out[j]);
    });
  }
}

template <class A>
void write_kl(const GaussianForward& forward, const Batch& batch, int64_t chunk, A* __restrict kl) {
  const A free_bits = A(forward.inputs.free_bits);
  if (free_bits > A(0)) {
#pragma omp simd
    for (int64_t j = 0; j < batch.size(); ++j) kl[j] = kl[j] < free_bits ? free_bits : kl[j];
  }
  if (!forward.by_row) return store_rows(kl, batch, forward.inputs.columns, static_cast<A*>(forward.kl));
  for (int64_t i = 0; i < batch.rows; ++i) {
    static_cast<A*>(forward.kl)[(batch.row + i) * forward.kl_parts + chunk] = sum_of(kl + i * batch.pitch, batch.count);
  }
}

// Sums over the rows of a task, of each column: in double, for a variance is a difference.
struct ColumnStatistics {
  double kl[kGaussianChunk] = {};
  double mean[kGaussianChunk] = {};
  double square[kGaussianChunk] = {};

  template <class T, class A>
  void add(const Gaussian& inputs, const Batch& batch, const A* batch_kl, const Inputs<A>& values) {
    const T* pivot = static_cast<const T*>(inputs.mean.data) + batch.column;
    for (int64_t i = 0; i < batch.rows; ++i) {
      const A *row_kl = batch_kl + i * batch.pitch, *row_mean = values.mean + i * batch.pitch;
#pragma omp simd
      for (int64_t j = 0; j < batch.count; ++j) {
        const double moved = double(row_mean[j]) - double(to_float(pivot[j]));
        kl[j] += double(row_kl[j]);
        mean[j] += moved;
        square[j] += moved * moved;
      }
    }
  }

  template <class A>
  void finish(const Task& task, int64_t columns, A* out) {
    const int64_t column = task.chunk * kGaussianChunk, count = std::min(kGaussianChunk, columns - column);
    const double rows = double(task.end - task.begin);
    out += task.block * 3 * columns + column;
    for (int64_t j = 0; j < count; ++j) {
      out[j] = A(kl[j]);
      out[columns + j] = A(mean[j] / rows);
      out[2 * columns + j] = A(square[j] - mean[j] * mean[j] / rows);
      kl[j] = mean[j] = square[j] = 0;
    }
  }
};

template <class T>
void run_fwd(const GaussianForward& forward, int64_t begin, int64_t end) {
  using A = typename Accumulation<T>::type;
  const Gaussian& inputs = forward.inputs;
  const bool wants_kl = forward.kl != nullptr, wants_sums = forward.statistics != nullptr;
  Inputs<A> values;
  ColumnStatistics sums;
  A kl[kGaussianChunk];
  for (int64_t index = begin; index < end; ++index) {
    const Task task = task_of(inputs, wants_sums, index);
    for_each_batch(inputs, task, [&](const Batch& batch) {
      load_rows<T>(inputs.mean, batch, values.mean);
      load_logvar<T>(inputs, batch, values);
      load_prior<T>(inputs, batch, values);
      prefetch_inputs<T>(inputs, batch);
      if (inputs.samples == 1) prefetch_next<T, true>(forward.z, forward.z_at.row_stride, batch, inputs.rows);
      if (wants_kl || wants_sums) find_kl(inputs, batch.size(), values, kl);
      if (wants_sums) sums.add<T>(inputs, batch, kl, values);
      if (wants_kl) write_kl(forward, batch, task.chunk, kl);
      if (forward.z != nullptr) draw_samples<T>(forward, batch, values);
    });
    if (wants_sums) sums.finish(task, inputs.columns, static_cast<A*>(forward.statistics));
  }
}

// --- Backward -----------------------------------------------------------------------------------------------------

template <class A>
struct Slopes {
  A mean[kGaussianChunk] = {};    // the sum of the gradients of the samples, then the gradient
  A logvar[kGaussianChunk] = {};  // the same times the noise, then the gradient
  A prior_mean[kGaussianChunk] = {};
  A prior_logvar[kGaussianChunk] = {};
  A kl[kGaussianChunk] = {};  // the gradient of each element's divergence
};

template <class T, class A>
void add_samples(const GaussianBackward& backward, const Batch& batch, Slopes<A>& slopes) {
  const Gaussian& inputs = backward.inputs;
  const bool wants_noise = backward.grad_logvar != nullptr;
  const uint64_t seed = uint64_t(*inputs.seed);
  uint64_t group[kGroups];
  float noise[kGaussianChunk];
  if (wants_noise) number_groups(inputs, batch, group);
  for (int64_t k = 0; k < inputs.samples; ++k) {
    if (wants_noise) normals_of_groups(seed, group, uint64_t(k), batch.size() / 4, noise);
    const T* grad_z = static_cast<const T*>(backward.grad_z) + k * backward.z_at.sample_stride + batch.column;
    batch.for_each_run(backward.z_at.row_stride, [&](int64_t row, int64_t at, int64_t count) {
      const T* grad = grad_z + row * backward.z_at.row_stride;
      A* __restrict mean = slopes.mean + at, * __restrict logvar = slopes.logvar + at;
      const float* eps = noise + at;
      if (wants_noise) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          const A g = to_float(grad[j]);
          mean[j] += g;
          logvar[j] = fused(g, A(eps[j]), logvar[j]);
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) mean[j] += to_float(grad[j]);
      }
    });
  }
}

template <class A>
void load_grad_kl(const GaussianBackward& backward, const Batch& batch, A* out) {
  const A* grad = static_cast<const A*>(backward.grad_kl);
  if (!backward.by_row) return load_rows<A>({grad, backward.inputs.columns, false}, batch, out);
  for (int64_t i = 0; i < batch.rows; ++i) {
    std::fill_n(out + i * batch.pitch, batch.pitch, grad[batch.row + i]);
  }
}

// To twice the slope of logvar, and to the others.
template <class A>
void add_kl_slopes(const Gaussian& inputs, int64_t size, const Inputs<A>& values, Slopes<A>& slopes) {
  const A free_bits = A(inputs.free_bits);
  A* __restrict mean = slopes.mean, * __restrict logvar = slopes.logvar;
  A* __restrict prior_mean = slopes.prior_mean, * __restrict prior_logvar = slopes.prior_logvar;
  const A* kl = slopes.kl;
  for_each_element(inputs, size, values,
                   [=](int64_t j, A t, A inverse_scale, A expm1, A excess) __attribute__((always_inline)) {
                     const A grad = divergence(t, excess) < free_bits ? A(0) : kl[j];
                     const A in_mean = grad * t * inverse_scale;
                     mean[j] += in_mean;
                     logvar[j] = fused(grad, expm1, logvar[j]);
                     prior_mean[j] = -in_mean;
                     prior_logvar[j] = A(-0.5) * grad * fused(t, t, expm1);
                   });
}

// Half of twice the slope, and 0 where logvar was clamped; `scratch` is overwritten.
template <class T, class A>
void finish_logvar(const Gaussian& inputs, const Batch& batch, A* __restrict scratch, A* __restrict slopes) {
#pragma omp simd
  for (int64_t j = 0; j < batch.size(); ++j) slopes[j] *= A(0.5);
  if (!is_bounded(inputs)) return;
  const A low = A(inputs.low), high = A(inputs.high);
  load_rows<T>(inputs.logvar, batch, scratch);
#pragma omp simd
  for (int64_t j = 0; j < batch.size(); ++j) {
    slopes[j] = (scratch[j] < low) | (scratch[j] > high) ? A(0) : slopes[j];
  }
}

// The gradients of one prior tensor: its rows, or the sums over the rows of a task.
template <class T, class A>
class PriorGradient {
 public:
  PriorGradient(const GaussianRows& prior, void* out) : shared_(prior.shared), out_(out) {}
  void add(const Batch& batch, int64_t columns, const A* slopes) {
    if (out_ == nullptr) return;
    if (!shared_) return store_rows(slopes, batch, columns, static_cast<T*>(out_));
    for (int64_t i = 0; i < batch.rows; ++i) {
      const A* row = slopes + i * batch.pitch;
#pragma omp simd
      for (int64_t j = 0; j < batch.count; ++j) sums_[j] += double(row[j]);
    }
  }
  void finish(const Task& task, int64_t columns) {
    if (out_ == nullptr || !shared_) return;
    const int64_t column = task.chunk * kGaussianChunk, count = std::min(kGaussianChunk, columns - column);
    A* out = static_cast<A*>(out_) + task.block * columns + column;
    for (int64_t j = 0; j < count; ++j) {
      out[j] = A(sums_[j]);
      sums_[j] = 0;
    }
  }

 private:
  bool shared_;
  void* out_;
  double sums_[kGaussianChunk] = {};
};

template <class T>
void run_bwd(const GaussianBackward& backward, int64_t begin, int64_t end) {
  using A = typename Accumulation<T>::type;
  const Gaussian& inputs = backward.inputs;
  PriorGradient<T, A> prior_mean(inputs.prior_mean, backward.grad_prior_mean);
  PriorGradient<T, A> prior_logvar(inputs.prior_logvar, backward.grad_prior_logvar);
  const bool wants_kl = backward.grad_kl != nullptr;
  Inputs<A> values;
  Slopes<A> slopes;
  for (int64_t index = begin; index < end; ++index) {
    const Task task = task_of(inputs, has_sums(backward), index);
    for_each_batch(inputs, task, [&](const Batch& batch) {
      const int64_t size = batch.size();
      std::fill_n(slopes.mean, size, A(0));
      std::fill_n(slopes.logvar, size, A(0));
      load_logvar<T>(inputs, batch, values);
      prefetch_inputs<T>(inputs, batch);
      if (inputs.samples == 1) prefetch_next<T>(backward.grad_z, backward.z_at.row_stride, batch, inputs.rows);
      prefetch_next<T, true>(backward.grad_mean, inputs.columns, batch, inputs.rows);
      prefetch_next<T, true>(backward.grad_logvar, inputs.columns, batch, inputs.rows);
      if (backward.grad_z != nullptr) {
        add_samples<T>(backward, batch, slopes);
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) slopes.logvar[j] *= values.scale[j];
      }
      if (wants_kl) {
        load_rows<T>(inputs.mean, batch, values.mean);
        load_prior<T>(inputs, batch, values);
        load_grad_kl(backward, batch, slopes.kl);
        add_kl_slopes(inputs, size, values, slopes);
      }
      if (backward.grad_mean != nullptr) {
        store_rows(slopes.mean, batch, inputs.columns, static_cast<T*>(backward.grad_mean));
      }
      if (backward.grad_logvar != nullptr) {
        finish_logvar<T>(inputs, batch, values.logvar, slopes.logvar);
        store_rows(slopes.logvar, batch, inputs.columns, static_cast<T*>(backward.grad_logvar));
      }
      prior_mean.add(batch, inputs.columns, slopes.prior_mean);
      prior_logvar.add(batch, inputs.columns, slopes.prior_logvar);
    });
    prior_mean.finish(task, inputs.columns);
    prior_logvar.finish(task, inputs.columns);
  }
}

}  // namespace

void gaussian_fwd(const GaussianForward& forward, int64_t begin, int64_t end) {
  switch (forward.inputs.element) {
    case Element::kFloat:
      return run_fwd<float>(forward, begin, end);
    case Element::kDouble:
      return run_fwd<double>(forward, begin, end);
    case Element::kBFloat16:
      return run_fwd<BFloat16>(forward, begin, end);
    case Element::kHalf:
      return run_fwd<Half>(forward, begin, end);
  }
}

void gaussian_bwd(const GaussianBackward& backward, int64_t begin, int64_t end) {
  switch (backward.inputs.element) {
    case Element::kFloat:
      return run_bwd<float>(backward, begin, end);
    case Element::kDouble:
      return run_bwd<double>(backward, begin, end);
    case Element::kBFloat16:
      return run_bwd<BFloat16>(backward, begin, end);
    case Element::kHalf:
      return run_bwd<Half>(backward, begin, end);
  }
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
