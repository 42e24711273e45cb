// The best code of each row of a tile of products. A team, a warp or a block, has several rows, so that per-code
// numbers are read once for all of them. It reads their products once and keeps, per row, the largest s + e with its
// code, the second largest, and the largest s - e. If no second code has s + e as large as the largest s - e, the row
// is done; otherwise the threads that have such codes read their products again, and the warp rescores the codes in
// double.
#include "core/cuda/reduce.h"
#include "latent/code_vectors_cuda.h"
#include "latent/vector_quantize.h"

namespace sslkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 2;                // per team
constexpr int64_t kCodesOfWarp = 1024;  // at most, if a team is a warp
constexpr int kExactColumns = 2;        // per lane at a time

struct ExactSums {
  double product;  // or squared distance
  double square;   // squared norm of the code

  static __device__ __forceinline__ ExactSums identity() { return {0, 0}; }
  static __device__ __forceinline__ ExactSums combine(ExactSums a, ExactSums b) {
    return {a.product + b.product, a.square + b.square};
  }
};

struct Largest {
  double value;
  static __device__ __forceinline__ Largest identity() { return {0}; }
  static __device__ __forceinline__ Largest combine(Largest a, Largest b) { return b.value > a.value ? b : a; }
};

// Over the columns of a lane.
__device__ __forceinline__ ExactSums exact_sums(const CodeScores& scores, int64_t row, int64_t code, double power,
                                                bool distance) {
  const int dim = int(scores.input.dim), lane = int(threadIdx.x) % kWarpSize;
  ExactSums sums = ExactSums::identity();
  for (int column = lane * kExactColumns; column < dim; column += kWarpSize * kExactColumns) {
    double x[kExactColumns], c[kExactColumns];
    load_vector(scores.input, row, column, x);
    load_vector(scores.codebook, code, column, c);
#pragma unroll
    for (int k = 0; k < kExactColumns; ++k) {
      const double scaled = c[k] * power, difference = x[k] - c[k];
      sums.product += distance ? difference * difference : x[k] * scaled;
      sums.square += scaled * scaled;
    }
  }
  return sums;
}

__device__ __forceinline__ double largest_magnitude(const CodeScores& scores, int64_t code) {
  const int dim = int(scores.input.dim), lane = int(threadIdx.x) % kWarpSize;
  Largest largest = Largest::identity();
  for (int column = lane * kExactColumns; column < dim; column += kWarpSize * kExactColumns) {
    double c[kExactColumns];
    load_vector(scores.codebook, code, column, c);
#pragma unroll
    for (int k = 0; k < kExactColumns; ++k) largest = Largest::combine(largest, {std::fabs(c[k])});
  }
  return Reduction<Largest>::over_warp(largest).value;
}

// The score in double, by a warp; returned to each of its lanes.
__device__ __forceinline__ double exact_score(const CodeScores& scores, int64_t row, int64_t code) {
  const bool distance = scores.metric == CodeMetric::kSquaredDistance, cosine = scores.metric == CodeMetric::kCosine;
  ExactSums sums = ExactSums::identity();
  double power = 1;
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {  // second pass: rescaled, because the squared norm over- or underflowed
    sums = Reduction<ExactSums>::over_warp(exact_sums(scores, row, code, power, distance));
    if (turn > 0 || !cosine || is_usual(sums.square)) break;
    power = power_of_two_for(largest_magnitude(scores, code));
  }
  if (distance) return -sums.product;
  return !cosine || sums.square == 0 ? sums.product : sums.product / std::sqrt(sums.square);
}

// Over the codes of a thread, or over all.
template <class A>
struct Leading {
  A upper;       // the largest s + e
  A second;      // the second largest
  A lower;       // the largest s - e
  int32_t code;  // code of `upper`, in the tile

  static __device__ __forceinline__ Leading identity() { return {A(-INFINITY), A(-INFINITY), A(-INFINITY), 0}; }
  static __device__ __forceinline__ Leading combine(Leading a, Leading b) {
    const Leading& first = b.upper > a.upper ? b : a;
    const A other = std::fmin(a.upper, b.upper);
    return {first.upper, std::fmax(other, std::fmax(a.second, b.second)), std::fmax(a.lower, b.lower), first.code};
  }
  __device__ __forceinline__ void add(A s, A e, int32_t own) {
    const A high = std::fmin(s + e, A(INFINITY));  // also if s is NaN or infinite, because e is infinite then
    lower = std::fmax(lower, s - e);               // ignores NaN
    second = std::fmax(second, std::fmin(upper, high));
    code = high > upper ? own : code;
    upper = std::fmax(upper, high);
  }
};

template <class Value>
struct OfRows {
  Value row[kRows];
  static __device__ __forceinline__ OfRows identity() {
    OfRows values;
#pragma unroll
    for (int r = 0; r < kRows; ++r) values.row[r] = Value::identity();
    return values;
  }
  static __device__ __forceinline__ OfRows combine(const OfRows& a, const OfRows& b) {
    OfRows values;
#pragma unroll
    for (int r = 0; r < kRows; ++r) values.row[r] = Value::combine(a.row[r], b.row[r]);
    return values;
  }
};

struct Best {
  double score;
  int64_t code;
  static __device__ __forceinline__ Best identity() { return {-INFINITY, -1}; }
  static __device__ __forceinline__ Best combine(Best a, Best b) {
    return b.code >= 0 && ranks_before(b.score, b.code, a.score, a.code) ? b : a;
  }
};

// Per-thread values that the rows of a team need after their products were read; kept small to save registers.
template <class A>
struct OpenRow {
  A bound;
  A upper;  // largest s + e of the thread
};

// The state of a row before this tile.
template <class A>
struct Before {
  A bound = A(-INFINITY);
  bool is_nan = false;

  Before() = default;
  __device__ __forceinline__ Before(const CodeScores& scores, int64_t row)
      : bound(static_cast<const A*>(scores.bound)[row]), is_nan(scores.best[row] != scores.best[row]) {}
};

template <class A>
struct Scratch {
  typename Reduction<OfRows<Leading<A>>>::Scratch leading;
  typename Reduction<Best>::Scratch best;
  OpenRow<A> rows[kRows][kThreads];
};

// Compares the products of a tile. A chunk is 16 bytes of codes.
template <class A>
struct TileScores {
  static constexpr int kSize = Groups<A>::kSize;
  const CodeScores& scores;
  const Margin<A>& margin;
  int codes;

  // Per code of a chunk: s = scale p - offset, e = slope of_row + constant.
  struct CodeTerms {
    A scale[kSize];
    A offset[kSize];
    A slope[kSize];
    A constant[kSize];
  };
  __device__ __forceinline__ CodeTerms of_codes(int chunk) const {
    CodeTerms values;
    load(scores.code_norm, chunk, values.slope);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      values.scale[k] = 1;
      values.offset[k] = 0;
      values.constant[k] = margin.of_code(values.slope[k]);
    }
    if (scores.code_half_square != nullptr) {
      load(scores.code_half_square, chunk, values.offset);
    } else if (scores.code_gain != nullptr) {
      load(scores.code_gain, chunk, values.scale);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        values.slope[k] *= values.scale[k];
        values.constant[k] *= values.scale[k];
      }
    }
    if (valid(chunk) < kSize) {  // padding never has the largest score
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (k < valid(chunk)) continue;
        values.scale[k] = values.slope[k] = values.constant[k] = 0;
        values.offset[k] = A(INFINITY);
      }
    }
    return values;
  }
  // Number of valid codes in a chunk.
  __device__ __forceinline__ int valid(int chunk) const { return codes - chunk * kSize; }

  // Calls visit(k, s, e) for the codes of a chunk. of_row: Margin::of_row.
  template <class Visit>
  __device__ __forceinline__ void visit(const CodeTerms& values, const A (&products)[kSize], A of_row,
                                        Visit visit) const {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      visit(k, products[k] * values.scale[k] - values.offset[k], of_row * values.slope[k] + values.constant[k]);
    }
  }
  // Bypasses the L1 cache, where the per-code numbers stay.
  __device__ __forceinline__ void load_products(int64_t row, int chunk, A (&products)[kSize]) const {
    unpack_group<A>(load_words(static_cast<const A*>(scores.products) + row * scores.pitch + chunk * kSize), products);
    if (valid(chunk) >= kSize) return;
#pragma unroll
    for (int k = 0; k < kSize; ++k) products[k] = k < valid(chunk) ? products[k] : A(0);
  }

 private:
  __device__ __forceinline__ void load(const void* of_codes, int chunk, A (&out)[kSize]) const {
    unpack_group<A>(load_words_cached(static_cast<const A*>(of_codes) + chunk * kSize), out);
  }
};

// Iterates over the codes of a warp that may be the best of a row.
template <class A>
struct Candidates {
  static constexpr int kSize = TileScores<A>::kSize;
  const TileScores<A>& tile;
  int64_t row;
  A of_row;
  A bound;
  bool has_candidate;  // whether this thread has one
  int step;
  int chunks;
  int start;           // chunk of lane 0
  int k = kSize;       // position in a chunk
  uint32_t found = 0;  // candidates in the thread's chunk
  uint32_t lanes = 0;  // lanes whose code k is still to visit

  __device__ __forceinline__ Candidates(const TileScores<A>& tile, int64_t row, A row_norm, const OpenRow<A>& open,
                                        int first_chunk, int step, int chunks)
      : tile(tile),
        row(row),
        of_row(tile.margin.of_row(row_norm)),
        bound(open.bound),
        has_candidate(!(open.upper < open.bound)),
        step(step),
        chunks(chunks),
        start(ballot(has_candidate) == 0 ? chunks : first_chunk - step) {}

  // The next code, or -1 after the last.
  __device__ __forceinline__ int64_t next() {
    while (lanes == 0) {
      if (++k < kSize) {
        lanes = ballot((found >> k & 1) != 0);
        continue;
      }
      start += step;
      if (start >= chunks) return -1;
      find();
      k = ballot(found != 0) == 0 ? kSize : -1;
    }
    const int lane = lowest_bit(lanes);
    lanes &= lanes - 1;
    return tile.scores.first_code + int64_t(start + lane) * kSize + k;
  }

 private:
  __device__ __forceinline__ void find() {
    const int chunk = start + int(threadIdx.x) % kWarpSize;
    found = 0;
    if (!has_candidate || chunk >= chunks) return;
    A products[kSize];
    tile.load_products(row, chunk, products);
    tile.visit(tile.of_codes(chunk), products, of_row,
               [&](int k, A s, A e) { found |= uint32_t(!(s + e < bound) && k < tile.valid(chunk)) << k; });
  }
};

// Grid: one team of `warps` warps, one or all of a block, per kRows rows.
template <class A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 8 ? 2 : 4)
    best_codes_kernel(const __grid_constant__ CodeScores scores, const __grid_constant__ Margin<A> margin, int warps) {
  using Leads = OfRows<Leading<A>>;
  constexpr int kSize = TileScores<A>::kSize;
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize % warps;
  const int64_t team = (int64_t(blockIdx.x) * kThreads + int(threadIdx.x)) / (warps * kWarpSize);
  const int64_t first = team * kRows;
  if (first >= scores.input.rows) return;
  const int count = scores.input.rows - first < kRows ? int(scores.input.rows - first) : kRows;
  auto* scratch = reinterpret_cast<Scratch<A>*>(shared_memory());
  const TileScores<A> tile{scores, margin, int(scores.codes)};
  const int chunks = (tile.codes + kSize - 1) / kSize, step = warps * kWarpSize;
  const bool begun = scores.first_code > 0, writes = warp == 0 && lane == 0;
  const A* row_norm = static_cast<const A*>(scores.input_norm) + first;

  Leads leads = Leads::identity();
  {
    A of_row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) of_row[r] = margin.of_row(row_norm[r < count ? r : 0]);
    for (int chunk = warp * kWarpSize + lane; chunk < chunks; chunk += step) {
      A products[kRows][kSize];
#pragma unroll
      for (int r = 0; r < kRows; ++r) tile.load_products(first + (r < count ? r : 0), chunk, products[r]);
      const auto of_codes = tile.of_codes(chunk);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        tile.visit(of_codes, products[r], of_row[r],
                   [&](int k, A s, A e) { leads.row[r].add(s, e, chunk * kSize + k); });
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) scratch->rows[r][threadIdx.x].upper = leads.row[r].upper;
  // Read before the reduction, whose barriers order it before the writes.
  Before<A> before[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) before[r] = begun && r < count ? Before<A>(scores, first + r) : Before<A>();
  leads = warps == 1 ? Reduction<Leads>::over_warp(leads) : Reduction<Leads>::over_cluster(leads, &scratch->leading);

  uint32_t open = 0;  // rows whose codes are rescored
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const Leading<A>& lead = leads.row[r];
    const A bound = std::fmax(before[r].bound, lead.lower);
    const int64_t row = first + r;
    scratch->rows[r][threadIdx.x].bound = bound;
    if (r >= count || before[r].is_nan || lead.upper < bound) continue;  // unchanged
    const bool all_nan = row_norm[r] != row_norm[r];                     // every score is NaN
    const bool alone = !begun && lead.second < bound && lead.upper < A(INFINITY);
    if (!all_nan && !alone) {
      open |= 1u << r;
    } else if (writes) {
      scores.best[row] = all_nan ? double(NAN) : double(INFINITY);
      scores.index[row] = scores.first_code + (all_nan ? 0 : lead.code);
    }
  }

#pragma unroll 1
  for (int r = 0; r < count; ++r) {
    const int64_t row = first + r;
    const OpenRow<A> thread_row = scratch->rows[r][threadIdx.x];
    Best best = Best::identity();
    if ((open >> r & 1) != 0) {
      Candidates<A> candidates(tile, row, row_norm[r], thread_row, warp * kWarpSize, step, chunks);
      if (begun && warp == 0) best = {scores.best[row], scores.index[row]};
      // The best so far is rescored now if it was the only candidate then.
      const bool pending = best.score == double(INFINITY);
      int64_t code = pending ? best.code : candidates.next();
      if (pending) best = Best::identity();
      for (; code >= 0; code = candidates.next()) {
        if (best.score != best.score && code > best.code) continue;
        best = Best::combine(best, {exact_score(scores, row, code), code});
      }
      if (warps > 1) {
        best = Reduction<Best>::over_cluster(best, &scratch->best);
        __syncthreads();  // the shared memory may be reused
      }
    }
    if (!writes) continue;
    static_cast<A*>(scores.bound)[row] = thread_row.bound;
    if (best.code < 0) continue;
    scores.best[row] = best.score;
    scores.index[row] = best.code;
  }
}

template <class A>
void launch_for(const CodeScores& scores, void* stream) {
  const Margin<A> margin(scores.input.dim, scores.matmul_rounding, scores.metric == CodeMetric::kSquaredDistance);
  const int warps = scores.codes > kCodesOfWarp ? kThreads / kWarpSize : 1;
  const int64_t rows_of_block = kThreads / kWarpSize / warps * kRows;
  const LaunchShape shape{ceil_div(scores.input.rows, rows_of_block), kThreads, int64_t(sizeof(Scratch<A>)), 1};
  launch("best_codes_kernel", best_codes_kernel<A>, shape, stream, scores, margin, warps);
}

}  // namespace

void launch_best_codes(const CodeScores& scores, void* stream) {
  check_dim(scores.input.dim);
  if (scores.codes > int64_t(1) << 30) fail("a tile has at most 2^30 codes");
  return scores.is_double ? launch_for<double>(scores, stream) : launch_for<float>(scores, stream);
}

}  // namespace sslkernels
