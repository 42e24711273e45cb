// A tile of products is read once: codes are summarised in blocks, one per lane of a group of codes, by their largest
// score. Almost always a single block, and a single code of it, can be the best with the largest e of the tile: that
// code is taken without a score in double. Otherwise the codes of a block are examined again with an e of their own, if
// its largest score + its largest e reaches L.
#include <cmath>
#include <cstring>
#include <limits>

#include "core/cpu/element.h"
#include "latent/vector_quantize.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kDepth = kCodeGroup / kCodeLanes;  // codes per block: every kCodeLanes-th of its group

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

template <class T>
void load_row(const CodeVectors& vectors, int64_t row, double* out) {
  load(static_cast<const T*>(vectors.data) + row * vectors.dim, vectors.dim, out);
}

void load_row(const CodeVectors& vectors, int64_t row, double* out) {
  with_element(vectors.element, [&](auto zero) { load_row<decltype(zero)>(vectors, row, out); });
}

void store_row(const double* row, int64_t count, Element element, void* out, int64_t at) {
  with_element(element, [&](auto zero) { store(row, count, static_cast<decltype(zero)*>(out) + at); });
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

double largest_magnitude(const double* c, int64_t dim) {
  double largest = 0;
  for (int64_t j = 0; j < dim; ++j) largest = std::fabs(c[j]) > largest ? std::fabs(c[j]) : largest;
  return largest;
}

// <x, c / |c|>, or <x, c> if c is 0.
double cosine_score(const double* x, const double* c, int64_t dim) {
  double norm = dot(c, c, dim), product = dot(x, c, dim);
  if (!is_usual(norm)) {
    const double power = power_of_two_for(largest_magnitude(c, dim));
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
      if (!is_usual(sum)) {  // extreme doubles, or zeros
        double largest = 0;
        for (int64_t j = 0; j < dim; ++j) {
          const double element = to_float(source[j]);
          largest = std::fabs(element) > largest ? std::fabs(element) : largest;
        }
        power = power_of_two_for(largest);
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

// The mean of the codes, with 0 in place of elements that are not finite.
template <class T, class A>
void mean_row(const CodeVectors& codebook, A* mean) {
  const int64_t dim = codebook.dim;
  for (int64_t j = 0; j < dim; ++j) mean[j] = 0;
  for (int64_t i = 0; i < codebook.rows; ++i) {
    const T* code = static_cast<const T*>(codebook.data) + i * dim;
#pragma omp simd
    for (int64_t j = 0; j < dim; ++j) mean[j] += A(to_float(code[j]));
  }
  for (int64_t j = 0; j < dim; ++j) {
    mean[j] /= A(codebook.rows);
    mean[j] = std::fabs(mean[j]) < kInfinity<A> ? mean[j] : A(0);
  }
}

// Largest norm among the codes of each block, and after the blocks of the tile; infinite if one is NaN.
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
  A largest = 0;
  for (int64_t b = 0; b < code_blocks(scores.codes); ++b) largest = block_norm[b] > largest ? block_norm[b] : largest;
  block_norm[code_blocks(scores.codes)] = largest;
}

// Largest score of each block.
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

// The only code of a tile whose score + e is not below the bound, or -1 if there are more or none. e: at least the
// error of any score of the row; finite, so that no score is NaN.
template <class A>
int64_t only_candidate(const CodeScores& scores, const A* products, const A* maxima, A e, A bound) {
  const int64_t blocks = code_blocks(scores.codes);
  const A* half_square = static_cast<const A*>(scores.code_half_square);
  int32_t open = 0, block = -1;
#pragma omp simd reduction(+ : open) reduction(max : block)
  for (int64_t b = 0; b < blocks; ++b) {
    const bool reaches = !(maxima[b] + e < bound);
    open += reaches;
    block = reaches && int32_t(b) > block ? int32_t(b) : block;
  }
  if (open != 1) return -1;
  const int64_t first = block / kCodeLanes * kCodeGroup + block % kCodeLanes;
  int64_t only = -1;
  for (int64_t j = first; j < first + kDepth * kCodeLanes && j < scores.codes; j += kCodeLanes) {
    const A score = half_square == nullptr ? products[j] : products[j] - half_square[j];
    if (score + e < bound) continue;
    if (only >= 0) return -1;
    only = j;
  }
  return only;
}

// products, maxima: of row i.
template <class A>
void best_code(const CodeScores& scores, const Margin<A>& margin, const A* block_norm, int64_t i, const A* products,
               const A* maxima, double* x, double* code) {
  const int64_t blocks = code_blocks(scores.codes), dim = scores.input.dim;
  const A* half_square = static_cast<const A*>(scores.code_half_square);
  const A* code_norm = static_cast<const A*>(scores.code_norm);
  const A input_norm = static_cast<const A*>(scores.input_norm)[i];
  const bool begun = scores.first_code > 0;
  A bound = begun ? static_cast<A*>(scores.bound)[i] : -kInfinity<A>;
  double best = begun ? scores.best[i] : -kInfinity<double>;
  int64_t index = begun ? scores.index[i] : -1;
  const auto score_of = [&](int64_t j) {
    load_row(scores.codebook, j, code);
    return exact_score(scores.metric, x, code, dim);
  };
  bool loaded = false;
  const auto consider = [&](int64_t j) {
    if (std::isnan(best) && j > index) return;
    if (!loaded) {
      load_row(scores.input, i, x);
      loaded = true;
      if (best == kInfinity<double>) best = score_of(index);  // the only candidate of earlier tiles
    }
    const double score = score_of(j);
    if (!ranks_before(score, j, best, index)) return;
    best = score;
    index = j;
  };

  if (input_norm != input_norm) {  // every score is NaN
    consider(scores.first_code);
  } else {
    A largest = -kInfinity<A>;
#pragma omp simd reduction(max : largest)
    for (int64_t b = 0; b < blocks; ++b) largest = maxima[b] > largest ? maxima[b] : largest;
    const A e = margin(input_norm, block_norm[blocks]);
    bound = largest - e > bound ? largest - e : bound;
    const int64_t only = !begun && e < kInfinity<A> ? only_candidate(scores, products, maxima, e, bound) : -1;
    if (only >= 0) {
      best = kInfinity<double>;
      index = only;
    } else if (!(largest + e < bound)) {
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
    const A* products = static_cast<const A*>(scores.products) + i * scores.pitch;
    block_maxima(scores, products, maxima);
    best_code(scores, margin, static_cast<const A*>(block_norm), i, products, maxima, x, code);
  }
}

// Short rows are multiplied here: a matmul of torch takes as long to start and to write and read its products as to
// multiply. The codes are packed in panels of kPanel columns, each row of a panel one element of the codes, after a row
// of the numbers that are subtracted from the products.
#if defined(__AVX512F__)
constexpr int64_t kWidth = 16, kRowsAtOnce = 4;
#else
constexpr int64_t kWidth = 8, kRowsAtOnce = 2;
#endif
typedef float Lanes __attribute__((vector_size(kWidth * sizeof(float)), may_alias));
constexpr int64_t kVectors = 4, kPanel = kVectors * kWidth;
constexpr int64_t kRowsOfBatch = 32;  // a panel stays in the L1 cache for so many rows

int64_t panels_of(int64_t codes) { return (codes + kPanel - 1) / kPanel; }

// Products of kRowsAtOnce rows, dim apart, with a panel; the largest score of each lane is raised.
void multiply_panel(const float* rows, int64_t dim, const float* panel, float* products, int64_t pitch, float* maxima,
                    int64_t blocks, int64_t lane) {
  Lanes sums[kRowsAtOnce][kVectors] = {};
  for (int64_t k = 0; k < dim; ++k) {
    const Lanes* codes = reinterpret_cast<const Lanes*>(panel + (k + 1) * kPanel);
#pragma GCC unroll 4
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const float x = rows[r * dim + k];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += codes[v] * x;
    }
  }
  const Lanes* offset = reinterpret_cast<const Lanes*>(panel);
#pragma GCC unroll 4
  for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      reinterpret_cast<Lanes*>(products + r * pitch)[v] = sums[r][v];
      auto* largest = reinterpret_cast<Lanes*>(maxima + r * blocks + (lane + v * kWidth) % kCodeLanes);
      const Lanes score = sums[r][v] - offset[v];
      *largest = score > *largest ? score : *largest;
    }
  }
}

}  // namespace

void code_tile(const CodeTile& tile, int64_t begin, int64_t end) {
  with_element(tile.source.element, [&](auto zero) { tile_rows_of<decltype(zero)>(tile, begin, end); });
}

void code_block_norms(const CodeScores& scores, void* block_norm) {
  return scores.is_double ? block_norms(scores, static_cast<double*>(block_norm))
                          : block_norms(scores, static_cast<float*>(block_norm));
}

void best_codes(const CodeScores& scores, const void* block_norm, int64_t begin, int64_t end, void* work) {
  return scores.is_double ? best_codes_of<double>(scores, block_norm, begin, end, static_cast<double*>(work))
                          : best_codes_of<float>(scores, block_norm, begin, end, static_cast<double*>(work));
}

void code_center(const CodeVectors& codebook, bool is_double, void* center) {
  with_element(codebook.element, [&](auto zero) {
    return is_double ? mean_row<decltype(zero)>(codebook, static_cast<double*>(center))
                     : mean_row<decltype(zero)>(codebook, static_cast<float*>(center));
  });
}

int64_t packed_codes_size(int64_t codes, int64_t dim) { return panels_of(codes) * (dim + 1) * kPanel; }

void pack_codes(const float* codes, const float* half_square, int64_t count, int64_t dim, float* panels) {
  for (int64_t first = 0; first < count; first += kPanel, panels += (dim + 1) * kPanel) {
    for (int64_t j = 0; j < kPanel; ++j) {
      const bool exists = first + j < count;  // padding never has the largest score
      panels[j] = !exists ? kInfinity<float> : half_square == nullptr ? 0.0f : half_square[first + j];
      for (int64_t k = 0; k < dim; ++k) panels[(k + 1) * kPanel + j] = exists ? codes[(first + j) * dim + k] : 0.0f;
    }
  }
}

int64_t multiply_work_size(int64_t codes, int64_t dim) {
  return kRowsOfBatch * (panels_of(codes) * kPanel + code_blocks(codes)) + kRowsAtOnce * dim + 4 * dim;
}

void multiply_and_find(const CodeScores& scores, const float* rows, const float* panels, const float* block_norm,
                       float* work) {
  const int64_t dim = scores.input.dim, blocks = code_blocks(scores.codes), pitch = panels_of(scores.codes) * kPanel;
  const Margin<float> margin(dim, scores.matmul_rounding, scores.metric == CodeMetric::kSquaredDistance);
  float* products = work;  // vectors of it and of maxima are aligned
  float* maxima = products + kRowsOfBatch * pitch;
  float* last = maxima + kRowsOfBatch * blocks;
  double* row_and_code = reinterpret_cast<double*>(last + kRowsAtOnce * dim);
  for (int64_t first = 0; first < scores.input.rows; first += kRowsOfBatch) {
    const int64_t left = scores.input.rows - first, count = left < kRowsOfBatch ? left : kRowsOfBatch;
    for (int64_t b = 0; b < kRowsOfBatch * blocks; ++b) maxima[b] = -kInfinity<float>;
    for (int64_t code = 0; code < scores.codes; code += kPanel) {
      const float* panel = panels + code / kPanel * (dim + 1) * kPanel;
      for (int64_t r = 0; r < count; r += kRowsAtOnce) {
        const float* x = rows + (first + r) * dim;
        if (r + kRowsAtOnce > count) {
          std::memcpy(last, x, size_t((count - r) * dim) * sizeof(float));
          x = last;
        }
        multiply_panel(x, dim, panel, products + r * pitch + code, pitch,
                       maxima + r * blocks + code / kCodeGroup * kCodeLanes, blocks, code % kCodeLanes);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      best_code(scores, margin, block_norm, first + r, products + r * pitch, maxima + r * blocks, row_and_code,
                row_and_code + dim);
    }
  }
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
  const double coefficient = difference.is_double ? *static_cast<const double*>(difference.coefficient)
                                                  : *static_cast<const float*>(difference.coefficient);
  for (int64_t i = begin; i < end; ++i) {
    load_row(difference.input, i, x);
    load_row(difference.codebook, difference.index[i], code);
#pragma omp simd
    for (int64_t j = 0; j < dim; ++j) x[j] = coefficient * (x[j] - code[j]);
    store_row(x, dim, difference.out_element, difference.out, i * dim);
  }
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
