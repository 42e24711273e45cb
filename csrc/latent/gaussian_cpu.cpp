// Gaussian samples and their divergence. Rows are processed in batches that stay in the cache: mean and logvar are read
// once for all samples, and the noise is generated where it is used. Each computation on a batch is one loop over its
// elements; rows that are not contiguous are first copied contiguous.
#include <algorithm>
#include <cstring>

#include "core/cpu/element.h"
#include "core/cpu/prefetch.h"
#include "core/cpu/vector_math.h"
#include "latent/gaussian.h"
#include "random/cpu/noise.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

static_assert(kGaussianChunk == 4 * kGroups, "a chunk is a block of groups");

// Rows of one chunk of columns: element (i, j) is number i * pitch + j; the numbers between `count` and `pitch` are
// padding.
struct Batch {
  int64_t row;
  int64_t rows;
  int64_t column;
  int64_t count;
  int64_t pitch;

  int64_t size() const { return rows * pitch; }
  // Whether rows `stride` apart are contiguous in memory, in the order of the element numbers.
  bool contiguous(int64_t stride) const { return count == pitch && (rows == 1 || stride == pitch); }
  // Calls visit(row, number of its first element, count) for each contiguous run of rows `stride` apart.
  template <class Visit>
  void for_each_run(int64_t stride, Visit visit) const {
    if (contiguous(stride)) return visit(row, 0, size());
    for (int64_t i = 0; i < rows; ++i) visit(row + i, i * pitch, count);
  }
};

struct Task {
  int64_t begin;  // rows
  int64_t end;
  int64_t block;  // index of the partial sums
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

// Normal numbers of a batch, sample by sample.
class Noise {
 public:
  Noise(const Gaussian& inputs, const Batch& batch) : seed_(uint64_t(*inputs.seed)), count_(batch.size() / 4) {
    const int64_t of_row = groups_of(inputs.columns), count = batch.pitch / 4;
    for (int64_t i = 0; i < batch.rows; ++i) {
      const int64_t row = batch.row + i, row_id = inputs.row_ids == nullptr ? row : inputs.row_ids[row];
      const uint64_t first = uint64_t(row_id) * uint64_t(of_row) + uint64_t(batch.column / 4);
      for (int64_t g = 0; g < count; ++g) group_[i * count + g] = first + uint64_t(g);
    }
  }
  void draw(int64_t sample, float* out) const { normals_of_groups(seed_, group_, uint64_t(sample), count_, out); }

 private:
  uint64_t seed_;
  int64_t count_;
  alignas(kLine) uint64_t group_[kGroups];
};

// Prefetches the rows of a batch, so that they arrive during other computation.
inline __attribute__((always_inline)) void prefetch_rows(Element element, const void* data, int64_t stride,
                                                         const Batch& batch) {
  const int64_t size = bytes_of(element);
  const char* bytes = static_cast<const char*>(data) + batch.column * size;
  for (int64_t i = 0; i < batch.rows; ++i) prefetch(bytes + (batch.row + i) * stride * size, batch.count * size);
}

// Prefetches the rows of one sample, which will be read or written.
inline __attribute__((always_inline)) void prefetch_sample(const void* data, const GaussianSamples& at, int64_t sample,
                                                           Element element, const Batch& batch) {
  const char* of_sample = static_cast<const char*>(data) + sample * at.sample_stride * bytes_of(element);
  prefetch_rows(element, of_sample, at.row_stride, batch);
}

// Everything is computed in A, float or double, so that the code is compiled for two types instead of four.
template <class A>
constexpr Element kComputed = sizeof(A) == 8 ? Element::kDouble : Element::kFloat;

// The elements of a batch: the input itself if its type and stride allow, else a copy in `buffer`.
template <class A>
const A* gather(Element element, const void* data, int64_t stride, const Batch& batch, A* buffer) {
  if (data == nullptr) return nullptr;
  if (element == kComputed<A> && batch.contiguous(stride)) {
    return static_cast<const A*>(data) + batch.column + batch.row * stride;
  }
  batch.for_each_run(stride, [&](int64_t row, int64_t at, int64_t count) {
    load_any(element, data, batch.column + row * stride, count, buffer + at);
  });
  return buffer;
}

// Destination of a batch: the output itself if its type and stride allow, else `buffer`, which scatter() copies out.
template <class A>
A* output_pointer(Element element, void* data, int64_t stride, const Batch& batch, A* buffer) {
  if (data == nullptr || element != kComputed<A> || !batch.contiguous(stride)) return buffer;
  return static_cast<A*>(data) + batch.column + batch.row * stride;
}

template <class A>
void scatter(Element element, const A* values, const Batch& batch, int64_t stride, void* data) {
  if (data == nullptr || values == output_pointer(element, data, stride, batch, static_cast<A*>(nullptr))) return;
  batch.for_each_run(stride, [&](int64_t row, int64_t at, int64_t count) {
    store_any(element, values + at, batch.column + row * stride, count, data);
  });
}

template <class A>
struct Inputs {
  const A *mean, *logvar, *prior_mean, *prior_logvar;
  alignas(kLine) A buffers[4][kGaussianChunk] = {};

  void read(const Gaussian& inputs, const Batch& batch) {
    const auto rows = [&](const GaussianRows& from, int i) {
      return gather(inputs.element, from.data, from.stride, batch, buffers[i]);
    };
    prefetch_rows(inputs.element, inputs.mean.data, inputs.mean.stride, batch);
    prefetch_rows(inputs.element, inputs.logvar.data, inputs.logvar.stride, batch);
    mean = rows(inputs.mean, 0);
    logvar = rows(inputs.logvar, 1);
    prior_mean = rows(inputs.prior_mean, 2);
    prior_logvar = rows(inputs.prior_logvar, 3);
  }
};

template <class A>
struct Bounds {
  A low, high;
  explicit Bounds(const Gaussian& inputs) : low(A(inputs.low)), high(A(inputs.high)) {}
};

// Calls visit(j, scale, t, inverse_scale, expm1, excess) for every element: scale is exp(logvar / 2), the others are as
// in gaussian.h. The compiler drops values that a visit does not use.
template <bool kPrior, class A, class Visit>
void for_each_element(const Inputs<A>& inputs, const Bounds<A>& bounds, int64_t size, Visit visit) {
  const A *mean = inputs.mean, *logvar = inputs.logvar;
  const A *prior_mean = inputs.prior_mean, *prior_logvar = inputs.prior_logvar;
  const A low = bounds.low, high = bounds.high;
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    const A v = clamp(logvar[j], low, high), scale = vector_exp(A(0.5) * v);
    A t = mean[j], inverse_scale = 1, d = v, e = scale * scale, expm1, excess;
    if constexpr (kPrior) {
      const A prior_v = prior_logvar[j];
      inverse_scale = vector_exp(A(-0.5) * prior_v);
      t = (t - prior_mean[j]) * inverse_scale;
      d = v - prior_v;
      e = vector_exp(d);
    }
    expm1_terms(d, e, &expm1, &excess);
    visit(j, scale, t, inverse_scale, expm1, excess);
  }
}

template <class A, class Visit>
void for_each_element(const Inputs<A>& inputs, const Bounds<A>& bounds, int64_t size, Visit visit) {
  return inputs.prior_mean == nullptr ? for_each_element<false>(inputs, bounds, size, visit)
                                      : for_each_element<true>(inputs, bounds, size, visit);
}

#define SSLKERNELS_VISIT __attribute__((always_inline))

template <class A>
void write_kl(const GaussianForward& forward, const Batch& batch, int64_t chunk, A* __restrict kl) {
  const A free_bits = A(forward.inputs.free_bits);
  if (free_bits > A(0)) {
#pragma omp simd
    for (int64_t j = 0; j < batch.size(); ++j) kl[j] = kl[j] < free_bits ? free_bits : kl[j];
  }
  if (!forward.by_row) return scatter(kComputed<A>, kl, batch, forward.inputs.columns, forward.kl);
  for (int64_t i = 0; i < batch.rows; ++i) {
    const A* row = kl + i * batch.pitch;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < batch.count; ++j) sum += row[j];
    static_cast<A*>(forward.kl)[(batch.row + i) * forward.kl_parts + chunk] = sum;
  }
}

// Sums of each column over the rows of a task: in double, because a variance is a difference, and relative to the mean
// of the first row.
template <class A>
struct ColumnStatistics {
  alignas(kLine) A first[kGaussianChunk];
  alignas(kLine) double kl[kGaussianChunk] = {};
  alignas(kLine) double mean[kGaussianChunk] = {};
  alignas(kLine) double square[kGaussianChunk] = {};

  void begin(const Gaussian& inputs, const Task& task) {
    const int64_t column = task.chunk * kGaussianChunk, count = std::min(kGaussianChunk, inputs.columns - column);
    load_any(inputs.element, inputs.mean.data, column, count, first);
  }

  void add(const Batch& batch, const A* batch_kl, const A* batch_mean) {
    for (int64_t i = 0; i < batch.rows; ++i) {
      const A* row_kl = batch_kl + i * batch.pitch;
      const A* row_mean = batch_mean + i * batch.pitch;
#pragma omp simd
      for (int64_t j = 0; j < batch.count; ++j) {
        const double moved = double(row_mean[j]) - double(first[j]);
        kl[j] += double(row_kl[j]);
        mean[j] += moved;
        square[j] += moved * moved;
      }
    }
  }

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

template <class A>
class Forward {
 public:
  explicit Forward(const GaussianForward& forward) : forward_(forward), bounds_(forward.inputs) {}

  void run(const Task& task) {
    const Gaussian& inputs = forward_.inputs;
    if (forward_.statistics != nullptr) sums_.begin(inputs, task);
    for_each_batch(inputs, task, [&](const Batch& batch) {
      values_.read(inputs, batch);
      if (forward_.z == nullptr) {
        find_kl(batch);
      } else {
        draw(batch);
      }
      if (forward_.statistics != nullptr) sums_.add(batch, kl_, values_.mean);
      if (forward_.kl != nullptr) write_kl(forward_, batch, task.chunk, kl_);
    });
    if (forward_.statistics != nullptr) sums_.finish(task, inputs.columns, static_cast<A*>(forward_.statistics));
  }

 private:
  void find_kl(const Batch& batch) {
    A* __restrict kl = kl_;
    for_each_element(values_, bounds_, batch.size(),
                     [=](int64_t j, A, A t, A, A, A excess) SSLKERNELS_VISIT { kl[j] = divergence(t, excess); });
  }

  // A single sample is drawn contiguous with the divergence; several are drawn from the stored scales.
  void draw(const Batch& batch) {
    const int64_t samples = forward_.inputs.samples, size = batch.size();
    const bool wants_kl = forward_.kl != nullptr || forward_.statistics != nullptr;
    const Noise noise(forward_.inputs, batch);
    const Element element = forward_.inputs.element;
    const A* mean = values_.mean;
    A* __restrict kl = kl_, * __restrict scales = scale_;
    const int64_t stride = forward_.z_strides.row_stride;
    A* __restrict z = output_pointer(element, forward_.z, stride, batch, z_);
    const float* eps = noise_;
    if (samples == 1) {
      noise.draw(0, noise_);
      if (wants_kl) {
        for_each_element(values_, bounds_, size, [=](int64_t j, A scale, A t, A, A, A excess) SSLKERNELS_VISIT {
          kl[j] = divergence(t, excess);
          z[j] = fused(scale, A(eps[j]), mean[j]);
        });
      } else {
        for_each_element<false>(values_, bounds_, size, [=](int64_t j, A scale, A, A, A, A) SSLKERNELS_VISIT {
          z[j] = fused(scale, A(eps[j]), mean[j]);
        });
      }
      return scatter(element, z, batch, stride, forward_.z);
    }
    for (int64_t k = 0; k < samples; ++k) {
      prefetch_sample(forward_.z, forward_.z_strides, k, element, batch);
      noise.draw(k, noise_);
      if (k == 0) {  // the prefetched mean and logvar have arrived by now
        for_each_element(values_, bounds_, size, [=](int64_t j, A scale, A t, A, A, A excess) SSLKERNELS_VISIT {
          scales[j] = scale;
          kl[j] = divergence(t, excess);
        });
      }
      const int64_t begin = batch.column + k * forward_.z_strides.sample_stride;
      batch.for_each_run(stride, [&](int64_t row, int64_t at, int64_t count) {
        with_elements<A>(element, forward_.z, begin + row * stride, [&](auto* __restrict to) {
#pragma omp simd
          for (int64_t j = 0; j < count; ++j) {
            from_float(fused(scales[at + j], A(eps[at + j]), mean[at + j]), &to[j]);
          }
        });
      });
    }
  }

  const GaussianForward& forward_;
  const Bounds<A> bounds_;
  Inputs<A> values_;
  alignas(kLine) A kl_[kGaussianChunk];
  alignas(kLine) A scale_[kGaussianChunk];
  alignas(kLine) A z_[kGaussianChunk];
  alignas(kLine) float noise_[kGaussianChunk];
  ColumnStatistics<A> sums_;
};

// Gradients of one prior tensor: its rows, or the sums over the rows of a task.
template <class A>
class PriorGradient {
 public:
  PriorGradient(Element element, const GaussianRows& prior, void* out)
      : element_(element), shared_(prior.shared), out_(out) {}

  alignas(kLine) A slopes[kGaussianChunk] = {};  // slopes of one batch

  void add(const Batch& batch, int64_t columns) {
    if (out_ == nullptr) return;
    if (!shared_) return scatter(element_, slopes, batch, columns, out_);
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
  Element element_;
  bool shared_;
  void* out_;
  alignas(kLine) double sums_[kGaussianChunk] = {};
};

template <class A>
class Backward {
 public:
  explicit Backward(const GaussianBackward& backward)
      : backward_(backward),
        bounds_(backward.inputs),
        prior_mean_(backward.inputs.element, backward.inputs.prior_mean, backward.grad_prior_mean),
        prior_logvar_(backward.inputs.element, backward.inputs.prior_logvar, backward.grad_prior_logvar) {}

  void run(const Task& task) {
    const Gaussian& inputs = backward_.inputs;
    const int64_t columns = inputs.columns;
    for_each_batch(inputs, task, [&](const Batch& batch) {
      values_.read(inputs, batch);
      read_grad_kl(batch);
      grad_mean_to_ = output_pointer(inputs.element, backward_.grad_mean, columns, batch, grad_mean_);
      grad_logvar_to_ = output_pointer(inputs.element, backward_.grad_logvar, columns, batch, grad_logvar_);
      if (backward_.grad_z == nullptr || inputs.samples == 0) {
        finish_elements<false>(batch, nullptr, nullptr);
      } else if (inputs.samples == 1) {
        const int64_t stride = backward_.z_strides.row_stride;
        prefetch_rows(inputs.element, backward_.grad_z, stride, batch);
        if (backward_.grad_logvar != nullptr) Noise(inputs, batch).draw(0, noise_);
        const A* grad = gather(inputs.element, backward_.grad_z, stride, batch, grad_z_);
        finish_elements<true>(batch, grad, grad);
      } else {
        add_samples(batch);
        std::fill_n(noise_, batch.size(), 1.0f);
        finish_elements<true>(batch, sum_, noisy_sum_);
      }
      scatter(inputs.element, grad_mean_to_, batch, columns, backward_.grad_mean);
      scatter(inputs.element, grad_logvar_to_, batch, columns, backward_.grad_logvar);
      prior_mean_.add(batch, columns);
      prior_logvar_.add(batch, columns);
    });
    prior_mean_.finish(task, columns);
    prior_logvar_.finish(task, columns);
  }

 private:
  static constexpr int kAtOnce = 4;  // samples per pass

  void read_grad_kl(const Batch& batch) {
    const A* grad = static_cast<const A*>(backward_.grad_kl);
    if (grad == nullptr) return;
    if (!backward_.by_row) {
      kl_ = gather(kComputed<A>, grad, backward_.kl_stride, batch, grad_kl_);
      return;
    }
    for (int64_t i = 0; i < batch.rows; ++i) {
      std::fill_n(grad_kl_ + i * batch.pitch, batch.pitch, grad[(batch.row + i) * backward_.kl_stride]);
    }
    kl_ = grad_kl_;
  }

  // Sums the gradients of the samples, and their products with the noise.
  void add_samples(const Batch& batch) {
    const int64_t size = batch.size();
    const Noise noise(backward_.inputs, batch);
    std::fill_n(sum_, size, A(0));
    std::fill_n(noisy_sum_, size, A(0));
    int64_t k = 0;
    for (; k + kAtOnce <= backward_.inputs.samples; k += kAtOnce) add_samples<kAtOnce>(batch, noise, k);
    for (; k < backward_.inputs.samples; ++k) add_samples<1>(batch, noise, k);
  }

  // Adds samples [first, first + kCount), so that the sums are read and written once for several samples.
  template <int kCount>
  void add_samples(const Batch& batch, const Noise& noise, int64_t first) {
    const Element element = backward_.inputs.element;
    const int64_t stride = backward_.z_strides.row_stride, apart = backward_.z_strides.sample_stride;
    A* __restrict sum = sum_, * __restrict noisy_sum = noisy_sum_;
    const float* eps = noise_;
    for (int k = 0; k < kCount; ++k) {
      prefetch_sample(backward_.grad_z, backward_.z_strides, first + k, element, batch);
      if (backward_.grad_logvar != nullptr) noise.draw(first + k, noise_ + k * kGaussianChunk);
    }
    batch.for_each_run(stride, [&](int64_t row, int64_t at, int64_t count) {
      const int64_t begin = first * apart + row * stride + batch.column;
      with_elements<A>(element, backward_.grad_z, begin, [&](const auto* grad) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          A total = sum[at + j], noisy = noisy_sum[at + j];
#pragma GCC unroll 4
          for (int k = 0; k < kCount; ++k) {
            const A g = to_float(grad[k * apart + j]);
            total += g;
            noisy = fused(g, A(eps[k * kGaussianChunk + at + j]), noisy);
          }
          sum[at + j] = total;
          noisy_sum[at + j] = noisy;
        }
      });
    });
  }

  // If kZ: `sum` is the sum of the gradients of the samples, and `noisy` times noise_ the sum of their products with
  // the noise.
  template <bool kZ>
  void finish_elements(const Batch& batch, const A* sum, const A* noisy) {
    const A low = bounds_.low, high = bounds_.high, free_bits = A(backward_.inputs.free_bits);
    const A *logvar = values_.logvar, *grad_kl = kl_;
    const float* eps = noise_;
    A* __restrict grad_mean = grad_mean_to_, * __restrict grad_logvar = grad_logvar_to_;
    const auto of_mean = [=](int64_t j) SSLKERNELS_VISIT { return kZ ? sum[j] : A(0); };
    const auto of_logvar = [=](int64_t j, A scale)
                               SSLKERNELS_VISIT { return kZ ? scale * (noisy[j] * A(eps[j])) : A(0); };
    const auto write = [=](int64_t j, A in_mean, A twice_in_logvar) SSLKERNELS_VISIT {
      grad_mean[j] = in_mean;
      grad_logvar[j] = (logvar[j] < low) | (logvar[j] > high) ? A(0) : A(0.5) * twice_in_logvar;
    };
    if (backward_.grad_kl == nullptr) {
      return for_each_element<false>(values_, bounds_, batch.size(),
                                     [=](int64_t j, A scale, A, A, A, A)
                                         SSLKERNELS_VISIT { write(j, of_mean(j), of_logvar(j, scale)); });
    }
    A* __restrict in_prior_mean = prior_mean_.slopes, * __restrict in_prior_logvar = prior_logvar_.slopes;
    if (values_.prior_mean == nullptr) {
      return for_each_element<false>(
          values_, bounds_, batch.size(), [=](int64_t j, A scale, A t, A, A expm1, A excess) SSLKERNELS_VISIT {
            const A given = grad_kl[j], slope = divergence(t, excess) < free_bits ? A(0) : given;
            write(j, fused(slope, t, of_mean(j)), fused(slope, expm1, of_logvar(j, scale)));
          });
    }
    for_each_element<true>(values_, bounds_, batch.size(),
                           [=](int64_t j, A scale, A t, A inverse_scale, A expm1, A excess) SSLKERNELS_VISIT {
                             const A given = grad_kl[j], slope = divergence(t, excess) < free_bits ? A(0) : given;
                             const A in_mean = slope * t * inverse_scale;
                             in_prior_mean[j] = -in_mean;
                             in_prior_logvar[j] = A(-0.5) * slope * fused(t, t, expm1);
                             write(j, of_mean(j) + in_mean, fused(slope, expm1, of_logvar(j, scale)));
                           });
  }

  const GaussianBackward& backward_;
  const Bounds<A> bounds_;
  Inputs<A> values_;
  const A* kl_ = nullptr;
  alignas(kLine) A grad_kl_[kGaussianChunk] = {};
  alignas(kLine) A grad_z_[kGaussianChunk] = {};
  alignas(kLine) float noise_[kAtOnce * kGaussianChunk] = {};
  alignas(kLine) A sum_[kGaussianChunk];
  alignas(kLine) A noisy_sum_[kGaussianChunk];
  A *grad_mean_to_, *grad_logvar_to_;
  alignas(kLine) A grad_mean_[kGaussianChunk];
  alignas(kLine) A grad_logvar_[kGaussianChunk];
  PriorGradient<A> prior_mean_, prior_logvar_;
};

template <class A>
void run_fwd(const GaussianForward& forward, int64_t begin, int64_t end) {
  Forward<A> tasks(forward);
  for (int64_t i = begin; i < end; ++i) tasks.run(task_of(forward.inputs, has_sums(forward), i));
}

template <class A>
void run_bwd(const GaussianBackward& backward, int64_t begin, int64_t end) {
  Backward<A> tasks(backward);
  for (int64_t i = begin; i < end; ++i) tasks.run(task_of(backward.inputs, has_sums(backward), i));
}

}  // namespace

void gaussian_fwd(const GaussianForward& forward, int64_t begin, int64_t end) {
  const bool wide = forward.inputs.element == Element::kDouble;
  return wide ? run_fwd<double>(forward, begin, end) : run_fwd<float>(forward, begin, end);
}

void gaussian_bwd(const GaussianBackward& backward, int64_t begin, int64_t end) {
  const bool wide = backward.inputs.element == Element::kDouble;
  return wide ? run_bwd<double>(backward, begin, end) : run_bwd<float>(backward, begin, end);
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
