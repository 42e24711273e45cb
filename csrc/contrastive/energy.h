// The energies that reduce contrastive scores.
#pragma once

namespace sslkernels {

enum class Energy { kSoftmax = 0, kSigmoid = 1, kHinge = 2 };

}  // namespace sslkernels
