// topk_sample on NVIDIA GPUs: unpacks tensors and launches kernels.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <type_traits>

#include "common/tensor.h"
#include "topk_sampling/cuda_kernels.cuh"

namespace vd {
namespace topk_sampling {
namespace {

constexpr int64_t kLargestRow = 1024;

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

class Call {
 public:
  Call(const Tensor& scores, int64_t k)
      : device(scores.get_device_index()), stream(stream_of(scores)) {
    STD_TORCH_CHECK(scores.size(1) <= kLargestRow, "too many frames for the CUDA kernels");
    c.rows = scores.size(0);
    c.frames = static_cast<int32_t>(scores.size(1));
    c.slots = static_cast<int32_t>(k);
    c.scores = static_cast<const float*>(scores.const_data_ptr());
    c.scores_row = scores.stride(0);
  }

  void noise(const Tensor& seed, int64_t row_offset, const MaybeTensor& given) {
    c.seed = static_cast<const int64_t*>(seed.const_data_ptr());
    c.row_offset = row_offset;
    if (given) {
      c.noise = static_cast<const float*>(given->const_data_ptr());
      c.noise_row = given->stride(0);
      c.noise_sample = given->stride(1);
    }
  }

  void samples(double sigma, int64_t samples, int64_t each, Tensor& plan) {
    c.sigma = static_cast<float>(sigma);
    c.samples = static_cast<int32_t>(samples);
    c.each = static_cast<int32_t>(each);
    c.plan = static_cast<int32_t*>(plan.mutable_data_ptr());
  }

  void backward(const Tensor& grad, const Tensor& indices) {
    c.grad = static_cast<const float*>(grad.const_data_ptr());
    c.grad_row = grad.stride(0);
    c.grad_slot = grad.stride(1);
    c.indices = const_cast<int64_t*>(static_cast<const int64_t*>(indices.const_data_ptr()));
  }

  // launch(frames that a lane has, as a type), for rows of so many frames.
  template <typename Launch>
  void by_frames(const Launch& launch) const {
    using std::integral_constant;
    if (c.frames <= 128) {
      launch(integral_constant<int, 4>());
    } else if (c.frames <= 256) {
      launch(integral_constant<int, 8>());
    } else if (c.frames <= 512) {
      launch(integral_constant<int, 16>());
    } else {
      launch(integral_constant<int, 32>());
    }
  }

  void run(void (*kernel)(Choice), int64_t warps) const {
    run_blocks(kernel, (warps + kWarps - 1) / kWarps, 32 * kWarps);
  }

  void run_blocks(void (*kernel)(Choice), int64_t blocks, int threads) const {
    launch(kernel, blocks, threads, c);
  }

  template <typename... Given>
  void launch(void (*kernel)(Given...), int64_t blocks, int threads, Given... given) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= INT32_MAX, "too many rows for the CUDA kernels");
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(given...);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error));
  }

  // The choice of all rows, and what it is written to.
  void choose() const {
    by_frames([&](auto own) { run(choice_kernel<decltype(own)::value>, c.rows); });
  }

  template <What kWhat>
  void draw() const {
    const int64_t warps = c.rows * c.groups();
    by_frames([&](auto own) { run(sample_kernel<decltype(own)::value, kWhat>, warps); });
  }

  torch::stable::accelerator::DeviceGuard device;  // a stream takes launches of its own device alone
  cudaStream_t stream;
  Choice c{};
};

float* floats(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }
int64_t* integers(Tensor& x) { return static_cast<int64_t*>(x.mutable_data_ptr()); }

void hard(Tensor scores, int64_t k, bool by_score, Tensor weights, Tensor indices) {
  Call call(scores, k);
  call.c.by_score = by_score;
  call.c.weights = floats(weights);
  call.c.indices = integers(indices);
  call.choose();
}

void gumbel(Tensor scores, int64_t k, Tensor seed, int64_t row_offset, MaybeTensor noise,
            bool by_score, Tensor weights, Tensor indices) {
  Call call(scores, k);
  call.noise(seed, row_offset, noise);
  call.c.gumbel = true;
  call.c.by_score = by_score;
  call.c.weights = floats(weights);
  call.c.indices = integers(indices);
  call.choose();
}

void gumbel_backward(Tensor grad, Tensor scores, Tensor indices, double temperature, Tensor seed,
                     int64_t row_offset, MaybeTensor noise, Tensor grad_scores) {
  Call call(scores, indices.size(1));
  call.backward(grad, indices);
  call.noise(seed, row_offset, noise);
  call.c.temperature = static_cast<float>(temperature);
  call.c.to = floats(grad_scores);
  call.by_frames([&](auto own) {
    call.run(gumbel_backward_kernel<decltype(own)::value>, call.c.rows);
  });
}

void perturbed(Tensor scores, int64_t k, double sigma, int64_t samples, int64_t each, Tensor seed,
               int64_t row_offset, MaybeTensor noise, bool by_score, Tensor plan, Tensor weights,
               Tensor indices) {
  Call call(scores, k);
  call.noise(seed, row_offset, noise);
  call.samples(sigma, samples, each, plan);
  call.c.by_score = by_score;
  call.c.indices = integers(indices);
  call.choose();
  call.c.weights = floats(weights);
  call.draw<What::kCounts>();
  const int64_t count = weights.numel();
  call.launch(share_kernel, (count + 255) / 256, 256, call.c.weights, count,
              static_cast<float>(samples));
}

// `parts`, zeros before, are gains [R,n]; of the diagonal gradient sums [R,groups,N], and all that is
// done.
void perturbed_backward(Tensor grad, Tensor scores, Tensor indices, double sigma, int64_t samples,
                        int64_t each, Tensor seed, int64_t row_offset, MaybeTensor noise,
                        bool by_score, bool diagonal, Tensor plan, Tensor parts,
                        Tensor grad_scores) {
  Call call(scores, indices.size(1));
  call.noise(seed, row_offset, noise);
  call.samples(sigma, samples, each, plan);
  call.c.by_score = by_score;
  call.choose();
  call.backward(grad, indices);
  if (diagonal) {
    call.c.sums = floats(parts);
    call.draw<What::kSums>();
    return;
  }
  call.c.gains = floats(parts);
  call.draw<What::kGains>();
  call.c.to = floats(grad_scores);
  const int64_t blocks = (call.c.frames + 4 * kQuads - 1) / (4 * kQuads);
  call.run_blocks(gradient_kernel, call.c.rows * blocks, kQuads * kTogether);
}

}  // namespace
}  // namespace topk_sampling

STABLE_TORCH_LIBRARY_IMPL(vd, CUDA, m) {
  m.impl("_topk_hard_cuda", TORCH_BOX(&topk_sampling::hard));
  m.impl("_topk_perturbed_cuda", TORCH_BOX(&topk_sampling::perturbed));
  m.impl("_topk_perturbed_backward_cuda", TORCH_BOX(&topk_sampling::perturbed_backward));
  m.impl("_topk_gumbel_cuda", TORCH_BOX(&topk_sampling::gumbel));
  m.impl("_topk_gumbel_backward_cuda", TORCH_BOX(&topk_sampling::gumbel_backward));
}

}  // namespace vd
