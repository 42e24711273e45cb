// Vector quantisation on CPU and GPU: arguments of the kernels and launchers, and the comparison of codes. `stream` is
// a cudaStream_t.
//
// All arrays are contiguous except the products. A is the type of the products: double if input or codebook is double,
// else float.
//
// The assignment is exact although the matmul rounds. With s the computed score of a code (its product with the row,
// minus half its squared norm for the squared distance, or times its gain for the cosine) and e a bound of its error,
// the best code is among those with s + e >= L, where L is the largest s - e: almost always a single code. If there are
// more, they are rescored in double from the input as given, and the best is kept; ties go to the lowest index. Tiles
// of codes follow one another, so L, best and index are running values.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/cpu/isa.h"
#include "core/element.h"
#include "core/host_device.h"

namespace sslkernels {

enum class CodeMetric { kSquaredDistance, kCosine, kDot };

struct CodeVectors {
  Element element;
  const void* data;  // (rows, dim)
  int64_t rows;
  int64_t dim;
};

// The matmul operand made from `source`, and the numbers that the error of its products depends on.
struct CodeTile {
  CodeVectors source;
  bool is_double;      // A
  const void* center;  // A (dim), subtracted; null: nothing is subtracted
  bool unit;           // divided by the norm; a row of zeros is unchanged
  void* tile;          // A (rows, dim); null: not written, the source itself is multiplied
  void* norm;          // A (rows): upper bound of the norm; NaN for a row with NaN
  void* half_square;   // A (rows): half the squared norm, or null
  void* gain;          // A (rows): see gain_of; or null
};

// A tile of products of input rows with the codes [first_code, first_code + codes), and the running best of each row:
// bound, best and index are read from the second tile on.
struct CodeScores {
  bool is_double;
  CodeMetric metric;
  double matmul_rounding;  // relative to the norms of both factors, beyond the roundings of A: see Margin
  CodeVectors input;       // the rows of the tile
  CodeVectors codebook;    // all of it
  int64_t first_code;
  int64_t codes;
  const void* products;          // A (rows, codes)
  int64_t pitch;                 // elements from one row of products to the next
  const void* input_norm;        // A (rows)
  const void* code_norm;         // A (codes)
  const void* code_half_square;  // A (codes), or null for zeros
  const void* code_gain;         // A (codes), or null for ones
  void* bound;                   // A (rows): a code whose exact score is below cannot be the best
  double* best;                  // (rows): score of the best code in double; infinite if it was not computed
  int64_t* index;                // (rows): the best code
};

// Gathers codes by index; a row whose score is NaN gets NaN values.
struct CodeGather {
  CodeVectors input;
  CodeVectors codebook;
  const int64_t* index;
  const double* score;
  void* values;    // (rows, dim), in the type of the input
  void* distance;  // (rows) A: squared distance of the row to its code
  bool is_double;
};

// out = coefficient * (input - code).
struct CodeDifference {
  CodeVectors input;
  CodeVectors codebook;
  const int64_t* index;
  const void* coefficient;  // (1) A
  Element out_element;
  void* out;
  bool is_double;
};

namespace {  // one copy for each instruction set of the CPU

// e = of_row(|x|) |c| + of_code(|c|), with of_row(|x|) = product |x| and of_code(|c|) = square |c|^2 + underflow,
// infinite if the products might overflow; times the gain.
//
// Let u be the unit roundoff of A, a = x - m and b = c - m the exact operands (m the center, or 0), and a', b' the
// computed ones: |a'_j - a_j| <= u |a_j| and |b'_j - b_j| <= u |b_j|, from the subtraction or from the division by the
// norm. A matmul that adds n = dim products in any order, with or without fma, gives p with |p - <a', b'>| <= g |a'|
// |b'|, g = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, 3.5, with Cauchy-Schwarz). A
// matmul that first rounds its operands to fewer bits, or truncates its sums, adds `matmul_rounding` |a'| |b'|. Hence
//
//     |p - <a, b>|                       <= (g + matmul_rounding + 2u + u^2) |a| |b| (1 + u)^2,
//     | |b'|^2 / 2 - |b|^2 / 2 |         <= (u + u^2 / 2) |b|^2, and u |b|^2 / 2 for its rounding to A,
//     the rounding of the subtraction s  <= u (|a| |b| + |b|^2 / 2) (1 + u), and as much again for s + e or s - e.
//
// The total is less than (g + matmul_rounding + 5u) |a| |b| + 3u |b|^2, which the code below exceeds by enough to cover
// that its norms are the norms of a' and b'. A gain has one rounding of its own, and its product another: with a gain
// nothing is subtracted, so these take the place of the 2u above. Underflow takes at most `tiny`, the smallest normal
// number, from each product, sum and half square, even if subnormal numbers are flushed to zero, and then sqrt(n) tiny
// from either factor, times the norm of the other: the norms are rounded up by enough for that.
template <class A>
struct Margin {
  A product;
  A square;
  A underflow;

  Margin(int64_t dim, double matmul_rounding, bool squares) {
    const double unit = double(std::numeric_limits<A>::epsilon()) / 2;
    // In double the norms that codes are divided by also have an error of dim roundings.
    const double n = sizeof(A) == sizeof(float) ? double(dim) + 8 : 2 * double(dim) + 16;
    const double sum = n * unit < 0.25 ? n * unit / (1 - n * unit) : std::numeric_limits<double>::infinity();
    product = A(1.02 * (sum + matmul_rounding));
    square = squares ? A(4 * unit) : A(0);
    underflow = A(4 * n * double(std::numeric_limits<A>::min()));
  }

  SSLKERNELS_HD A of_row(A input_norm) const { return input_norm < kLargest ? product * input_norm : A(INFINITY); }
  SSLKERNELS_HD A of_code(A code_norm) const {
    return code_norm < kLargest ? square * code_norm * code_norm + underflow : A(INFINITY);
  }
  SSLKERNELS_HD A operator()(A input_norm, A code_norm) const {
    return of_row(input_norm) * code_norm + of_code(code_norm);
  }

 private:
  static constexpr A kLargest = sizeof(A) == sizeof(float) ? A(0x1p59) : A(0x1p507);  // the squares do not overflow
};

template <class A>
SSLKERNELS_HD A rounded_up_norm(double sum_of_squares) {
  // The rounding error of a sum of squares in double is far below 2^-20 of it. See Margin for the added constant.
  const A floor = sizeof(A) == sizeof(float) ? A(0x1p-100) : A(0x1p-500);
  return A(std::sqrt(sum_of_squares) * (1 + 0x1p-20)) + floor;
}

// 1 / |c|, which turns a product into a cosine score, and 1 for a code of zeros. If it or its error is not
// representable in A, the gain is 1 and the norm infinite, so that Margin is infinite.
template <class A>
SSLKERNELS_HD A gain_of(double sum_of_squares, A* norm) {
  const double smallest = sizeof(A) == sizeof(float) ? 0x1p-120 : 0x1p-800;
  if (sum_of_squares > smallest && sum_of_squares < 1 / smallest) return A(1 / std::sqrt(sum_of_squares));
  if (sum_of_squares != 0) *norm = A(INFINITY);
  return A(1);
}

// Whether a sum of squares in double lost nothing to overflow or underflow.
SSLKERNELS_HD bool is_usual(double sum_of_squares) { return sum_of_squares > 0x1p-900 && sum_of_squares < 0x1p900; }

// A power of two that brings the largest element near 1, so that squares neither overflow nor underflow.
SSLKERNELS_HD double power_of_two_for(double largest) {
  if (!(largest > 0) || !(largest < double(INFINITY))) return 1;
  int exponent;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
}

// NaN ranks first, as in torch.argmin; ties go to the lowest index. An index of -1 means no code yet.
SSLKERNELS_HD bool ranks_before(double score, int64_t index, double best, int64_t best_index) {
  const bool earlier = index < best_index;
  if (best_index < 0) return true;
  if (best != best) return score != score && earlier;
  return score != score || score > best || (score == best && earlier);
}

constexpr int64_t kCodeGroup = 1024;  // codes that are summarised together, in kCodeLanes blocks
constexpr int64_t kCodeLanes = 32;    // blocks per group

inline int64_t code_blocks(int64_t codes) { return (codes + kCodeGroup - 1) / kCodeGroup * kCodeLanes; }

}  // namespace

SSLKERNELS_CPU_KERNELS(void code_tile(const CodeTile& tile, int64_t begin, int64_t end);
                       void code_center(const CodeVectors& codebook, bool is_double, void* center);
                       void code_block_norms(const CodeScores& scores, void* block_norm);
                       void best_codes(const CodeScores& scores, const void* block_norm, int64_t begin, int64_t end,
                                       void* work);
                       int64_t packed_codes_size(int64_t codes, int64_t dim);
                       void pack_codes(const float* codes, const float* half_square, int64_t count, int64_t dim,
                                       float* panels);
                       int64_t multiply_work_size(int64_t codes, int64_t dim);
                       void multiply_and_find(const CodeScores& scores, const float* rows, const float* panels,
                                              const float* block_norm, float* work);
                       void gather_codes(const CodeGather& gather, int64_t begin, int64_t end, void* work);
                       void code_difference(const CodeDifference& difference, int64_t begin, int64_t end, void* work);)

// Does not support `unit`: a cosine is scored with a gain.
void launch_code_tile(const CodeTile& tile, void* stream);

// Rows of products, and arrays of per-code numbers, must start at multiples of 16 bytes; the last 16 bytes of the
// latter are read whole.
void launch_best_codes(const CodeScores& scores, void* stream);

void launch_gather_codes(const CodeGather& gather, void* stream);
void launch_code_difference(const CodeDifference& difference, void* stream);

}  // namespace sslkernels
