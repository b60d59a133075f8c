// torch's parallel_for on threads of our own; only in builds with ThreadSanitizer, see setup.py.
//
// torch's threads are OpenMP's, which is not instrumented: that they wait for each other cannot be
// seen, so that whatever two of them touch would look like a race. Threads of the standard library
// can be seen. There are as many as there are parts, up to eight, however small the parts are.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <thread>
#include <vector>

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t /*grain*/, ParallelFunc run,
                                  void* context) {
  const int64_t count = end - begin, parts = std::min<int64_t>(count, 8);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < parts; ++i) {
    threads.emplace_back(run, begin + count * i / parts, begin + count * (i + 1) / parts, context);
  }
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}
