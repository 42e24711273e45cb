// Gaussian samples and their divergence on a GPU. `stream` is a cudaStream_t.
#pragma once

#include "../common/gaussian.h"

namespace sslkernels {

int64_t gaussian_columns_of_sum(Element element);  // of a row, that are added up to one number

void launch_gaussian_fwd(const GaussianForward& forward, void* stream);
void launch_gaussian_bwd(const GaussianBackward& backward, void* stream);

}  // namespace sslkernels
