// The kernels of cross_entropy_rows_cuda.h for bfloat16, in a separate file so that they compile in parallel.
#include "vocabulary/cross_entropy_launch_cuda.h"

namespace sslkernels {

template void launch_rows_fwd<BFloat16>(const CrossEntropyRows&, void*);
template void launch_rows_bwd<BFloat16>(const CrossEntropyRows&, void*);

}  // namespace sslkernels
