// Per-query negatives: scores, energy and gradients, one block per row.
//
// The negatives of a row are read by 16 bytes and stay in shared memory until their gradients are written: one read,
// one write. A row that is too long for that is processed in tiles; only the softmax reads them twice, because it needs
// the sum over all of them first. The query is stored in shared memory in the accumulation type, padded so that a group
// at any alignment is read without bank conflicts. Every sum has a fixed order.
//
// By index the negatives are gathered from a table and a bank, by the same loads: only where each begins differs. Of
// their gradients the kernel writes the factors of the query, which segment sums turn into gradients of the tables.
#include <algorithm>

#include "contrastive/query_negatives.h"
#include "core/cuda/launch.h"
#include "core/cuda/reduce.h"
#include "core/cuda/words.h"

namespace sslkernels {
namespace {

template <class T>  // threads per block at most, and per multiprocessor at least: 64 registers a thread, float64 128
constexpr int kMostThreads = sizeof(T) == 8 ? 512 : 1024;
constexpr int kBatch = 4;  // groups in flight per thread

template <class A>
struct Dots {
  A dot;
  A square;
};

template <class T>
using Sums = Reduction<NegativeSums<typename Accumulation<T>::type>>;
template <class T>
using Scratch = typename Sums<T>::Scratch;

// Shared memory: scratch of two reductions, addresses, factors and dots of a tile, the query, validity flags, the tile.

constexpr SSLKERNELS_HD int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

template <class T>
struct Layout {
  using A = typename Accumulation<T>::type;
  static constexpr int kSize = Groups<T>::kSize;
  int64_t found;
  int64_t factors;
  int64_t dots;
  int64_t query;
  int64_t valid;
  int64_t cached;
  int64_t bytes;

  __host__ __device__ __forceinline__ Layout(int tile, int pitch, bool cache, int64_t dim) {
    found = 2 * int64_t(sizeof(Scratch<T>));
    factors = found + tile * int64_t(sizeof(const T*));
    dots = factors + tile * int64_t(sizeof(NegativeFactors<A>));
    query = dots + tile * int64_t(sizeof(Dots<A>));
    valid = query + (dim / kSize + 3) * (kSize + 1) * int64_t(sizeof(A));
    cached = aligned(valid + tile);
    bytes = cached + (cache ? int64_t(tile) * pitch * 16 : 0);
  }
};

// kAligned: all negatives and their gradients start at multiples of 16 bytes.
template <class T, bool kAligned>
struct Block {
  using A = typename Accumulation<T>::type;
  static constexpr int kSize = Groups<T>::kSize;

  const QueryNegatives& args;
  const QueryNegativesPlan& plan;
  int64_t i;
  int dim;
  Scratch<T>* scratch;  // for two reductions
  const T** found;      // where each negative begins; null: it is not read
  NegativeFactors<A>* factors;
  Dots<A>* dots;
  A* query;
  uint8_t* valid;
  Words* cached;

  __device__ __forceinline__ Block(const QueryNegatives& args, const QueryNegativesPlan& plan)
      : args(args), plan(plan), i(blockIdx.x), dim(int(args.dim)) {
    const Layout<T> layout(plan.tile, plan.pitch, plan.cached, args.dim);
    scratch = reinterpret_cast<Scratch<T>*>(shared_memory());
    found = reinterpret_cast<const T**>(shared_memory() + layout.found);
    factors = reinterpret_cast<NegativeFactors<A>*>(shared_memory() + layout.factors);
    dots = reinterpret_cast<Dots<A>*>(shared_memory() + layout.dots);
    query = reinterpret_cast<A*>(shared_memory() + layout.query);
    valid = reinterpret_cast<uint8_t*>(shared_memory() + layout.valid);
    cached = reinterpret_cast<Words*>(shared_memory() + layout.cached);
  }

  __device__ __forceinline__ int tile_size(int64_t first) const {
    return int(args.count - first < plan.tile ? args.count - first : plan.tile);
  }
  __device__ __forceinline__ Groups<T> groups_of(const T* negative) const {
    return Groups<T>(kAligned ? nullptr : negative, 0, dim);
  }
  static __device__ __forceinline__ bool whole(const Groups<T>& groups, int group) {
    return kAligned || groups.whole(group);
  }

  // Found before the negatives are read, so that no load waits for a flag or an index.
  __device__ __forceinline__ void find_tile(int64_t first, int size) const {
    for (int t = int(threadIdx.x); t < size; t += int(blockDim.x)) {
      const int64_t at = i * args.count + first + t;
      const bool counts = is_valid(args, at);
      valid[t] = counts;
      found[t] = counts ? begin_of(at) : nullptr;
    }
  }
  // Null for an index out of range, which makes the row NaN.
  __device__ __forceinline__ const T* begin_of(int64_t at) const {
    const T* table = static_cast<const T*>(args.negatives);
    if (args.index == nullptr) return table + at * args.dim;
    const int64_t row = index_at(args.index, args.wide_index, at);
    if (!in_range(row, args.table_rows + args.bank_rows)) return nullptr;
    if (row < args.table_rows) return table + row * args.dim;
    return static_cast<const T*>(args.bank) + (row - args.table_rows) * args.dim;
  }

  // One number of padding after every kSize; zeros before the first column and after the last.
  __device__ __forceinline__ void load_query() const {
    const T* from = static_cast<const T*>(args.query) + i * args.dim;
    for (int place = int(threadIdx.x); place < dim + 2 * kSize; place += int(blockDim.x)) {
      const int column = place - kSize;
      query[place + place / kSize] = column >= 0 && column < dim ? A(to_float(from[column])) : A(0);
    }
  }
  // Columns of the query from groups.column(group) on.
  __device__ __forceinline__ void query_group(const Groups<T>& groups, int group, A (&x)[kSize]) const {
    const int shift = kAligned ? 0 : -groups.first;
    const A* from = query + (group + 1) * (kSize + 1) - shift;
#pragma unroll
    for (int k = 0; k < kSize; ++k) x[k] = from[k < shift ? k - 1 : k];
  }

  // A group of a negative as it is in memory, including the neighbouring elements at its ends.
  __device__ __forceinline__ Words read(const T* negative, const Groups<T>& groups, int group, bool last) const {
    const T* from = negative + groups.column(group);
    if constexpr (!kAligned) {
      const T* all = static_cast<const T*>(args.negatives);
      const bool outside = from < all || from + kSize > all + args.rows * args.count * args.dim;
      if (args.index == nullptr ? outside : !groups.whole(group)) {
        A n[kSize];
#pragma unroll
        for (int k = 0; k < kSize; ++k) n[k] = groups.contains(groups.column(group) + k) ? A(to_float(from[k])) : A(0);
        return pack_group<T>(n);
      }
    }
    return last ? load_words_last(from) : load_words(from);
  }
};

// The groups that a thread visits: first the groups of one negative in steps of the team's width, then of the team's
// next negative. All threads of a warp step together, whether or not they have a group.
struct Visit {
  int team;
  int teams;
  int steps;
  int left;
  int negative;
  int step;

  __device__ __forceinline__ Visit(const QueryNegativesPlan& plan, int size)
      : team(plan.team),
        teams(int(blockDim.x) / team),
        steps((plan.pitch + team - 1) / team),
        left((size + teams - 1) / teams * steps),
        negative(int(threadIdx.x) / team),
        step(0) {}
  __device__ __forceinline__ int lane() const { return int(threadIdx.x) % team; }
  __device__ __forceinline__ int group() const { return step * team + lane(); }
  __device__ __forceinline__ bool ends_negative() const { return step == steps - 1; }
  __device__ __forceinline__ void next() {
    --left;
    if (++step == steps) {
      step = 0;
      negative += teams;
    }
  }
};

// Reads the negatives [first, first + size) and computes their dot products; `cache` also stores them, as zeros if they
// are not valid. `last`: they are not read again.
template <class T, bool kAligned>
__device__ __forceinline__ void load_tile(const Block<T, kAligned>& block, int64_t first, int size, bool cache,
                                          bool last) {
  using A = typename Accumulation<T>::type;
  constexpr int kSize = Groups<T>::kSize;
  const bool normalise = block.args.query_inverse_norm != nullptr;
  block.find_tile(first, size);
  __syncthreads();
  Visit ahead(block.plan, size), here(block.plan, size);
  A dot = 0, square = 0;
  while (here.left > 0) {
    Words words[kBatch] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const T* negative = ahead.negative < size ? block.found[ahead.negative] : nullptr;
      const Groups<T> groups = block.groups_of(negative);
      if (negative != nullptr && ahead.group() < groups.count) {
        words[b] = block.read(negative, groups, ahead.group(), last);
      }
      ahead.next();
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (here.left <= 0) break;
      const int group = here.group();
      const T* negative = here.negative < size ? block.found[here.negative] : nullptr;
      const Groups<T> groups = block.groups_of(negative);
      if (here.negative < size && group < groups.count) {
        A n[kSize], x[kSize];
        unpack_group<T>(words[b], n);
        if (!block.whole(groups, group)) {
#pragma unroll
          for (int k = 0; k < kSize; ++k) n[k] = groups.contains(groups.column(group) + k) ? n[k] : A(0);
          words[b] = pack_group<T>(n);
        }
        if (cache) block.cached[here.negative * block.plan.pitch + group] = words[b];
        block.query_group(groups, group, x);
#pragma unroll
        for (int k = 0; k < kSize; ++k) dot += x[k] * n[k];
        if (normalise) {
#pragma unroll
          for (int k = 0; k < kSize; ++k) square += n[k] * n[k];
        }
      }
      if (here.ends_negative()) {
        for (int lanes = here.team / 2; lanes > 0; lanes /= 2) {
          dot += shuffle_xor(dot, lanes);
          square += shuffle_xor(square, lanes);
        }
        if (here.lane() == 0 && here.negative < size) {
          block.dots[here.negative] = {negative == nullptr ? A(NAN) : dot, square};
        }
        dot = square = A(0);
      }
      here.next();
    }
  }
}

template <class T, bool kAligned, class A>
__device__ __forceinline__ void score_tile(const Block<T, kAligned>& block, const QueryRow<A>& row, int64_t first,
                                           int size, NegativeSums<A>& sums) {
  for (int t = int(threadIdx.x); t < size; t += int(blockDim.x)) {
    A score = -INFINITY;
    if (block.valid[t]) {
      score = score_of(row, block.dots[t].dot, block.dots[t].square).score;
      sums.add(row, score);
    }
    if (block.args.scores != nullptr) {
      static_cast<A*>(block.args.scores)[block.i * block.args.count + first + t] = score;
    }
  }
}

template <class T, bool kAligned, class A>
__device__ __forceinline__ void weigh_tile(const Block<T, kAligned>& block, const QueryRow<A>& row, int64_t first,
                                           int size, const SettledRow<A>& settled, NegativeSums<A>& sums) {
  A* of_queries = block.args.index == nullptr ? nullptr : static_cast<A*>(block.args.grad_negatives);
  for (int t = int(threadIdx.x); t < size; t += int(blockDim.x)) {
    NegativeFactors<A> factors{A(0), A(0), A(0)};
    if (block.valid[t]) {
      const NegativeScore<A> score = score_of(row, block.dots[t].dot, block.dots[t].square);
      const A weight = weight_of(row, score.score, settled);
      sums.scale += weight * score.similarity;
      sums.bias += weight;
      factors = factors_of(row, score, weight);
    }
    block.factors[t] = factors;
    if (of_queries != nullptr) of_queries[block.i * block.args.count + first + t] = factors.of_query;
  }
}

template <class T, bool kAligned>
__device__ __forceinline__ void write_grad_negatives(const Block<T, kAligned>& block, int64_t first, int size) {
  using A = typename Accumulation<T>::type;
  constexpr int kSize = Groups<T>::kSize;
  for (Visit at(block.plan, size); at.left > 0; at.next()) {
    if (at.negative >= size) continue;
    const Groups<T> groups = block.groups_of(block.found[at.negative]);
    const int group = at.group(), column = groups.column(group);
    if (group >= groups.count) continue;
    const NegativeFactors<A> factors = block.factors[at.negative];
    A value[kSize] = {};
    if (factors.of_query != A(0)) {  // the query of a negative that is not valid may be NaN
      A n[kSize], x[kSize];
      unpack_group<T>(block.cached[at.negative * block.plan.pitch + group], n);
      block.query_group(groups, group, x);
#pragma unroll
      for (int k = 0; k < kSize; ++k) value[k] = factors.of_query * (x[k] - factors.projection * n[k]);
    }
    T* grad = static_cast<T*>(block.args.grad_negatives) + column +
              (block.i * block.args.count + first + at.negative) * block.args.dim;
    if (kAligned || (groups.whole(group) && reinterpret_cast<uint64_t>(grad) % 16 == 0)) {
      store_words(grad, pack_group<T>(value));
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (groups.contains(column + k)) from_float(value[k], grad + k);
      }
    }
  }
}

// One thread per column, or per two 16-bit columns in a word. The first tile stores its sums, later tiles add theirs.
template <class T, bool kAligned, class A>
__device__ __forceinline__ void add_grad_query(const Block<T, kAligned>& block, const QueryRow<A>& row, int64_t first,
                                               int size) {
  constexpr int kSize = Groups<T>::kSize;
  constexpr int kColumns = kAligned && sizeof(T) == 2 ? 2 : 1;
  constexpr int kSums = 4;
  A* grad = static_cast<A*>(block.args.grad_query) + block.i * block.args.dim;
  const T* cached = reinterpret_cast<const T*>(block.cached);
  for (int column = int(threadIdx.x) * kColumns; column < block.dim; column += int(blockDim.x) * kColumns) {
    A sums[kSums][kColumns] = {};
    for (int t = 0; t < size; t += kSums) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        if (t + s >= size) break;
        const int shift = kAligned ? 0 : int(reinterpret_cast<uint64_t>(block.found[t + s]) / sizeof(T) % kSize);
        const T* at = cached + (t + s) * block.plan.pitch * kSize + shift + column;
        const A factor = block.factors[t + s].of_negative;
        if constexpr (kColumns == 2) {
          A low, high;
          unpack(*reinterpret_cast<const uint32_t*>(at), T{}, low, high);
          sums[s][0] += factor * low;
          sums[s][1] += factor * high;
        } else {
          sums[s][0] += factor * to_float(*at);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const A sum = row.scale * row.query_inverse_norm * ((sums[0][c] + sums[1][c]) + (sums[2][c] + sums[3][c]));
      grad[column + c] = first == 0 ? sum : grad[column + c] + sum;
    }
  }
}

// Grid: one block per row. Shared memory: Layout.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kMostThreads<T>, 1)
    query_negatives_kernel(const __grid_constant__ QueryNegatives args,
                           const __grid_constant__ QueryNegativesPlan plan) {
  using A = typename Accumulation<T>::type;
  const Block<T, kAligned> block(args, plan);
  const QueryRow<A> row = query_row<A>(args, block.i);
  const bool gradient = args.coefficient != nullptr, by_index = args.index != nullptr;
  const bool apart = weights_are_apart(args);
  const bool one_tile = args.count <= plan.tile;
  block.load_query();  // visible after the first barrier

  SettledRow<A> settled{A(0), A(0)};
  // One pass for the sums over all negatives, one for the gradients; both in one if weights_are_apart().
  const int passes = apart || gradient ? 2 : 1;
#pragma unroll 1
  for (int pass = apart ? 1 : 0; pass < passes; ++pass) {
    const bool second = pass == 1;
    NegativeSums<A> sums = NegativeSums<A>::identity();
    for (int64_t first = 0; first == 0 || first < args.count; first += plan.tile) {
      const int size = block.tile_size(first);
      if (!second || apart || !one_tile) {
        const bool last = !by_index && (second || !gradient || one_tile);  // other rows may read what an index gathers
        load_tile(block, first, size, plan.cached && (second || one_tile), last);
        __syncthreads();
      }
      if (!second || apart) score_tile(block, row, first, size, sums);
      if (second) {
        if (apart) settled = settle(row, row.reference);
        if (gradient) weigh_tile(block, row, first, size, settled, sums);
        __syncthreads();
        if (gradient && !by_index && args.grad_negatives != nullptr) write_grad_negatives(block, first, size);
        if (gradient && args.grad_query != nullptr) add_grad_query(block, row, first, size);
      }
      if (!one_tile) __syncthreads();
    }
    sums = Sums<T>::over_cluster(sums, block.scratch + pass);
    if (!second || apart) {
      const double value = value_of(row, sums);
      if (threadIdx.x == 0) args.value[block.i] = value;
      settled = settle(row, value);
    }
    if (second && gradient && threadIdx.x == 0) {
      static_cast<A*>(args.grad_scale)[block.i] = sums.scale;
      static_cast<A*>(args.grad_bias)[block.i] = sums.bias;
    }
  }
}

template <class T>
QueryNegativesPlan plan_for(const QueryNegatives& args, const DeviceLimits& limits) {
  using A = typename Accumulation<T>::type;
  constexpr int kSize = Groups<T>::kSize;
  if (args.dim > int64_t(1) << 24) {
    fail("the CUDA kernel of query_negatives takes at most 2^24 columns");
  }
  QueryNegativesPlan plan{};
  // Rows of columns: the negatives, their gradients or the bank; null counts as aligned.
  const void* beside = args.index == nullptr ? args.grad_negatives : args.bank;
  plan.aligned = args.dim % kSize == 0 && reinterpret_cast<uint64_t>(args.negatives) % 16 == 0 &&
                 reinterpret_cast<uint64_t>(beside) % 16 == 0;
  plan.pitch = int(std::max<int64_t>(ceil_div(plan.aligned ? args.dim : args.dim + kSize - 1, kSize), 1));
  plan.team = 1;
  while (plan.team < kWarpSize && plan.team < plan.pitch) plan.team *= 2;
  const bool writes_negatives = args.index == nullptr && args.grad_negatives != nullptr;
  plan.cached = args.coefficient != nullptr && (args.grad_query != nullptr || writes_negatives);

  const int64_t fixed = Layout<T>(0, plan.pitch, plan.cached, args.dim).bytes + 16;
  const int64_t of_negative =
      sizeof(T*) + sizeof(NegativeFactors<A>) + sizeof(Dots<A>) + 1 + (plan.cached ? int64_t(plan.pitch) * 16 : 0);
  // Several blocks per multiprocessor, so that some load while others compute or store; fewer if a row would otherwise
  // be read twice.
  const int blocks = limits.largest_cluster > 1 ? 3 : 2;
  const int64_t wanted =
      std::min(limits.shared_per_block, limits.shared_per_processor / blocks - limits.shared_reserved);
  const int64_t most = weights_are_apart(args) || !plan.cached ? wanted : limits.shared_per_block;
  const int64_t tile_bytes = fixed + args.count * of_negative <= most ? most : wanted;
  const int64_t fit = std::max<int64_t>((tile_bytes - fixed) / of_negative, 1);
  plan.tile = int(std::clamp<int64_t>(args.count, 1, std::min<int64_t>(fit, 1 << 20)));
  plan.shared_bytes = Layout<T>(plan.tile, plan.pitch, plan.cached, args.dim).bytes;
  if (plan.shared_bytes > limits.shared_per_block) {
    fail("the CUDA kernel of query_negatives has no place for negatives of %lld columns",
         static_cast<long long>(args.dim));
  }
  const int64_t resident = limits.shared_per_processor / (plan.shared_bytes + limits.shared_reserved);
  const int64_t most_warps = kMostThreads<T> / std::clamp<int64_t>(resident, 1, 4) / kWarpSize;
  const int64_t useful = ceil_div(int64_t(plan.tile) * plan.pitch, kBatch * kWarpSize);
  // No more warps than needed for that number of turns over the negatives.
  const int64_t of_warps = ceil_div(plan.tile, kWarpSize / plan.team);
  const int64_t turns = ceil_div(of_warps, std::clamp<int64_t>(useful, 1, most_warps));
  plan.threads = int(ceil_div(of_warps, turns)) * kWarpSize;
  return plan;
}

template <class T>
void launch_for(const QueryNegatives& args, void* stream) {
  const QueryNegativesPlan plan = plan_for<T>(args, device_limits());
  const LaunchShape shape{args.rows, plan.threads, plan.shared_bytes, 1};
  constexpr const char* kName = "query_negatives_kernel";
  if constexpr (sizeof(T) < 8) {
    if (plan.aligned) return launch(kName, query_negatives_kernel<T, true>, shape, stream, args, plan);
  }
  launch(kName, query_negatives_kernel<T, false>, shape, stream, args, plan);
}

}  // namespace

QueryNegativesPlan plan_query_negatives(const QueryNegatives& args, const DeviceLimits& limits) {
  switch (args.element) {
    case Element::kFloat:
      return plan_for<float>(args, limits);
    case Element::kDouble:
      return plan_for<double>(args, limits);
    case Element::kBFloat16:
      return plan_for<BFloat16>(args, limits);
    default:
      return plan_for<Half>(args, limits);
  }
}

void launch_query_negatives(const QueryNegatives& args, void* stream) {
  with_element(args.element, [&](auto zero) { launch_for<decltype(zero)>(args, stream); });
}

}  // namespace sslkernels
