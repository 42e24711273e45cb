// Vector quantisation on host and device: what the kernels are told, and what decides between codes.
//
// All arrays are contiguous but for the products. A is the type of the products: double where input or codebook are of
// double, else float.
//
// The assignment is exact behind a matmul that rounds. With s the computed score of a code (its product with the row,
// less half its squared norm for the squared distance, or times its gain for the cosine) and e a bound of its error,
// the best code is among those with s + e >= L, where L is the largest s - e: almost always one code. Where there are
// more they are scored again in double, from the input as it is given; the best of them is kept, of equals the lowest
// index. Tiles of codes follow each other, so that L, best and index run on.
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

// What a matmul multiplies in place of `source`, and what the error of its products depends on.
struct CodeTile {
  CodeVectors source;
  bool is_double;      // A
  const void* center;  // A (dim), subtracted; null: nothing is
  bool unit;           // divided by the norm; a row of zeros stays
  void* tile;          // A (rows, dim), or null: not written, the source itself is multiplied
  void* norm;          // A (rows): at least the norm; that of a row that holds NaN is NaN
  void* half_square;   // A (rows): half the squared norm, or null
  void* gain;          // A (rows): see gain_of; or null
};

// A tile of products of input rows with the codes [first_code, first_code + codes), and the best so far of each row:
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
  void* bound;                   // A (rows): no code whose exact score is below is the best
  double* best;                  // (rows): the score of the best code, in double, or infinite: it was not computed
  int64_t* index;                // (rows): it
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

// out = coefficient * (input - code).
struct CodeDifference {
  CodeVectors input;
  CodeVectors codebook;
  const int64_t* index;
  const void* coefficient;  // (rows) float, or double where input or codebook are
  Element out_element;
  void* out;
  bool is_double;
};

namespace {  // one copy for each instruction set of the CPU

// e = of_row(|x|) |c| + of_code(|c|), with of_row(|x|) = product |x| and of_code(|c|) = square |c|^2 + underflow,
// infinite where the products might overflow; times the gain.
//
// Let u be the unit roundoff of A, a = x - m and b = c - m what is to be multiplied (m the center, or 0), and a', b'
// what is: |a'_j - a_j| <= u |a_j|, and |b'_j - b_j| <= u |b_j|, of the subtraction or of the division by the norm. A
// matmul that adds n = dim products in any order, with or without fma, gives p with |p - <a', b'>| <= g |a'| |b'|, g =
// n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, 3.5, with Cauchy-Schwarz). One that first
// rounds its operands to fewer bits, or cuts its sums, adds `matmul_rounding` |a'| |b'|. Hence
//     |p - <a, b>|                       <= (g + matmul_rounding + 2u + u^2) |a| |b| (1 + u)^2,
//     | |b'|^2 / 2 - |b|^2 / 2 |         <= (u + u^2 / 2) |b|^2, and u |b|^2 / 2 for its rounding to A,
//     the rounding of the subtraction s  <= u (|a| |b| + |b|^2 / 2) (1 + u), and as much again for s + e or s - e.
// That is less than (g + matmul_rounding + 5u) |a| |b| + 3u |b|^2, which what follows exceeds by enough for the norms
// being those of a' and b'. A gain has one rounding of its own, and its product another: where there is one nothing is
// subtracted, so that they take the place of the 2u above. Underflow takes at most `tiny`, the smallest normal number,
// from each product, sum and half square, even where subnormal numbers are flushed to zero, and then sqrt(n) tiny from
// either factor, times the norm of the other: the norms are rounded up by enough for that.
template <class A>
struct Margin {
  A product;
  A square;
  A underflow;

  Margin(int64_t dim, double matmul_rounding, bool squares) {
    const double unit = double(std::numeric_limits<A>::epsilon()) / 2;
    // In double the norms that codes are divided by have an error of dim roundings, too.
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
  static constexpr A kLargest = sizeof(A) == sizeof(float) ? A(0x1p59) : A(0x1p507);  // the squares have room
};

template <class A>
SSLKERNELS_HD A rounded_up_norm(double sum_of_squares) {
  // The roundings of a sum of squares in double are far below 2^-20 of it. See Margin for what is added.
  const A floor = sizeof(A) == sizeof(float) ? A(0x1p-100) : A(0x1p-500);
  return A(std::sqrt(sum_of_squares) * (1 + 0x1p-20)) + floor;
}

// 1 / |c|, which makes a product a cosine score, and 1 for a code of zeros. Where it or its error would leave the
// numbers of A it is 1, and the norm is infinite, so that Margin is.
template <class A>
SSLKERNELS_HD A gain_of(double sum_of_squares, A* norm) {
  const double smallest = sizeof(A) == sizeof(float) ? 0x1p-120 : 0x1p-800;
  if (sum_of_squares > smallest && sum_of_squares < 1 / smallest) return A(1 / std::sqrt(sum_of_squares));
  if (sum_of_squares != 0) *norm = A(INFINITY);
  return A(1);
}

// Whether a sum of squares in double has lost nothing to overflow or underflow.
SSLKERNELS_HD bool is_usual(double sum_of_squares) { return sum_of_squares > 0x1p-900 && sum_of_squares < 0x1p900; }

// A power of two that brings the largest element near 1, so that squares neither overflow nor vanish.
SSLKERNELS_HD double power_of_two_for(double largest) {
  if (!(largest > 0) || !(largest < double(INFINITY))) return 1;
  int exponent;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
}

// NaN ranks before everything, as in torch.argmin; of equals the lowest index. An index of -1 is none.
SSLKERNELS_HD bool ranks_before(double score, int64_t index, double best, int64_t best_index) {
  const bool earlier = index < best_index;
  if (best_index < 0) return true;
  if (best != best) return score != score && earlier;
  return score != score || score > best || (score == best && earlier);
}

}  // namespace

constexpr int64_t kCodeGroup = 1024;  // codes that are summarised together: of code_blocks
constexpr int64_t kCodeLanes = 32;    // blocks of a group

inline int64_t code_blocks(int64_t codes) { return (codes + kCodeGroup - 1) / kCodeGroup * kCodeLanes; }

SSLKERNELS_CPU_KERNELS(void code_tile(const CodeTile& tile, int64_t begin, int64_t end);
                       void code_block_norms(const CodeScores& scores, void* block_norm);
                       void best_codes(const CodeScores& scores, const void* block_norm, int64_t begin, int64_t end,
                                       void* work);
                       void gather_codes(const CodeGather& gather, int64_t begin, int64_t end, void* work);
                       void code_difference(const CodeDifference& difference, int64_t begin, int64_t end, void* work);)

// A unit tile is not made here: the scores of a cosine have a gain.
void launch_code_tile(const CodeTile& tile, void* stream);

// Rows of products start at multiples of 16 bytes, and so do the arrays of numbers of codes, whose last 16 bytes are
// read whole.
void launch_best_codes(const CodeScores& scores, void* stream);

void launch_gather_codes(const CodeGather& gather, void* stream);
void launch_code_difference(const CodeDifference& difference, void* stream);

}  // namespace sslkernels
