// What contrastive scores are reduced to.
#pragma once

namespace sslkernels {

enum class Energy { kSoftmax = 0, kSigmoid = 1, kHinge = 2 };

}  // namespace sslkernels
