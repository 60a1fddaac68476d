// A few threads kept between calls. Tasks are taken in order from one counter; who runs what never changes a result.
#pragma once
#include <functional>

namespace glocal {

// Run fn(task) for every task in [0, tasks), on up to `threads` threads, `grain` neighbours at a time. A call made
// while another one has the pool runs on its own thread. The first exception is passed on.
void parallel(int threads, int tasks, int grain, const std::function<void(int)>& fn);

}  // namespace glocal
