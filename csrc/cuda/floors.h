// What each kernel must do at least, however it is written: bytes of device memory, every input read once and every
// output written once, and floating-point operations. Benchmarks compare with it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sslkernels {

struct Floor {
  int64_t bytes;
  int64_t flops;
};

// Of a row: the target and four results; of a group of four columns: one Philox call, integers alone.
constexpr int64_t kRowState = 8 + 4 * 4;

// The logits of the valid rows are read; the gradient of all rows is written, of ignored ones as zeros. A logit takes a
// comparison, a subtraction, an exponential (2) and an addition; its gradient the exponential again and two more.
inline Floor cross_entropy_rows_fwd_floor(int64_t valid, int64_t rows, int64_t vocab, int64_t element_bytes,
                                          bool gradient) {
  const int64_t written = gradient ? rows : 0;
  return {(valid + written) * vocab * element_bytes + rows * kRowState, valid * vocab * (5 + (gradient ? 5 : 0))};
}

inline Floor cross_entropy_rows_bwd_floor(int64_t valid, int64_t rows, int64_t vocab, int64_t element_bytes) {
  return {(valid + rows) * vocab * element_bytes + rows * kRowState, valid * vocab * 5};
}

inline Floor column_sums_floor(int64_t rows, int64_t columns, int64_t element_bytes) {
  return {rows * columns * element_bytes + columns * 4, rows * columns};
}

inline Floor scale_add_floor(int64_t count, int64_t input_bytes, int64_t out_bytes, bool add) {
  return {count * (input_bytes + out_bytes * (add ? 2 : 1)), count * (add ? 2 : 1)};
}

// Of a row: the query, its gradient in float32, and the reference, coefficient, value and two gradients; of a negative
// its score stays inside. A product and its sum (2), those of the norm (2), of the query's gradient (2), and the
// negative's gradient (3).
inline Floor own_negatives_floor(int64_t rows, int64_t count, int64_t dim, int64_t element_bytes, bool normalise,
                                 bool gradient) {
  const int64_t elements = rows * count * dim;
  return {elements * element_bytes * (gradient ? 2 : 1) + rows * dim * (element_bytes + (gradient ? 4 : 0)) +
              rows * 4 * (gradient ? 5 : 2),
          elements * ((normalise ? 4 : 2) + (gradient ? 5 : 0))};
}

// Written once. A normal takes about 23 floating-point operations, and half a Philox call.
inline Floor random_stream_floor(int64_t rows, int64_t columns, int64_t element_bytes) {
  return {rows * columns * element_bytes, 0};
}

// mean and logvar read once, the samples written, and a divergence a row in float32. The noise of an element takes
// about 23 floating-point operations, its scale 8, z 2; the divergence 24.
inline Floor gaussian_fwd_floor(int64_t rows, int64_t columns, int64_t samples, int64_t element_bytes) {
  const int64_t elements = rows * columns;
  return {elements * (2 + samples) * element_bytes + rows * 4, elements * (25 * samples + 32)};
}

// The gradients of the samples, mean and logvar read, two gradients written; the noise is made again.
inline Floor gaussian_bwd_floor(int64_t rows, int64_t columns, int64_t samples, int64_t element_bytes) {
  const int64_t elements = rows * columns;
  return {elements * (4 + samples) * element_bytes + rows * 4, elements * (26 * samples + 36)};
}

// Logits read; y written where there is one; of a row its state and, without y, its index. A logit takes the noise, an
// addition, a comparison and, for the sum, an exponential (2) and two more; with statistics as much without noise.
inline Floor gumbel_rows_fwd_floor(int64_t rows, int64_t columns, int64_t element_bytes, bool output, bool stats) {
  const int64_t of_row = 8 + (output ? 0 : 8) + (stats ? 16 : 0);
  return {rows * columns * element_bytes * (output ? 2 : 1) + rows * of_row, rows * columns * (6 + (stats ? 5 : 0))};
}

// Logits and the gradient of y read, that of the logits written, and the state read. An element takes the noise again,
// the exponential and its scale (5), a product and its sum (2), and the gradient (3); that of the probabilities as
// much.
inline Floor gumbel_rows_bwd_floor(int64_t rows, int64_t columns, int64_t element_bytes, int64_t grad_bytes,
                                   bool probabilities) {
  return {rows * columns * (2 * element_bytes + grad_bytes) + rows * (probabilities ? 16 : 8),
          rows * columns * (probabilities ? 20 : 10)};
}

// Logits and state read; the sums are small.
inline Floor probability_sums_floor(int64_t rows, int64_t columns, int64_t element_bytes) {
  return {rows * columns * element_bytes + rows * 8, rows * columns * 5};
}

// Products and a row id read; of a row its state of four numbers and an index written and, of a later tile, read. A
// product takes its place in a logit (2), a comparison, a difference, an exponential (2) and a sum; its noise is mostly
// a Philox call and two operations.
inline Floor sample_rows_floor(int64_t rows, int64_t columns, int64_t element_bytes, bool first) {
  return {rows * (columns * element_bytes + 8 + 24 * (first ? 1 : 2)), rows * columns * 9};
}

// Ids read, new ids and labels written.
inline Floor mask_tokens_floor(int64_t tokens, int64_t id_bytes) { return {tokens * id_bytes * 3, 0}; }

// The indices, and each row of the tables that may occur; of a pair the loss and, for a gradient, 1 + negatives slopes
// and the direction, in float32. A score takes a dot product, its part of the direction as much again.
inline Floor negative_sampling_fwd_floor(int64_t pairs, int64_t negatives, int64_t center_rows, int64_t context_rows,
                                         int64_t dim, int64_t element_bytes, int64_t index_bytes, bool gradient) {
  const int64_t scores = pairs * (1 + negatives);
  const int64_t rows = std::min(pairs, center_rows) + std::min(scores, context_rows);
  const int64_t written = pairs + (gradient ? scores + pairs * dim : 0);
  return {rows * dim * element_bytes + (pairs + scores) * index_bytes + written * 4,
          2 * scores * dim * (gradient ? 2 : 1)};
}

// An order and a coefficient an entry, the source rows that may occur, the starts, and every row written.
inline Floor weighted_row_sums_floor(int64_t entries, int64_t rows, int64_t source_rows, int64_t dim,
                                     int64_t source_bytes, int64_t out_bytes) {
  return {entries * (8 + 4) + std::min(entries, source_rows) * dim * source_bytes + rows * (8 + dim * out_bytes),
          2 * entries * dim};
}

// Rows and codes once, and of a row its code and score; the products stay inside.
inline Floor search_codes_floor(int64_t rows, int64_t codes, int64_t dim, int64_t element_bytes) {
  return {(rows + codes) * dim * element_bytes + rows * 16, 2 * rows * codes * dim};
}

// Rows and the codes that may occur read, values written; of a row its code, its score and its distance in float32.
inline Floor gather_codes_floor(int64_t rows, int64_t codes, int64_t dim, int64_t element_bytes) {
  return {(2 * rows + std::min(rows, codes)) * dim * element_bytes + rows * 20, 3 * rows * dim};
}

// Of a row its code and a coefficient in float32.
inline Floor code_difference_floor(int64_t rows, int64_t codes, int64_t dim, int64_t element_bytes, int64_t out_bytes) {
  return {(rows + std::min(rows, codes)) * dim * element_bytes + rows * (dim * out_bytes + 12), 2 * rows * dim};
}

// Of a result its value and, for a gradient, what backward needs: two numbers, or an index. Of an energy a comparison,
// a difference, an exponential (2) and two sums.
inline Floor free_energy_fwd_floor(int64_t results, int64_t count, int64_t element_bytes, bool gradient) {
  return {results * (count * element_bytes + 4 + (gradient ? 8 : 0)), results * count * 6};
}

// Of the minimum the energies are not read.
inline Floor free_energy_bwd_floor(int64_t results, int64_t count, int64_t element_bytes, bool minimum) {
  return {results * (count * element_bytes * (minimum ? 1 : 2) + 12), minimum ? 0 : results * count * 4};
}

// Predictions and targets once; of a target its value and, for a gradient, a weight a prediction. Of an element a
// difference, its square and a sum.
inline Floor prediction_energy_fwd_floor(int64_t batch, int64_t count, int64_t dim, int64_t element_bytes,
                                         bool gradient) {
  return {batch * ((count + 1) * dim * element_bytes + 4 + (gradient ? count * 4 : 0)), 3 * batch * count * dim};
}

// `read`: the predictions with a weight, of which their elements and those of their targets are read. The gradients of
// all predictions are written, and those of the targets where they are asked for.
inline Floor prediction_energy_bwd_floor(int64_t batch, int64_t count, int64_t read, int64_t dim, int64_t element_bytes,
                                         bool target) {
  const int64_t rows = read + std::min(batch, read) + batch * (count + (target ? 1 : 0));
  return {rows * dim * element_bytes + batch * (count + 1) * 4, read * dim * (target ? 3 : 2)};
}

}  // namespace sslkernels
