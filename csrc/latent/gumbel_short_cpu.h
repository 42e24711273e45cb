// Gumbel-softmax over rows of a few columns, side by side: a vector holds one column of many rows.
#pragma once

#include <limits>

#include "core/cpu/element.h"
#include "core/cpu/vector_math.h"
#include "latent/gumbel_noise_cpu.h"

namespace sslkernels {
namespace {  // one copy for each instruction set: see isa.h

constexpr int64_t kShort = 31;  // columns, at most: a longer row fills two vectors of 16 by itself

// Rows of a tile; column j of row r is values[j * count + r].
template <class A>
struct Tile {
  int64_t count;  // rows, at most kGroups
  int64_t columns;
  alignas(kLine) A values[kBlock];

  template <class Visit>
  void for_each(Visit visit) {
    const int64_t rows = count, last = columns;
    for (int64_t j = 0; j < last; ++j) {
      A* column = values + j * rows;
#pragma omp simd
      for (int64_t r = 0; r < rows; ++r) visit(r, j, column[r]);
    }
  }
  // Loads rows `stride` apart from row `first` on, and their noise, whose rows are `noise_stride` apart; null: no
  // noise.
  void load(Element element, const void* rows, int64_t first, int64_t stride, const float* noise,
            int64_t noise_stride) {
    with_elements<A>(element, rows, first * stride,
                     [=](const auto* from) { load_from(from, stride, noise, noise_stride); });
  }
  void store(Element element, void* rows, int64_t first) {
    with_elements<A>(element, rows, first * columns, [=](auto* to) { store_to(to); });
  }
  template <class T>
  SSLKERNELS_ONCE void load_from(const T* rows, int64_t stride, const float* noise, int64_t noise_stride) {
    if (noise == nullptr) {
      for_each([=](int64_t r, int64_t j, A& value) { value = to_float(rows[r * stride + j]); });
    } else {
      for_each([=](int64_t r, int64_t j, A& value) {
        value = A(to_float(rows[r * stride + j])) + A(noise[r * noise_stride + j]);
      });
    }
  }
  template <class T>
  SSLKERNELS_ONCE void store_to(T* rows) {
    const int64_t stride = columns;
    for_each([=](int64_t r, int64_t j, A& value) { from_float(value, &rows[r * stride + j]); });
  }
  // y = exp((s - max) / tau) / sum, from the states of the rows.
  SSLKERNELS_ONCE void soften(const A* max, const A* sum, A inverse_tau) {
    alignas(kLine) A scale[kGroups];
#pragma omp simd
    for (int64_t r = 0; r < count; ++r) scale[r] = 1 / sum[r];
    for_each([=, &scale](int64_t r, int64_t, A& value) {
      value = exp_nonpositive((value - max[r]) * inverse_tau) * scale[r];
    });
  }
};

// The type of the logits or the accumulation type, which is float unless the logits are double.
inline Element grad_element(const GumbelBackward& backward) {
  const Element of_logits = backward.rows.element;
  return backward.wide_grad && of_logits != Element::kDouble ? Element::kFloat : of_logits;
}

template <class A>
struct TileState {
  alignas(kLine) A max[kGroups];
  alignas(kLine) A sum[kGroups];
  alignas(kLine) int32_t index[kGroups];

  // Replaces the values by exp((s - max) / tau).
  SSLKERNELS_ONCE void reduce(Tile<A>& tile, A inverse_tau) {
    A *largest = max, *total = sum;
    int32_t* where = index;
#pragma omp simd
    for (int64_t r = 0; r < tile.count; ++r) {
      largest[r] = -std::numeric_limits<A>::infinity();
      total[r] = 0;
      where[r] = 0;
    }
    tile.for_each([=](int64_t r, int64_t j, A& value) {
      const bool better = value > largest[r];
      where[r] = better ? int32_t(j) : where[r];
      largest[r] = better ? value : largest[r];
    });
    tile.for_each([=](int64_t r, int64_t, A& value) {
      value = exp_nonpositive((value - largest[r]) * inverse_tau);
      total[r] += value;
    });
  }
  void put(int64_t count, const GumbelState& to, int64_t first, int64_t* indices) const {
    std::memcpy(static_cast<A*>(to.max) + first, max, size_t(count) * sizeof(A));
    std::memcpy(static_cast<A*>(to.sum) + first, sum, size_t(count) * sizeof(A));
    if (indices == nullptr) return;
    for (int64_t r = 0; r < count; ++r) indices[first + r] = index[r];
  }
};

// Calls visit(first, tile, noise) for the tiles of rows [begin, end).
template <class A, class Visit>
void for_each_tile(const GumbelRows& rows, int64_t begin, int64_t end, Visit visit) {
  Noise noise(rows, end);
  Tile<A> tile;
  tile.columns = rows.columns;
  for (int64_t first = begin; first < end; first += tile.count) {
    tile.count = end - first < noise.rows_at_once() ? end - first : noise.rows_at_once();
    visit(first, tile, rows.seed == nullptr ? nullptr : noise.block(first, 0, rows.columns));
  }
}

template <class A>
void fwd_short(const GumbelForward& forward, int64_t begin, int64_t end) {
  const GumbelRows& rows = forward.rows;
  const A inverse_tau = A(inverse_tau_of(rows));
  TileState<A> state;
  for_each_tile<A>(rows, begin, end, [&](int64_t first, Tile<A>& tile, const float* noise) {
    if (forward.argmax != nullptr) {
      tile.load(rows.element, rows.logits, first, rows.logits_stride, nullptr, 0);
      state.reduce(tile, A(1));
      state.put(tile.count, rows.softmax_state, first, forward.argmax);
    }
    tile.load(rows.element, rows.logits, first, rows.logits_stride, noise, (rows.columns + 3) / 4 * 4);
    state.reduce(tile, inverse_tau);
    state.put(tile.count, rows.state, first, forward.index);
    if (forward.output == GumbelOutput::kNone) return;
    const A* total = state.sum;
    const int32_t* where = state.index;
    if (forward.output == GumbelOutput::kSoft) {
      tile.for_each([=](int64_t r, int64_t, A& value) { value *= 1 / total[r]; });
    } else {
      tile.for_each(
          [=](int64_t r, int64_t j, A& value) { value = total[r] != total[r] ? total[r] : A(where[r] == int32_t(j)); });
    }
    tile.store(rows.element, forward.y, first);
  });
}

// The gradient of a tile of y with respect to s / tau: y * (weight - <weight, y>), with weight(r, j).
template <class A, class Weight>
SSLKERNELS_ONCE void weigh(Tile<A>& y, Weight weight) {
  alignas(kLine) A mean[kGroups] = {};
  y.for_each([=, &mean](int64_t r, int64_t j, A& value) { mean[r] += value * weight(r, j); });
  y.for_each([=, &mean](int64_t r, int64_t j, A& value) { value *= weight(r, j) - mean[r]; });
}

template <class A>
void bwd_short(const GumbelBackward& backward, int64_t begin, int64_t end) {
  const GumbelRows& rows = backward.rows;
  const A inverse_tau = A(inverse_tau_of(rows));
  Tile<A> softmax;
  for_each_tile<A>(rows, begin, end, [&](int64_t first, Tile<A>& tile, const float* noise) {
    if (backward.grad != nullptr) {
      const int64_t stride = backward.grad_stride;
      tile.load(rows.element, rows.logits, first, rows.logits_stride, noise, (rows.columns + 3) / 4 * 4);
      tile.soften(static_cast<const A*>(rows.state.max) + first, static_cast<const A*>(rows.state.sum) + first,
                  inverse_tau);
      with_elements<A>(grad_element(backward), backward.grad, first * stride, [&](const auto* grad) {
        weigh(tile, [=](int64_t r, int64_t j) { return A(to_float(grad[r * stride + j])); });
      });
      tile.for_each([=](int64_t, int64_t, A& value) { value *= inverse_tau; });
    } else {
      tile.for_each([](int64_t, int64_t, A& value) { value = 0; });
    }
    if (backward.grad_usage != nullptr) {
      const A* usage = static_cast<const A*>(backward.grad_usage);
      int64_t at[kGroups];
      for (int64_t r = 0; r < tile.count; ++r) at[r] = (first + r) % backward.groups * rows.columns;
      softmax.count = tile.count;
      softmax.columns = tile.columns;
      softmax.load(rows.element, rows.logits, first, rows.logits_stride, nullptr, 0);
      softmax.soften(static_cast<const A*>(rows.softmax_state.max) + first,
                     static_cast<const A*>(rows.softmax_state.sum) + first, A(1));
      weigh(softmax, [=, &at](int64_t r, int64_t j) { return usage[at[r] + j]; });
      const uint8_t* mask = backward.mask == nullptr ? nullptr : backward.mask + first;
      const A* added = softmax.values;
      const int64_t count = tile.count;
      tile.for_each([=](int64_t r, int64_t j, A& value) {
        value += mask == nullptr || mask[r] != 0 ? added[j * count + r] : A(0);
      });
    }
    tile.store(rows.element, backward.grad_logits, first);
  });
}

}  // namespace
}  // namespace sslkernels
