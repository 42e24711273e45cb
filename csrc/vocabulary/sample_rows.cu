// Gumbel-max over a tile of logits: the column with the largest logit + noise is a draw from their softmax.
//
// A row belongs to a team, whose threads take groups of four columns: 16 bytes of products, one Philox call. The
// products are read once, and only per-row results are written. A word is turned into a Gumbel number, half of the
// work, only if it may win: with u its uniform number, z + Gumbel(u) > best needs u < exp(z - best), and that
// exponential is, up to a factor, the one in the sum. A warp agrees on its best after each word that passes, and starts
// from the best of the previous tiles, so that few words pass.
#include <algorithm>
#include <type_traits>

#include "core/cuda/columns.h"
#include "core/cuda/teams.h"
#include "random/cuda/noise.h"
#include "vocabulary/sample_rows.h"

namespace sslkernels {
namespace {

constexpr int kGroupsOfThread = 8;  // enough to make the reduction a small part
constexpr int kLeastGroups = 4;     // per thread, if there are few rows to keep the device busy
constexpr int kResident = 1024;     // threads that keep a multiprocessor busy
constexpr int kNone = INT32_MAX;    // column if there is no choice
template <class A>  // resident blocks per multiprocessor that registers must allow: 64 registers a thread, float64 128
constexpr int kBlocks = (sizeof(A) == 8 ? 512 : 1024) / kThreads;

// e^x. In float32 its error, 2 ulp plus the rounding of the product, is largest relative to the sum for x = -1: 3e-7.
template <class A>
__device__ __forceinline__ A exponential(A x) {
  if constexpr (sizeof(A) == 8) {
    return std::exp(x);
  } else {
    return exp2_approx(x * 1.44269504088896341f);
  }
}

// Moves a sum of exponentials from the reference `from` to `to`. An empty sum, whose reference is -inf, stays 0.
template <class A>
__device__ __forceinline__ A moved(A sum, A from, A to) {
  return from == to ? sum : sum * exponential(from - to);
}

template <class A>
struct Drawn {
  A max;
  A sum;
  A best;
  std::conditional_t<sizeof(A) == 8, int64_t, int32_t> column;

  static __device__ __forceinline__ Drawn identity() { return {A(-INFINITY), A(0), A(-INFINITY), kNone}; }
  static __device__ __forceinline__ Drawn combine(Drawn a, Drawn b) {
    const A max = std::fmax(a.max, b.max);
    const bool of_b = b.best > a.best || (b.best == a.best && b.column < a.column);
    return {max, moved(a.sum, a.max, max) + moved(b.sum, b.max, max), of_b ? b.best : a.best,
            of_b ? b.column : a.column};
  }
};

// A thread's groups of the columns of a row in this tile, one after the other.
template <class A>
struct TileRow {
  const A* products;  // at the current group
  const A* bias;      // for the tile, or null
  A scale;            // infinite: greedy
  int column;         // first column of the group, in the tile
  int left;           // columns from there to the end; negative beyond the end or if the row is out of range
  uint64_t seed;
  uint64_t group;  // for Philox

  __device__ __forceinline__ TileRow(const SampleRows& sample, const TeamPlace<kGroup>& place)
      : products(static_cast<const A*>(sample.products) + place.row * sample.stride + kGroup * place.lane),
        bias(static_cast<const A*>(sample.bias)),
        scale(place.in_range ? static_cast<const A*>(sample.scale)[place.row] : A(1)),
        column(kGroup * place.lane),
        left(place.in_range ? int(sample.columns) - column : -1),
        seed(uint64_t(*sample.seed)),
        group(uint64_t(sample.first_column / kGroup + place.lane)) {
    if (bias != nullptr) bias += sample.first_column;
    if (place.in_range) group += uint64_t(sample.row_ids[place.row]) * uint64_t(groups_of_row(sample.vocab));
  }

  __device__ __forceinline__ void advance(int groups) {
    products += kGroup * groups;
    column += kGroup * groups;
    left -= kGroup * groups;
    group += groups;
  }

  __device__ __forceinline__ bool greedy() const { return scale == A(INFINITY); }

  __device__ __forceinline__ A scaled(A l) const {
    // 0 * -inf is NaN.
    return greedy() || (scale == A(0) && l == A(-INFINITY)) ? l : exact_multiply(l, scale);
  }

  // Pads with -inf beyond the end of the row.
  __device__ __forceinline__ void logits(A (&z)[kGroup]) const {
    if (left >= kGroup) {
      load_elements(products, z);
      if (bias != nullptr) {
        A add[kGroup];
        load_elements(bias + column, add);
#pragma unroll
        for (int k = 0; k < kGroup; ++k) z[k] = exact_add(z[k], add[k]);
      }
#pragma unroll
      for (int k = 0; k < kGroup; ++k) z[k] = scaled(z[k]);
      return;
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      z[k] = A(-INFINITY);
      if (k < left) z[k] = scaled(bias == nullptr ? products[k] : exact_add(products[k], bias[column + k]));
    }
  }
};

// 1 + a lower bound of the uniform number of a word.
__device__ __forceinline__ float from_below(uint32_t word) { return bit_cast<float>(0x3F800000u | word >> 9); }

// Whether a word may win, with `part` = exp(logit - anchor) and `reach` at least exp(anchor - best). Conservatively
// true if either input is NaN. 2^-22 exceeds the rounding error here.
__device__ __forceinline__ bool may_win(uint32_t word, float part, float reach) {
  return !(from_below(word) >= exact_fma(part, reach, 1.0f + 0x1p-22f));
}

// An upper bound of exp(anchor - best), larger by a thousandth: more than the errors of the approximate exponentials
// and noise. The anchor is one of the logits, and whatever its noise its sum exceeds anchor - 3.2, so no lower sum can
// win.
template <class A>
__device__ __forceinline__ float reach_of(A anchor, A best) {
  constexpr float kMost = 24.6f;  // exp(3.2)
  return 1.001f * std::fmin(float(exponential(anchor - best)), kMost);
}

// Grid: one team per row. The threads of a row read its state, and one of them writes it at the end.
template <class A>
__global__ void __launch_bounds__(kThreads, kBlocks<A>)
    sample_rows_kernel(const __grid_constant__ SampleRows sample, int team) {
  using Reduced = TeamReduction<Drawn<A>>;
  const TeamPlace<kGroup> place(sample.rows, int(sample.columns), team);
  TileRow<A> row(sample, place);
  const bool greedy = row.greedy();
  const bool begun = place.in_range && !is_first_tile(sample);
  A* const row_max = static_cast<A*>(sample.row_max) + place.row;
  A* const sum_exp = static_cast<A*>(sample.sum_exp) + place.row;
  A* const best = static_cast<A*>(sample.best) + place.row;
  A* const logprob = static_cast<A*>(sample.logprob) + place.row;

  const A begun_max = begun ? *row_max : A(-INFINITY);
  Drawn<A> own{begun_max, A(0), A(-INFINITY), kNone};
  A logit = A(-INFINITY), bar = begun ? *best : A(-INFINITY);  // bar: the sum to exceed
  const int groups = int(groups_of_row(sample.columns)), lanes = place.lanes == 0 ? kWarpSize : place.lanes;
  // All threads of a warp take the same number of turns.
  for (int turn = 0; turn < groups; turn += place.step, row.advance(place.step)) {
    A z[kGroup], part[kGroup];
    row.logits(z);
    const A top = std::fmax(std::fmax(z[0], z[1]), std::fmax(z[2], z[3]));  // NaN only if all are
    if (top > own.max) {
      own.sum = moved(own.sum, own.max, top);
      own.max = top;
    }
    const A anchor = own.max == A(-INFINITY) ? A(0) : own.max;
#pragma unroll
    for (int k = 0; k < kGroup; ++k) part[k] = exponential(z[k] - anchor);
    own.sum += (part[0] + part[1]) + (part[2] + part[3]);

    bool open = false;
    uint32_t words[kGroup] = {};
    if (greedy) {
      open = top > bar;
    } else if (top + A(kLargestGumbel) > bar) {
      draw_words(row.seed, row.group, uint64_t(sample.draw), words);
      const float reach = reach_of(anchor, bar);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) open |= may_win(words[k], float(part[k]), reach);
    }
    if (ballot(open) == 0) continue;
    if (open) {
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const A sum = greedy ? z[k] : exact_add(z[k], A(gumbel_of_word(words[k])));
        if (sum > bar) {
          bar = own.best = sum;
          own.column = row.column + k;
          logit = z[k];
        }
      }
    }
    bar = over_lanes(bar, lanes, [](A a, A b) { return std::fmax(a, b); });
  }
  if (begun && place.first()) own.sum += moved(*sum_exp, begun_max, own.max);

  const Drawn<A> all =
      Reduced::run(own, place.lanes, reinterpret_cast<typename Reduced::Blocks::Scratch*>(shared_memory()));
  if (place.first()) {
    *row_max = all.max;
    *sum_exp = all.sum;
  }
  const bool found = all.column != kNone;
  if (found ? own.column == all.column : place.first()) {
    if (!found && begun) logit = *logprob;
    const A relative = logit - all.max;  // NaN in a row without a finite logit
    const A in_full = greedy ? relative + A(0) * all.sum : relative - std::log(all.sum);
    *logprob = is_last_tile(sample) ? in_full : logit;
    if (found || !begun) {
      *best = all.best;
      sample.index[place.row] = found ? sample.first_column + all.column : 0;
    }
  }
  Reduced::finish(place.lanes);
}

template <class A>
void launch_one(const SampleRows& sample, void* stream) {
  constexpr const char* kName = "sample_rows_kernel";
  const auto kernel = sample_rows_kernel<A>;
  DeviceLimits limits = device_limits();
  if (!knows_clusters(kName, kernel)) limits.largest_cluster = 1;
  const SamplePlan plan = plan_sample_rows(sample.rows, sample.columns, limits);
  const int64_t scratch = sizeof(typename Reduction<Drawn<A>>::Scratch);
  launch(kName, kernel, shape_of_teams(sample.rows, plan.team, plan.threads, plan.cluster, scratch), stream, sample,
         plan.team);
}

}  // namespace

SamplePlan plan_sample_rows(int64_t rows, int64_t columns, const DeviceLimits& limits) {
  const int64_t groups = ceil_div(columns, kGroup), resident = int64_t(limits.processors) * kResident;
  const int64_t busy = std::min(ceil_div(resident, std::max<int64_t>(rows, 1)), ceil_div(groups, kLeastGroups));
  const int64_t wanted = std::max(ceil_div(groups, kGroupsOfThread), busy);
  if (wanted <= kWarpSize) {
    const int team = power_of_2(wanted);
    const int64_t each = ceil_div(rows * team, limits.processors);  // spreads a few rows over all multiprocessors
    return {team, whole_warps(std::clamp<int64_t>(each, 1, kThreads)), 1};
  }
  SamplePlan plan{0, whole_warps(std::min<int64_t>(wanted, kThreads)), 1};
  while (2 * plan.cluster <= std::min(limits.largest_cluster, kPortableCluster) &&
         rows * plan.cluster * plan.threads < resident &&
         groups >= int64_t(2) * kLeastGroups * plan.cluster * plan.threads) {
    plan.cluster *= 2;
  }
  plan.team = plan.threads;
  return plan;
}

void launch_sample_rows(const SampleRows& sample, void* stream) {
  check_dim(sample.columns);
  switch (sample.element) {
    case Element::kFloat:
      return launch_one<float>(sample, stream);
    case Element::kDouble:
      return launch_one<double>(sample, stream);
    default:
      fail("sample_rows_kernel takes float32 and float64 products");
  }
}

}  // namespace sslkernels
