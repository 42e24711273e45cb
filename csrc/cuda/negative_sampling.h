// Loss, slopes and directions of negative_sampling_loss on a GPU. `stream` is a cudaStream_t.
#pragma once

#include "../common/negative_sampling.h"

namespace sslkernels {

// A pair with an index out of range has NaN for loss, slopes and direction; no table is read for it.
void launch_negative_sampling_fwd(const NegativeSampling& pairs, void* stream);

}  // namespace sslkernels
