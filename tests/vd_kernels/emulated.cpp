// The CUDA kernels of topk_sample on the CPU: 32 threads are a warp, and meet where its lanes do.
//
// Reads a problem from stdin as numbers, writes what the kernels wrote as bits. test_cuda.py compiles
// and calls it.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iostream>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
struct Index {
  unsigned x;
};
static thread_local Index threadIdx, blockIdx, blockDim;
static std::barrier<> warp(32);
static std::barrier<>* block;
static uint32_t lanes[32][32];  // of each warp of a block: what its lanes say

template <typename T, typename Combine>
T exchange(T own, const Combine& combine) {
  uint32_t* const said = lanes[threadIdx.x / 32];
  std::memcpy(said + threadIdx.x % 32, &own, 4);
  std::barrier<>& here = block ? *block : warp;
  here.arrive_and_wait();
  T all[32];
  std::memcpy(all, said, sizeof all);
  here.arrive_and_wait();
  return combine(all);
}
template <typename T, typename Fold>
T reduce(T own, const Fold& fold) {
  return exchange(own, [&](const T* all) {
    T sum = all[0];
    for (int i = 1; i < 32; ++i) sum = fold(sum, all[i]);
    return sum;
  });
}
static unsigned __ballot_sync(unsigned, bool own) {
  return exchange<uint32_t>(own, [](const uint32_t* all) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= all[i] << i;
    return bits;
  });
}
static bool __any_sync(unsigned mask, bool own) { return __ballot_sync(mask, own) != 0; }
static int __reduce_add_sync(unsigned, int x) { return reduce(x, std::plus<int>()); }
static int __reduce_max_sync(unsigned, int x) {
  return reduce(x, [](int a, int b) { return std::max(a, b); });
}
static int __reduce_min_sync(unsigned, int x) {
  return reduce(x, [](int a, int b) { return std::min(a, b); });
}
static float __shfl_xor_sync(unsigned, float x, int apart) {
  return exchange(x, [&](const float* all) { return all[(threadIdx.x % 32) ^ apart]; });
}
static void __syncthreads() { block->arrive_and_wait(); }
static int __popc(unsigned x) { return __builtin_popcount(x); }
static float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
static int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, 4);
  return y;
}
static float __int2float_rn(int x) { return static_cast<float>(x); }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static int atomicAdd(int* to, int x) {
  return reinterpret_cast<std::atomic<int>*>(to)->fetch_add(x);
}
using std::max;
using std::min;

#include "topk_sampling/cuda_kernels.cuh"

using namespace vd::topk_sampling;

// All warps that have work, one after the other: blocks of which one warp alone has any.
static void run(void (*kernel)(Choice), const Choice& c, int64_t warps) {
  std::vector<std::thread> lanes;
  for (unsigned i = 0; i < 32; ++i) {
    lanes.emplace_back([=] {
      for (int64_t work = 0; work < warps; ++work) {
        blockIdx.x = static_cast<unsigned>(work / kWarps);
        threadIdx.x = 32 * static_cast<unsigned>(work % kWarps) + i;
        kernel(c);
        warp.arrive_and_wait();
      }
    });
  }
  for (std::thread& lane : lanes) lane.join();
}

static void run_blocks(void (*kernel)(Choice), const Choice& c, int64_t blocks, unsigned threads) {
  std::barrier<> all(threads);
  block = &all;
  std::vector<std::thread> workers;
  for (unsigned i = 0; i < threads; ++i) {
    workers.emplace_back([=] {
      for (int64_t b = 0; b < blocks; ++b) {
        blockIdx.x = static_cast<unsigned>(b);
        threadIdx.x = i;
        kernel(c);
        // A thread that has returned early must not overtake the others.
        block->arrive_and_wait();
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  block = nullptr;
}

template <typename T>
static std::vector<T> read(int64_t count) {
  std::vector<T> values(count);
  std::fread(values.data(), sizeof(T), count, stdin);
  return values;
}
template <typename T>
static void write(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

template <int kOwn>
static void compute(Choice c, int what) {
  const int64_t cells = c.rows * c.slots * c.frames, row_cells = c.rows * c.frames;
  const auto scores = read<float>(row_cells), grad = read<float>(cells);
  const auto seed = read<int64_t>(1);
  std::vector<float> weights(cells), gains(c.rows * c.samples), sums(c.groups() * row_cells);
  std::vector<float> to(row_cells);
  std::vector<int64_t> indices(c.rows * c.slots);
  std::vector<int32_t> plan(c.rows * (2 * c.frames + 3));
  c.scores = scores.data();
  c.seed = seed.data();
  c.grad = grad.data();
  c.indices = indices.data();
  c.to = to.data();
  if (what < 2) {  // hard, gumbel
    c.gumbel = what == 1;
    c.weights = weights.data();
    run(choice_kernel<kOwn>, c, c.rows);
    if (c.gumbel) run(gumbel_backward_kernel<kOwn>, c, c.rows);
  } else {  // perturbed, exactly or diagonally
    c.plan = plan.data();
    run(choice_kernel<kOwn>, c, c.rows);
    c.weights = weights.data();
    const int64_t warps = c.rows * c.groups();
    run(sample_kernel<kOwn, What::kCounts>, c, warps);
    const float samples = static_cast<float>(c.samples);
    for (float& x : weights) x = __fdiv_rn(__int2float_rn(__float_as_int(x)), samples);
    if (what == 2) {
      c.gains = gains.data();
      run(sample_kernel<kOwn, What::kGains>, c, warps);
      const int64_t blocks = c.rows * ((c.frames + 4 * kQuads - 1) / (4 * kQuads));
      run_blocks(gradient_kernel, c, blocks, kQuads * kTogether);
    } else {
      c.sums = sums.data();
      run(sample_kernel<kOwn, What::kSums>, c, warps);
      for (int64_t i = 0; i < row_cells; ++i) {
        float sum = 0.0f;
        for (int64_t g = 0; g < c.groups(); ++g) {
          sum += sums[(i / c.frames * c.groups() + g) * c.frames + i % c.frames];
        }
        to[i] = sum / samples / c.sigma;
      }
    }
  }
  write(indices);
  write(weights);
  write(to);
}

// Arguments: what rows frames slots samples each by_score row_offset sigma temperature.
int main(int, char** given) {
  const auto number = [&](int i) { return std::atoll(given[i]); };
  Choice c{};
  c.rows = number(2);
  c.frames = static_cast<int32_t>(number(3));
  c.slots = static_cast<int32_t>(number(4));
  c.samples = static_cast<int32_t>(number(5));
  c.each = static_cast<int32_t>(number(6));
  c.by_score = number(7);
  c.row_offset = number(8);
  c.sigma = std::strtof(given[9], nullptr);
  c.temperature = std::strtof(given[10], nullptr);
  c.scores_row = c.frames;
  c.grad_row = static_cast<int64_t>(c.slots) * c.frames;
  c.grad_slot = c.frames;
  const int what = static_cast<int>(number(1));
  if (c.frames <= 128) {
    compute<4>(c, what);
  } else if (c.frames <= 256) {
    compute<8>(c, what);
  } else if (c.frames <= 512) {
    compute<16>(c, what);
  } else {
    compute<32>(c, what);
  }
}
