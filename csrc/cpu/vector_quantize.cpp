// Exact assignment of codes behind a matmul that rounds.
//
// With s the computed score of a code (its product with the row, less half its squared norm for the squared distance)
// and e a bound of its error, the best code is among those with s + e >= L, where L is the largest s - e: almost always
// one code, for which s is compared once. These candidates are scored again in double, from the input as it is given;
// the best of them is kept, of equals the lowest index. Tiles of codes follow each other, so that L, best and index run
// on.
//
// A tile is read once: codes are summarised in blocks, each a lane of a group of codes, by their largest score; the
// codes of a block are looked at again only if its largest score + its largest e reaches L.
#include "vector_quantize.h"

#include <cmath>
#include <limits>

#include "element.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kDepth = kCodeGroup / kCodeLanes;  // codes of a block: every kCodeLanes-th of its group

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// e = product |x| |c| + square |c|^2 + underflow, infinite where the products might overflow.
//
// Let u be the unit roundoff of A, a = x - m and b = c - m what is to be multiplied (m the center, or 0), and a', b'
// what is: |a'_j - a_j| <= u |a_j|, and |b'_j - b_j| <= u |b_j|, of the subtraction or of the division by the norm. A
// matmul that adds n = dim products in any order, with or without fma, gives p with |p - <a', b'>| <= g |a'| |b'|, g =
// n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, 3.5, with Cauchy-Schwarz). One that first
// rounds its operands to fewer bits, as torch's may be allowed to, adds `matmul_rounding` |a'| |b'|. Hence
//     |p - <a, b>|                       <= (g + matmul_rounding + 2u + u^2) |a| |b| (1 + u)^2,
//     | |b'|^2 / 2 - |b|^2 / 2 |         <= (u + u^2 / 2) |b|^2, and u |b|^2 / 2 for its rounding to A,
//     the rounding of the subtraction s  <= u (|a| |b| + |b|^2 / 2) (1 + u), and as much again for s + e or s - e.
// That is less than (g + matmul_rounding + 5u) |a| |b| + 3u |b|^2, which what follows exceeds by enough for the norms
// being those of a' and b'. Underflow takes at most `tiny`, the smallest normal number, from each product, sum and
// half square, even where subnormal numbers are flushed to zero, and then sqrt(n) tiny from either factor, times the
// norm of the other: the norms are rounded up by enough for that.
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

  A operator()(A input_norm, A code_norm) const {
    const A scale = input_norm * code_norm + code_norm * code_norm;
    const A error = product * input_norm * code_norm + square * code_norm * code_norm + underflow;
    return scale < kLargest ? error : kInfinity<A>;
  }

 private:
  static constexpr A kLargest = std::numeric_limits<A>::max() / 256;  // no partial sum of products is larger
};

template <class A>
A rounded_up_norm(double sum_of_squares) {
  // The roundings of a sum of squares in double are far below 2^-20 of it. See Margin for what is added.
  const A floor = sizeof(A) == sizeof(float) ? A(0x1p-100) : A(0x1p-500);
  return A(std::sqrt(sum_of_squares) * (1 + 0x1p-20)) + floor;
}

template <class T>
void load_row(const CodeVectors& vectors, int64_t row, double* out) {
  load(static_cast<const T*>(vectors.data) + row * vectors.dim, vectors.dim, out);
}

void load_row(const CodeVectors& vectors, int64_t row, double* out) {
  switch (vectors.element) {
    case Element::kFloat:
      return load_row<float>(vectors, row, out);
    case Element::kDouble:
      return load_row<double>(vectors, row, out);
    case Element::kBFloat16:
      return load_row<BFloat16>(vectors, row, out);
    case Element::kHalf:
      return load_row<Half>(vectors, row, out);
  }
}

void store_row(const double* row, int64_t count, Element element, void* out, int64_t at) {
  switch (element) {
    case Element::kFloat:
      return store(row, count, static_cast<float*>(out) + at);
    case Element::kDouble:
      return store(row, count, static_cast<double*>(out) + at);
    case Element::kBFloat16:
      return store(row, count, static_cast<BFloat16*>(out) + at);
    case Element::kHalf:
      return store(row, count, static_cast<Half*>(out) + at);
  }
}

double squared_distance(const double* x, const double* c, int64_t dim) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < dim; ++j) sum += (x[j] - c[j]) * (x[j] - c[j]);
  return sum;
}

double dot(const double* x, const double* c, int64_t dim) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < dim; ++j) sum += x[j] * c[j];
  return sum;
}

// A power of two that brings the largest element near 1, so that squares neither overflow nor vanish.
double power_of_two_for(const double* c, int64_t dim) {
  double largest = 0;
  for (int64_t j = 0; j < dim; ++j) largest = std::fabs(c[j]) > largest ? std::fabs(c[j]) : largest;
  if (!(largest > 0) || !std::isfinite(largest)) return 1;
  int exponent;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
}

// <x, c / |c|>, and <x, c> where c is 0.
double cosine_score(const double* x, const double* c, int64_t dim) {
  double norm = dot(c, c, dim), product = dot(x, c, dim);
  if (!(norm > 0x1p-900 && norm < 0x1p900)) {
    const double power = power_of_two_for(c, dim);
    norm = product = 0;
#pragma omp simd reduction(+ : norm, product)
    for (int64_t j = 0; j < dim; ++j) {
      const double scaled = c[j] * power;
      norm += scaled * scaled;
      product += x[j] * scaled;
    }
  }
  return norm == 0 ? product : product / std::sqrt(norm);
}

double exact_score(CodeMetric metric, const double* x, const double* c, int64_t dim) {
  switch (metric) {
    case CodeMetric::kSquaredDistance:
      return -squared_distance(x, c, dim);
    case CodeMetric::kCosine:
      return cosine_score(x, c, dim);
    default:
      return dot(x, c, dim);
  }
}

// NaN ranks before everything, as in torch.argmin; of equals the lowest index.
bool ranks_before(double score, int64_t index, double best, int64_t best_index) {
  const bool earlier = index < best_index;
  if (best_index < 0) return true;
  if (std::isnan(best)) return std::isnan(score) && earlier;
  return std::isnan(score) || score > best || (score == best && earlier);
}

template <class T, class A>
void tile_rows(const CodeTile& tile, int64_t begin, int64_t end) {
  const int64_t dim = tile.source.dim;
  const A* center = static_cast<const A*>(tile.center);
  for (int64_t i = begin; i < end; ++i) {
    const T* source = static_cast<const T*>(tile.source.data) + i * dim;
    A* out = tile.tile == nullptr ? nullptr : static_cast<A*>(tile.tile) + i * dim;
    double sum = 0;
    if (tile.unit) {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < dim; ++j) sum += double(to_float(source[j])) * double(to_float(source[j]));
      double power = 1;
      if (!(sum > 0x1p-900 && sum < 0x1p900)) {  // of doubles, or of zeros
        double largest = 0;
        for (int64_t j = 0; j < dim; ++j) {
          const double element = to_float(source[j]);
          largest = std::fabs(element) > largest ? std::fabs(element) : largest;
        }
        power = power_of_two_for(&largest, 1);
        sum = 0;
        for (int64_t j = 0; j < dim; ++j)
          sum += double(to_float(source[j])) * power * (double(to_float(source[j])) * power);
      }
      const double inverse = sum == 0 ? 1 : 1 / std::sqrt(sum);
#pragma omp simd
      for (int64_t j = 0; j < dim; ++j) out[j] = A(double(to_float(source[j])) * power * inverse);
      sum = sum == sum && sum < kInfinity<double> ? 1 : sum;
    } else if (out == nullptr) {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < dim; ++j) sum += double(to_float(source[j])) * double(to_float(source[j]));
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < dim; ++j) {
        const A element = A(to_float(source[j])) - (center == nullptr ? A(0) : center[j]);
        out[j] = element;
        sum += double(element) * double(element);
      }
    }
    static_cast<A*>(tile.norm)[i] = rounded_up_norm<A>(sum);
    if (tile.half_square != nullptr) static_cast<A*>(tile.half_square)[i] = A(sum / 2);
  }
}

template <class T>
void tile_rows_of(const CodeTile& tile, int64_t begin, int64_t end) {
  return tile.is_double ? tile_rows<T, double>(tile, begin, end) : tile_rows<T, float>(tile, begin, end);
}

// The largest norm of the codes of each block; infinite where one is NaN.
template <class A>
void block_norms(const CodeScores& scores, A* block_norm) {
  const A* norm = static_cast<const A*>(scores.code_norm);
  for (int64_t b = 0; b < code_blocks(scores.codes); ++b) block_norm[b] = 0;
  for (int64_t first = 0; first < scores.codes; first += kCodeLanes) {
    const int64_t lanes = scores.codes - first < kCodeLanes ? scores.codes - first : kCodeLanes;
    A* largest = block_norm + first / kCodeGroup * kCodeLanes;
#pragma omp simd
    for (int64_t l = 0; l < lanes; ++l) {
      const A known = norm[first + l] == norm[first + l] ? norm[first + l] : kInfinity<A>;
      largest[l] = known > largest[l] ? known : largest[l];
    }
  }
}

// The largest score of each block.
template <class A>
void block_maxima(const CodeScores& scores, const A* products, A* maxima) {
  const A* half_square = static_cast<const A*>(scores.code_half_square);
  for (int64_t group = 0; group * kCodeGroup < scores.codes; ++group) {
    A largest[kCodeLanes];
    for (int64_t l = 0; l < kCodeLanes; ++l) largest[l] = -kInfinity<A>;
    const int64_t first = group * kCodeGroup;
    const int64_t count = scores.codes - first < kCodeGroup ? scores.codes - first : kCodeGroup;
    const auto add = [&](int64_t at, int64_t lanes) __attribute__((always_inline)) {
      if (half_square == nullptr) {
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) {
          const A score = products[at + l];
          largest[l] = score > largest[l] ? score : largest[l];
        }
      } else {
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) {
          const A score = products[at + l] - half_square[at + l];
          largest[l] = score > largest[l] ? score : largest[l];
        }
      }
    };
    int64_t depth = 0;
    for (; (depth + 1) * kCodeLanes <= count; ++depth) add(first + depth * kCodeLanes, kCodeLanes);
    add(first + depth * kCodeLanes, count - depth * kCodeLanes);
    for (int64_t l = 0; l < kCodeLanes; ++l) maxima[group * kCodeLanes + l] = largest[l];
  }
}

template <class A>
void best_code(const CodeScores& scores, const Margin<A>& margin, const A* block_norm, int64_t i, A* maxima, double* x,
               double* code) {
  const int64_t blocks = code_blocks(scores.codes), dim = scores.input.dim;
  const A* products = static_cast<const A*>(scores.products) + i * scores.codes;
  const A* half_square = static_cast<const A*>(scores.code_half_square);
  const A* code_norm = static_cast<const A*>(scores.code_norm);
  const A input_norm = static_cast<const A*>(scores.input_norm)[i];
  A bound = static_cast<A*>(scores.bound)[i];
  double best = scores.best[i];
  int64_t index = scores.index[i];
  load_row(scores.input, i, x);
  const auto consider = [&](int64_t j) {
    if (std::isnan(best) && j > index) return;
    load_row(scores.codebook, j, code);
    const double score = exact_score(scores.metric, x, code, dim);
    if (!ranks_before(score, j, best, index)) return;
    best = score;
    index = j;
  };

  if (input_norm != input_norm) {  // every score is NaN
    consider(scores.first_code);
  } else {
    block_maxima(scores, products, maxima);
#pragma omp simd reduction(max : bound)
    for (int64_t b = 0; b < blocks; ++b) {
      const A lower = maxima[b] - margin(input_norm, block_norm[b]);
      bound = lower > bound ? lower : bound;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      if (maxima[b] + margin(input_norm, block_norm[b]) < bound) continue;
      const int64_t first = b / kCodeLanes * kCodeGroup + b % kCodeLanes;
      for (int64_t j = first; j < first + kDepth * kCodeLanes && j < scores.codes; j += kCodeLanes) {
        const A score = half_square == nullptr ? products[j] : products[j] - half_square[j];
        if (!(score + margin(input_norm, code_norm[j]) < bound)) consider(scores.first_code + j);
      }
    }
  }
  static_cast<A*>(scores.bound)[i] = bound;
  scores.best[i] = best;
  scores.index[i] = index;
}

template <class A>
void best_codes_of(const CodeScores& scores, const void* block_norm, int64_t begin, int64_t end, double* work) {
  const Margin<A> margin(scores.input.dim, scores.matmul_rounding, scores.metric == CodeMetric::kSquaredDistance);
  double* x = work;
  double* code = x + scores.input.dim;
  A* maxima = reinterpret_cast<A*>(code + scores.input.dim);
  for (int64_t i = begin; i < end; ++i) {
    best_code(scores, margin, static_cast<const A*>(block_norm), i, maxima, x, code);
  }
}

}  // namespace

void code_tile(const CodeTile& tile, int64_t begin, int64_t end) {
  switch (tile.source.element) {
    case Element::kFloat:
      return tile_rows_of<float>(tile, begin, end);
    case Element::kDouble:
      return tile_rows_of<double>(tile, begin, end);
    case Element::kBFloat16:
      return tile_rows_of<BFloat16>(tile, begin, end);
    case Element::kHalf:
      return tile_rows_of<Half>(tile, begin, end);
  }
}

void code_block_norms(const CodeScores& scores, void* block_norm) {
  return scores.is_double ? block_norms(scores, static_cast<double*>(block_norm))
                          : block_norms(scores, static_cast<float*>(block_norm));
}

void best_codes(const CodeScores& scores, const void* block_norm, int64_t begin, int64_t end, void* work) {
  return scores.is_double ? best_codes_of<double>(scores, block_norm, begin, end, static_cast<double*>(work))
                          : best_codes_of<float>(scores, block_norm, begin, end, static_cast<double*>(work));
}

void gather_codes(const CodeGather& gather, int64_t begin, int64_t end, void* work) {
  const int64_t dim = gather.input.dim;
  double* x = static_cast<double*>(work);
  double* code = x + dim;
  for (int64_t i = begin; i < end; ++i) {
    const bool is_nan = std::isnan(gather.score[i]);
    load_row(gather.input, i, x);
    load_row(gather.codebook, gather.index[i], code);
    double distance = squared_distance(x, code, dim);
    if (is_nan) {
      distance = std::numeric_limits<double>::quiet_NaN();
      for (int64_t j = 0; j < dim; ++j) code[j] = distance;
    }
    store_row(code, dim, gather.input.element, gather.values, i * dim);
    store_row(&distance, 1, gather.is_double ? Element::kDouble : Element::kFloat, gather.distance, i);
  }
}

void code_difference(const CodeDifference& difference, int64_t begin, int64_t end, void* work) {
  const int64_t dim = difference.input.dim;
  double* x = static_cast<double*>(work);
  double* code = x + dim;
  for (int64_t i = begin; i < end; ++i) {
    const double coefficient = difference.is_double ? static_cast<const double*>(difference.coefficient)[i]
                                                    : static_cast<const float*>(difference.coefficient)[i];
    load_row(difference.input, i, x);
    load_row(difference.codebook, difference.index[i], code);
#pragma omp simd
    for (int64_t j = 0; j < dim; ++j) x[j] = coefficient * (x[j] - code[j]);
    store_row(x, dim, difference.out_element, difference.out, i * dim);
  }
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
