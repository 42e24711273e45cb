// The kernels of cross_entropy_rows.h for half: in a file of their own, so that they compile side by side.
#include "vocabulary/cross_entropy_launch_cuda.h"

namespace sslkernels {

template void launch_rows_fwd<Half>(const CrossEntropyRows&, void*);
template void launch_rows_bwd<Half>(const CrossEntropyRows&, void*);

}  // namespace sslkernels
