// The kernels of cross_entropy_rows.h for float; one file an element type, so that they compile side by side.
#include "cross_entropy_launch.h"

namespace sslkernels {

template void launch_rows_fwd<float>(const CrossEntropyRows&, void*);
template void launch_rows_bwd<float>(const CrossEntropyRows&, void*);

}  // namespace sslkernels
