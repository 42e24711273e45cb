// Corruption of spans: arguments of the kernel, and the draw that ends a span.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/host_device.h"

namespace sslkernels {

// All arrays are contiguous. A row of `columns` tokens becomes one of columns - noise + spans of input and one of
// noise + spans of labels, each with one more where there is an end.
struct CorruptSpans {
  const void* input_ids;     // (rows, columns)
  bool wide_ids;             // int64 ids, else int32
  const int64_t* sentinels;  // (spans)
  const int64_t* row_ids;    // (rows); null: row i has id i
  const int64_t* seed;
  int64_t rows;
  int64_t columns;
  int64_t noise;  // tokens that are taken out of each row
  int64_t spans;
  bool has_eos;
  int64_t eos_id;
  void* output_ids;
  void* labels;

  int64_t output_columns() const { return columns - noise + spans + has_eos; }
  int64_t label_columns() const { return noise + spans + has_eos; }
};

namespace {  // one copy for each instruction set of the CPU

// Whether a span ends after a token, where `left` more tokens of its kind hold `cuts` more ends: each of the left
// places is as likely to be one of the cuts (Knuth's algorithm S), and the last span ends with the last token.
inline bool span_ends(uint32_t word, int64_t left, int64_t cuts) {
  return left == 0 || int64_t((uint64_t(word) * uint64_t(left)) >> 32) < cuts;
}

}  // namespace

// Rows [begin, end).
SSLKERNELS_CPU_KERNELS(void corrupt_spans(const CorruptSpans& spans, int64_t begin, int64_t end);)

}  // namespace sslkernels
