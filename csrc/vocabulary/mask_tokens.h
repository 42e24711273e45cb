// Masking of tokens: arguments of the kernels, and the choice of a random id. `stream` is a cudaStream_t.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/host_device.h"

namespace sslkernels {

// Thresholds are probabilities times 2^32, compared with 32-bit words.
struct MaskRule {
  uint64_t select;     // a unit is chosen at the start of a row
  uint64_t stay;       // ... after a chosen unit
  uint64_t enter;      // ... after one that is not chosen
  uint64_t to_mask;    // the action is mask_id
  uint64_t to_random;  // ... or a random id, if not mask_id
  int64_t mask_id;
  int64_t allowed;  // number of ids that a random id may take
  int64_t ignore_index;
  const int64_t* ranges;  // special ids: range_count pairs (start, end), sorted, disjoint, none across 0
  int64_t range_count;
};

// All arrays are contiguous (rows, columns); null: absent.
struct MaskTokens {
  const void* input_ids;
  bool wide_ids;  // int64 ids and labels, else int32
  const uint8_t* special_mask;
  const void* word_ids;
  bool wide_words;
  const int64_t* row_ids;  // (rows)
  const int64_t* seed;
  int64_t rows;
  int64_t columns;
  void* output_ids;
  void* labels;
  bool chained;  // units depend on their predecessor (words, spans): a row is processed from left to right
  MaskRule rule;
};

namespace {  // one copy for each instruction set of the CPU

// Uniform over the ids of the vocabulary that are not special: skips the special ids below the result.
SSLKERNELS_HD int64_t random_id(const MaskRule& rule, uint32_t word) {
  int64_t id = int64_t((uint64_t(word) * uint64_t(rule.allowed)) >> 32);
  for (int64_t r = 0; r < rule.range_count; ++r) {
    const int64_t start = rule.ranges[2 * r], end = rule.ranges[2 * r + 1];
    id += start >= 0 && id >= start ? end - start : 0;
  }
  return id;
}

}  // namespace

// mask_tokens: groups of four columns [begin, end), numbered through all rows; mask_tokens_chained: whole rows.
SSLKERNELS_CPU_KERNELS(void mask_tokens(const MaskTokens& tokens, int64_t begin, int64_t end);
                       void mask_tokens_chained(const MaskTokens& tokens, int64_t begin, int64_t end);)

// Ranges of special ids that fit in the kernel parameters.
constexpr int kInlineRanges = 64;

// tokens.rule.ranges is host memory, read before this returns. If there are more than kInlineRanges, `device_ranges` is
// device memory for as many: it is filled from kernel parameters, so that no copy from host memory is pending on
// return, nothing waits, and a captured graph holds the list.
void launch_mask_tokens(const MaskTokens& tokens, int64_t* device_ranges, void* stream);

}  // namespace sslkernels
