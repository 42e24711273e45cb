// The code of each row of an input, from tiles of products of the rows with the codes of a codebook, on the CPU.
//
// All arrays are contiguous. A is the type of the products: double where input or codebook are of double, else float.
#pragma once

#include <cstdint>

#include "../common/element.h"
#include "isa.h"

namespace sslkernels {

enum class CodeMetric { kSquaredDistance, kCosine, kDot };

struct CodeVectors {
  Element element;
  const void* data;  // (rows, dim)
  int64_t rows;
  int64_t dim;
};

// What a matmul multiplies in place of `source`, and what the error of its products depends on.
struct CodeTile {
  CodeVectors source;
  bool is_double;      // A
  const void* center;  // A (dim), subtracted; null: nothing is
  bool unit;           // divided by the norm; a row of zeros stays
  void* tile;          // A (rows, dim), or null: not written, the source itself is multiplied
  void* norm;          // A (rows): at least the norm; that of a row that holds NaN is NaN
  void* half_square;   // A (rows): half the squared norm, or null
};

// A tile of products of input rows with the codes [first_code, first_code + codes), and the best so far of each row.
struct CodeScores {
  bool is_double;
  CodeMetric metric;
  double matmul_rounding;  // relative to the norms of both factors, beyond the roundings of A: see Margin
  CodeVectors input;       // the rows of the tile
  CodeVectors codebook;    // all of it
  int64_t first_code;
  int64_t codes;
  const void* products;          // A (rows, codes)
  const void* input_norm;        // A (rows)
  const void* code_norm;         // A (codes)
  const void* code_half_square;  // A (codes), or null for zeros
  void* bound;                   // A (rows): no code whose exact score is below is the best
  double* best;                  // (rows): the score of the best code, in double
  int64_t* index;                // (rows): it; -1 before the first tile
};

// Codes by their index; a row whose score is NaN has NaN values.
struct CodeGather {
  CodeVectors input;
  CodeVectors codebook;
  const int64_t* index;
  const double* score;
  void* values;    // (rows, dim) of the input's element
  void* distance;  // (rows) float, double where input or codebook are: the squared distance of the row to its code
  bool is_double;
};

// out = addend + coefficient * (input - code).
struct CodeDifference {
  CodeVectors input;
  CodeVectors codebook;
  const int64_t* index;
  const void* coefficient;  // (rows) float, or double where input or codebook are
  Element out_element;
  void* out;
  bool is_double;
};

constexpr int64_t kCodeGroup = 1024;  // codes that are summarised together: of code_blocks
constexpr int64_t kCodeLanes = 32;    // blocks of a group

inline int64_t code_blocks(int64_t codes) { return (codes + kCodeGroup - 1) / kCodeGroup * kCodeLanes; }

#define SSLKERNELS_DECLARE(isa)                                                                              \
  namespace isa {                                                                                            \
  void code_tile(const CodeTile& tile, int64_t begin, int64_t end);                                          \
  void code_block_norms(const CodeScores& scores, void* block_norm);                                         \
  void best_codes(const CodeScores& scores, const void* block_norm, int64_t begin, int64_t end, void* work); \
  void gather_codes(const CodeGather& gather, int64_t begin, int64_t end, void* work);                       \
  void code_difference(const CodeDifference& difference, int64_t begin, int64_t end, void* work);            \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
