// Masking of tokens in one pass, which reads the ids and writes the new ids and the labels. No draw is materialised.
//
// A thread has a group of four columns: one Philox call per draw. For independent tokens, groups are numbered through
// all rows. For chained units (words, spans) a block takes a row: a group maps the state of the token before it to that
// of its last token, and a scan over these maps gives each group its initial state.
#include "core/cuda/scan.h"
#include "random/cuda/noise.h"
#include "vocabulary/mask_tokens.h"

namespace sslkernels {
namespace {

constexpr int kBlocks = 5;  // resident blocks per multiprocessor that registers must allow: 48 registers a thread

struct MaskTokensParameters {
  MaskTokens tokens;
  int64_t ranges[2 * kInlineRanges];  // if kInline, replaces tokens.rule.ranges
};

template <bool kInline>
__device__ __forceinline__ MaskRule rule_of(const MaskTokensParameters& parameters) {
  MaskRule rule = parameters.tokens.rule;
  if constexpr (kInline) rule.ranges = parameters.ranges;
  return rule;
}

// Bit k: token k of a group is eligible by its id and the special mask.
template <int N, class Id>
__device__ __forceinline__ uint32_t eligible_tokens(const MaskTokens& tokens, const MaskRule& rule, int64_t offset,
                                                    int count, const Id (&ids)[N]) {
  uint32_t eligible = (1u << count) - 1;
#pragma unroll 1  // lists are short, and unrolling would cost registers
  for (int64_t r = 0; r < rule.range_count; ++r) {
    const uint64_t start = uint64_t(rule.ranges[2 * r]), size = uint64_t(rule.ranges[2 * r + 1]) - start;
#pragma unroll
    for (int k = 0; k < N; ++k) eligible &= ~(uint32_t(uint64_t(int64_t(ids[k])) - start < size) << k);
  }
  if (tokens.special_mask != nullptr) {
    uint8_t special[N];
    load_group(tokens.special_mask + offset, count, special);
#pragma unroll
    for (int k = 0; k < N; ++k) eligible &= ~(uint32_t(special[k] != 0) << k);
  }
  return eligible;
}

// Writes the new ids and the labels of a group; bit k of `chosen`: token k is chosen.
template <class Id>
__device__ __forceinline__ void write_group(const MaskTokens& tokens, const MaskRule& rule, uint64_t seed,
                                            const ColumnGroup& group, uint32_t chosen, Id (&ids)[kGroup]) {
  Id labels[kGroup];
#pragma unroll
  for (int k = 0; k < kGroup; ++k) labels[k] = chosen >> k & 1 ? ids[k] : Id(rule.ignore_index);
  store_group(labels, group.count, static_cast<Id*>(tokens.labels) + group.offset);
  if (chosen != 0) {
    uint32_t words[kGroup], random = 0;
    draw_words(seed, group.number, 1, words);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const bool masked = words[k] < rule.to_mask;
      if (chosen >> k & 1) {
        if (masked) ids[k] = Id(rule.mask_id);
        random |= uint32_t(!masked && words[k] < rule.to_random) << k;
      }
    }
    if (random != 0) {
      draw_words(seed, group.number, 2, words);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (random >> k & 1) ids[k] = Id(random_id(rule, words[k]));
      }
    }
  }
  store_group(ids, group.count, static_cast<Id*>(tokens.output_ids) + group.offset);
}

// A map of the states {0, 1}: bit s is the image of s.
struct StateMap {
  uint32_t values;

  __device__ __forceinline__ uint32_t at(uint32_t state) const { return values >> state & 1; }
  static __device__ __forceinline__ StateMap identity() { return {2}; }
  static __device__ __forceinline__ StateMap combine(StateMap first, StateMap second) {
    return {second.at(first.at(0)) | second.at(first.at(1)) << 1};
  }
};

// Word ids of a group, negative if there are none.
template <int N>
__device__ __forceinline__ void load_word_ids(const MaskTokens& tokens, int64_t offset, int count, int64_t (&out)[N]) {
  if (tokens.word_ids == nullptr) {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = -1;
  } else if (tokens.wide_words) {
    load_group(static_cast<const int64_t*>(tokens.word_ids) + offset, count, out);
  } else {
    int32_t narrow[N];
    load_group(static_cast<const int32_t*>(tokens.word_ids) + offset, count, narrow);
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = narrow[k];
  }
}

// The state of N tokens that their chain depends on.
template <int N>
struct ChainTokens {
  int64_t word_ids[N];
  uint32_t eligible;  // bit k: token k is eligible
};

template <int N, class Id>
__device__ __forceinline__ ChainTokens<N> chain_tokens(const MaskTokens& tokens, const MaskRule& rule, int64_t offset,
                                                       int count, const Id (&ids)[N]) {
  ChainTokens<N> chain;
  load_word_ids(tokens, offset, count, chain.word_ids);
  chain.eligible = eligible_tokens(tokens, rule, offset, count, ids);
  if (tokens.word_ids != nullptr) {
#pragma unroll
    for (int k = 0; k < N; ++k) chain.eligible &= ~(uint32_t(chain.word_ids[k] < 0) << k);
  }
  return chain;
}

// Grid: one thread per group.
template <class Id, bool kInline>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mask_tokens_kernel(const __grid_constant__ MaskTokensParameters parameters) {
  const MaskTokens& tokens = parameters.tokens;
  const MaskRule rule = rule_of<kInline>(parameters);
  const ColumnGroup group = group_of_all(tokens, thread_of_grid());
  Id ids[kGroup];
  load_group(static_cast<const Id*>(tokens.input_ids) + group.offset, group.count, ids);
  const uint64_t seed = uint64_t(*tokens.seed);
  uint32_t draw[kGroup], chosen = 0;
  draw_words(seed, group.number, 0, draw);
#pragma unroll
  for (int k = 0; k < kGroup; ++k) chosen |= uint32_t(draw[k] < rule.select) << k;
  chosen &= eligible_tokens(tokens, rule, group.offset, group.count, ids);
  write_group(tokens, rule, seed, group, chosen, ids);
}

// Grid: one block per row. Shared memory: two scratches of the scan.
template <class Id, bool kInline>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mask_tokens_chain_kernel(const __grid_constant__ MaskTokensParameters parameters) {
  const MaskTokens& tokens = parameters.tokens;
  const MaskRule rule = rule_of<kInline>(parameters);
  const Id* input = static_cast<const Id*>(tokens.input_ids);
  const uint64_t seed = uint64_t(*tokens.seed);
  const int64_t groups = groups_of_row(tokens.columns);
  auto* scratch = reinterpret_cast<Scan<StateMap>::Scratch*>(shared_memory());
  uint32_t state = 0;  // state of the last token of the previous step
  int step = 0;
  for (int64_t first = 0; first < groups; first += int64_t(blockDim.x), ++step) {
    const int64_t index = first + int64_t(threadIdx.x);
    const ColumnGroup group = group_of_row(tokens, int64_t(blockIdx.x), index);
    Id ids[kGroup], id_before[1];
    const int before_count = index > 0 && group.count > 0;
    load_group(input + group.offset, group.count, ids);
    load_group(input + group.offset - 1, before_count, id_before);
    const ChainTokens<kGroup> chain = chain_tokens(tokens, rule, group.offset, group.count, ids);
    const ChainTokens<1> before = chain_tokens(tokens, rule, group.offset - 1, before_count, id_before);

    uint32_t draw[kGroup];
    draw_words(seed, group.number, 0, draw);
    StateMap maps[kGroup], of_group = StateMap::identity();
    uint32_t eligible_before = before.eligible;
    int64_t word_id_before = before_count > 0 ? before.word_ids[0] : -1;
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const uint32_t if_unchosen = draw[k] < (eligible_before ? rule.enter : rule.select);
      const uint32_t if_chosen = draw[k] < (eligible_before ? rule.stay : rule.select);
      const bool same_word = chain.word_ids[k] >= 0 && chain.word_ids[k] == word_id_before;
      maps[k] = same_word ? StateMap::identity() : StateMap{if_unchosen | if_chosen << 1};
      of_group = StateMap::combine(of_group, maps[k]);
      eligible_before = chain.eligible >> k & 1;
      word_id_before = chain.word_ids[k];
    }

    StateMap total;
    const StateMap prefix = Scan<StateMap>::exclusive_over_block(of_group, &scratch[step % 2], total);
    uint32_t current = prefix.at(state), chosen = 0;
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      current = maps[k].at(current);
      chosen |= current << k;
    }
    state = total.at(state);
    write_group(tokens, rule, seed, group, chosen & chain.eligible, ids);
  }
}

struct RangesParameters {
  int64_t ranges[2 * kInlineRanges];
};

// Grid: one block of 2 * count threads, rounded up to warps.
__global__ void store_ranges_kernel(const __grid_constant__ RangesParameters parameters, int count, int64_t* to) {
  if (int(threadIdx.x) < 2 * count) to[threadIdx.x] = parameters.ranges[threadIdx.x];
}

// One block per row, in steps of equal size.
LaunchShape shape_of_rows(int64_t rows, int64_t columns) {
  const int64_t groups = groups_of_row(columns), steps = ceil_div(groups, kThreads);
  return {rows, whole_warps(ceil_div(groups, steps)), 2 * sizeof(Scan<StateMap>::Scratch), 1};
}

// From host memory to device memory, kInlineRanges per launch.
void store_ranges(const int64_t* from, int64_t count, int64_t* to, void* stream) {
  for (int64_t first = 0; first < count; first += kInlineRanges) {
    const int part = int(std::min<int64_t>(count - first, kInlineRanges));
    RangesParameters parameters{};
    std::copy_n(from + 2 * first, 2 * part, parameters.ranges);
    launch("store_ranges_kernel", store_ranges_kernel, {1, whole_warps(2 * part), 0, 1}, stream, parameters, part,
           to + 2 * first);
  }
}

template <class Id, bool kInline>
void launch_mask(const MaskTokensParameters& parameters, void* stream) {
  const MaskTokens& tokens = parameters.tokens;
  if (tokens.chained) {
    launch("mask_tokens_chain_kernel", mask_tokens_chain_kernel<Id, kInline>,
           shape_of_rows(tokens.rows, tokens.columns), stream, parameters);
  } else {
    launch("mask_tokens_kernel", mask_tokens_kernel<Id, kInline>, shape_of_groups(tokens.rows, tokens.columns), stream,
           parameters);
  }
}

}  // namespace

void launch_mask_tokens(const MaskTokens& tokens, int64_t* device_ranges, void* stream) {
  if (tokens.rows == 0 || tokens.columns == 0) return;
  MaskTokensParameters parameters{tokens, {}};
  const int64_t count = tokens.rule.range_count;
  if (count <= kInlineRanges) {
    std::copy_n(tokens.rule.ranges, 2 * count, parameters.ranges);
    tokens.wide_ids ? launch_mask<int64_t, true>(parameters, stream) : launch_mask<int32_t, true>(parameters, stream);
  } else {
    store_ranges(tokens.rule.ranges, count, device_ranges, stream);
    parameters.tokens.rule.ranges = device_ranges;
    tokens.wide_ids ? launch_mask<int64_t, false>(parameters, stream) : launch_mask<int32_t, false>(parameters, stream);
  }
}

}  // namespace sslkernels
