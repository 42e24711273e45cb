// The noise of rows, generated in blocks of Philox groups; short rows share a block.
#pragma once

#include <cstring>

#include "latent/gumbel.h"
#include "random/cpu/noise.h"

namespace sslkernels {
namespace {  // one copy for each instruction set: see isa.h

constexpr int64_t kBlock = 4 * kGroups;  // columns

inline int64_t block_count(int64_t left) { return left < kBlock ? left : kBlock; }

// The noise of rows that are visited in order.
class Noise {
 public:
  Noise(const GumbelRows& rows, int64_t end) : rows_(rows), end_(end), groups_((rows.columns + 3) / 4) {
    if (rows.seed == nullptr) std::memset(values_, 0, sizeof(values_));
  }

  int64_t rows_at_once() const { return kGroups / groups_; }

  // Noise of `count` columns of row i from `begin` on, a multiple of kBlock.
  const float* block(int64_t i, int64_t begin, int64_t count) {
    if (rows_.seed == nullptr) return values_;
    if (groups_ > kGroups) {
      fill(row_number(rows_, i) * uint64_t(groups_) + uint64_t(begin / 4), (count + 3) / 4, 0);
      draw((count + 3) / 4);
      return values_;
    }
    if (i >= last_) {
      first_ = i;
      last_ = end_ - i < kGroups / groups_ ? end_ : i + kGroups / groups_;
      for (int64_t r = i; r < last_; ++r) fill(row_number(rows_, r) * uint64_t(groups_), groups_, (r - i) * groups_);
      draw((last_ - i) * groups_);
    }
    return values_ + 4 * (i - first_) * groups_;
  }

 private:
  void fill(uint64_t number, int64_t count, int64_t at) {
    for (int64_t k = 0; k < count; ++k) numbers_[at + k] = number + uint64_t(k);
  }
  void draw(int64_t count) { gumbels_of_groups(uint64_t(*rows_.seed), numbers_, 0, count, values_); }

  const GumbelRows& rows_;
  const int64_t end_;
  const int64_t groups_;
  int64_t first_ = 0, last_ = 0;  // rows whose noise is in the buffer
  alignas(kLine) uint64_t numbers_[kGroups];
  alignas(kLine) float values_[kBlock];
};

}  // namespace
}  // namespace sslkernels
