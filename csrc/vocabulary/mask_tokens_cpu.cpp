// Masking of tokens in one pass, which reads the ids and writes the new ids and the labels.
//
// Groups of four columns are processed in blocks across rows, so that Philox vectorises over groups even if rows are
// short. Draws 1 and 2 are made only for the chosen tokens, which are first collected in lists. Appending to a list is
// branch-free: every token is written at its end, and the end moves only if the token belongs to the list.
#include <cstring>

#include "random/cpu/philox.h"
#include "random/cpu/philox_groups.h"
#include "vocabulary/mask_tokens.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kTokens = 4 * kGroups;

// The random word of each listed token, by its group and its column modulo 4.
void words_of_tokens(uint64_t seed, const uint64_t* group, const int32_t* token, uint64_t draw, int64_t count,
                     uint32_t* words) {
  constexpr int64_t kStep = 64;
  alignas(kLine) uint32_t all[4 * kStep];
  for (int64_t begin = 0; begin < count; begin += kStep) {
    const int64_t step = count - begin < kStep ? count - begin : kStep;
    words_of_groups(seed, group + begin, draw, step, all);
    for (int64_t i = 0; i < step; ++i) words[begin + i] = all[4 * i + (token[begin + i] & 3)];
  }
}

// The chosen tokens of a block. A token is 4 * (its group in the block) + (its column modulo 4).
template <class Id>
struct Chosen {
  int64_t count;
  alignas(kLine) int32_t token[kTokens + 1];
  int64_t offset[kTokens + 1];  // offsets in the tensors
  alignas(kLine) Id id[kTokens + 1];
};

template <class Id>
void copy_segment(const MaskTokens& tokens, int64_t offset, int64_t count) {
  const Id* __restrict input = static_cast<const Id*>(tokens.input_ids) + offset;
  Id* __restrict output = static_cast<Id*>(tokens.output_ids) + offset;
  Id* __restrict labels = static_cast<Id*>(tokens.labels) + offset;
  const Id ignore = Id(tokens.rule.ignore_index);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    output[i] = input[i];
    labels[i] = ignore;
  }
}

// Writes the labels of the chosen tokens and replaces them by draws 1 and 2.
template <class Id>
void replace_chosen(const MaskTokens& tokens, uint64_t seed, const uint64_t* block_group, const Chosen<Id>& chosen) {
  if (chosen.count <= 0) return;
  const MaskRule rule = tokens.rule;
  Id* output = static_cast<Id*>(tokens.output_ids);
  Id* labels = static_cast<Id*>(tokens.labels);
  const Id mask_id = Id(rule.mask_id);
  alignas(kLine) uint64_t group[kTokens];
  alignas(kLine) uint32_t words[kTokens];
  alignas(kLine) Id new_id[kTokens];
  for (int64_t i = 0; i < chosen.count; ++i) group[i] = block_group[chosen.token[i] / 4];
  words_of_tokens(seed, group, chosen.token, 1, chosen.count, words);
#pragma omp simd
  for (int64_t i = 0; i < chosen.count; ++i) new_id[i] = words[i] < rule.to_mask ? mask_id : chosen.id[i];

  alignas(kLine) int32_t random[kTokens + 1];  // indices into the list of chosen tokens
  alignas(kLine) int32_t random_token[kTokens] = {};
  int64_t random_count = 0;
  for (int64_t i = 0; i < chosen.count; ++i) {
    labels[chosen.offset[i]] = chosen.id[i];
    output[chosen.offset[i]] = new_id[i];
    random[random_count] = int32_t(i);
    random_count += uint64_t(words[i]) - rule.to_mask < rule.to_random - rule.to_mask;
  }
  for (int64_t i = 0; i < random_count; ++i) {
    random_token[i] = chosen.token[random[i]];
    group[i] = block_group[random_token[i] / 4];
  }
  words_of_tokens(seed, group, random_token, 2, random_count, words);
  for (int64_t i = 0; i < random_count; ++i) output[chosen.offset[random[i]]] = Id(random_id(rule, words[i]));
}

// eligible[i] &= ids[i] is not special.
template <class Id>
void exclude_special(const MaskRule& rule, const Id* ids, int64_t count, uint8_t* __restrict eligible) {
  for (int64_t r = 0; r < rule.range_count; ++r) {
    const int64_t start = rule.ranges[2 * r], end = rule.ranges[2 * r + 1];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) eligible[i] &= uint8_t((ids[i] < start) | (ids[i] >= end));
  }
}

// Keeps the eligible tokens whose draw is below the threshold.
template <class Id>
void keep_eligible(const MaskTokens& tokens, Chosen<Id>& chosen) {
  alignas(kLine) uint8_t eligible[kTokens];
  const int64_t count = chosen.count;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t offset = chosen.offset[i];
    chosen.id[i] = static_cast<const Id*>(tokens.input_ids)[offset];
    eligible[i] = tokens.special_mask == nullptr || tokens.special_mask[offset] == 0;
  }
  exclude_special(tokens.rule, chosen.id, count, eligible);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    chosen.token[kept] = chosen.token[i];
    chosen.offset[kept] = chosen.offset[i];
    chosen.id[kept] = chosen.id[i];
    kept += eligible[i];
  }
  chosen.count = kept;
}

template <class Id>
void mask_groups(const MaskTokens& tokens, int64_t begin, int64_t end) {
  const uint64_t seed = uint64_t(*tokens.seed), select = tokens.rule.select;
  alignas(kLine) uint64_t group[kGroups];
  alignas(kLine) uint32_t words[kTokens];
  Segment segments[kGroups];
  Chosen<Id> chosen;
  for (int64_t block = begin; block < end; block += kGroups) {
    const int64_t block_end = end - block < kGroups ? end : block + kGroups;
    int64_t segment_count = 0;
    for_each_segment(block, block_end, tokens.columns, tokens.row_ids, group,
                     [&](const Segment& segment) { segments[segment_count++] = segment; });
    words_of_groups(seed, group, 0, block_end - block, words);
    int64_t count = 0;
    for (int64_t s = 0; s < segment_count; ++s) {
      const Segment& segment = segments[s];
      const int64_t offset = segment.row * tokens.columns + segment.column, at = 4 * segment.at;
      copy_segment<Id>(tokens, offset, segment.count);
      const int64_t before = count;
      for (int64_t i = 0; i < segment.count; ++i) {
        chosen.token[count] = int32_t(at + i);
        count += words[at + i] < select;
      }
      for (int64_t i = before; i < count; ++i) chosen.offset[i] = offset - at + chosen.token[i];
    }
    chosen.count = count;
    keep_eligible(tokens, chosen);
    replace_chosen(tokens, seed, group, chosen);
  }
}

// State that a row carries from one token to the next.
struct Chain {
  bool state;
  bool eligible;
  int64_t word;
};

template <class Id>
void eligible_tokens(const MaskTokens& tokens, int64_t offset, int64_t count, uint8_t* __restrict eligible) {
  const uint8_t* masked = tokens.special_mask == nullptr ? nullptr : tokens.special_mask + offset;
  for (int64_t i = 0; i < count; ++i) eligible[i] = masked == nullptr || masked[i] == 0;
  exclude_special(tokens.rule, static_cast<const Id*>(tokens.input_ids) + offset, count, eligible);
}

// Processes one segment of a row: appends its chosen tokens and returns the state to carry on.
template <class Id, class Word>
Chain walk_segment(const MaskTokens& tokens, const Segment& segment, const uint32_t* words, const uint8_t* eligible,
                   Chain chain, Chosen<Id>& chosen) {
  const uint64_t select = tokens.rule.select, stay = tokens.rule.stay, enter = tokens.rule.enter;
  const int64_t offset = segment.row * tokens.columns + segment.column;
  const Id* input = static_cast<const Id*>(tokens.input_ids) + offset;
  const Word* word_ids = tokens.word_ids == nullptr ? nullptr : static_cast<const Word*>(tokens.word_ids) + offset;
  int64_t count = chosen.count;
  for (int64_t i = 0; i < segment.count; ++i) {
    const int64_t word = word_ids == nullptr ? -1 : int64_t(word_ids[i]);
    const bool may = eligible[i] != 0 && (word_ids == nullptr || word >= 0);
    const uint64_t threshold = chain.eligible ? (chain.state ? stay : enter) : select;
    const bool same_word = word >= 0 && word == chain.word;
    const bool state = same_word ? chain.state : words[i] < threshold;
    chosen.token[count] = int32_t(4 * segment.at + i);
    chosen.offset[count] = offset + i;
    chosen.id[count] = input[i];
    count += state & may;
    chain = {state, may, word};
  }
  chosen.count = count;
  return chain;
}

template <class Id>
void mask_rows(const MaskTokens& tokens, int64_t begin, int64_t end) {
  const int64_t groups = (tokens.columns + 3) / 4;
  const uint64_t seed = uint64_t(*tokens.seed);
  alignas(kLine) uint64_t group[kGroups];
  alignas(kLine) uint32_t words[kTokens];
  alignas(kLine) uint8_t eligible[kTokens];
  Segment segments[kGroups];
  Chosen<Id> chosen;
  Chain chain{};
  for (int64_t block = begin * groups; block < end * groups; block += kGroups) {
    const int64_t block_end = end * groups - block < kGroups ? end * groups : block + kGroups;
    int64_t segment_count = 0;
    for_each_segment(block, block_end, tokens.columns, tokens.row_ids, group,
                     [&](const Segment& segment) { segments[segment_count++] = segment; });
    words_of_groups(seed, group, 0, block_end - block, words);
    chosen.count = 0;
    for (int64_t s = 0; s < segment_count; ++s) {
      const Segment& segment = segments[s];
      const int64_t offset = segment.row * tokens.columns + segment.column;
      if (segment.column == 0) chain = {false, false, -1};
      copy_segment<Id>(tokens, offset, segment.count);
      eligible_tokens<Id>(tokens, offset, segment.count, eligible);
      const uint32_t* draws = words + 4 * segment.at;
      chain = tokens.wide_words ? walk_segment<Id, int64_t>(tokens, segment, draws, eligible, chain, chosen)
                                : walk_segment<Id, int32_t>(tokens, segment, draws, eligible, chain, chosen);
    }
    replace_chosen(tokens, seed, group, chosen);
  }
}

}  // namespace

void mask_tokens(const MaskTokens& tokens, int64_t begin, int64_t end) {
  tokens.wide_ids ? mask_groups<int64_t>(tokens, begin, end) : mask_groups<int32_t>(tokens, begin, end);
}

void mask_tokens_chained(const MaskTokens& tokens, int64_t begin, int64_t end) {
  tokens.wide_ids ? mask_rows<int64_t>(tokens, begin, end) : mask_rows<int32_t>(tokens, begin, end);
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
