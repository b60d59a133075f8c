// topk_sample and topk_gather on the CPU: unpacks tensors and divides the work.
#include <algorithm>
#include <atomic>

#include "common/tensor.h"
#include "topk_sampling/cpu_kernels.h"
#include "topk_sampling/lapsum.h"

namespace vd {
namespace topk_sampling {
namespace {

const float* floats(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
float* floats(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// Rows that a thread should take at least, when each costs `work` steps.
int64_t grain(int64_t work) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(work, 1)); }

// Samples are divided into chunks where rows are few: enough of them for many threads, and as many
// for any number of threads, so the bits do not depend on it. At most one for so many samples.
constexpr int64_t kTasks = 32, kSamplesOfChunk = 64;

class Call {
 public:
  Call(const Tensor& scores, int64_t k, bool by_score) {
    c.rows = scores.size(0);
    c.frames = scores.size(1);
    c.slots = k;
    c.scores = floats(scores);
    c.by_score = by_score;
  }

  void results(Tensor& weights, Tensor& indices, Tensor& slot_mask) {
    c.weights = floats(weights);
    c.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
    c.slot_mask = static_cast<bool*>(slot_mask.mutable_data_ptr());
  }

  // How many scores are NaN or +inf: no choice can be made among those.
  int64_t unordered() const {
    std::atomic<int64_t> found{0};
    parallel(c.rows, grain(c.frames), [&](int64_t begin, int64_t end) {
      found += kernels.unordered(c, begin, end);
    });
    return found;
  }

  void noise(const Tensor& seed, int64_t row_offset, const MaybeTensor& given) {
    c.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
    c.row_offset = static_cast<uint64_t>(row_offset);
    if (given) {
      c.noise = floats(*given);
      c.noise_row = given->stride(0);
      c.noise_sample = given->stride(1);
    }
  }

  void perturbed(double sigma, int64_t samples) {
    c.sigma = sigma;
    c.samples = samples;
    const int64_t most = (samples + kSamplesOfChunk - 1) / kSamplesOfChunk;
    c.chunks = std::max<int64_t>(1, std::min(most, kTasks / std::max<int64_t>(c.rows, 1)));
  }

  void backward(const Tensor& grad, const Tensor& indices, Tensor& grad_scores) {
    c.grad = floats(grad);
    c.indices = const_cast<int64_t*>(static_cast<const int64_t*>(indices.const_data_ptr()));
    c.grad_scores = floats(grad_scores);
  }

  // `kernel` on `count` tasks.
  void run(void (*kernel)(const Choice&, int64_t, int64_t, float*), int64_t count,
           int64_t least) const {
    parallel(count, least, [&](int64_t begin, int64_t end) {
      kernel(c, begin, end, scratch(kernels.choice_scratch(c)));
    });
  }
  void run(void (*kernel)(const Choice&, int64_t, int64_t), int64_t least) const {
    parallel(c.rows, least, [&](int64_t begin, int64_t end) { kernel(c, begin, end); });
  }

  const Kernels& kernels = VD_PICK_KERNELS(topk_sampling_kernels, Dtype::kFloat);
  Choice c{};
};

// Choices return how many scores are not allowed, and choose only if all are.

int64_t hard(Tensor scores, int64_t k, bool by_score, Tensor weights, Tensor indices,
             Tensor slot_mask) {
  Call call(scores, k, by_score);
  if (const int64_t wrong = call.unordered()) return wrong;
  call.results(weights, indices, slot_mask);
  call.run(call.kernels.hard, call.c.rows, grain(4 * call.c.frames));
  return 0;
}

int64_t perturbed(Tensor scores, int64_t k, double sigma, int64_t samples, Tensor seed,
                  int64_t row_offset, MaybeTensor noise, bool by_score, Tensor weights,
                  Tensor indices, Tensor slot_mask) {
  Call call(scores, k, by_score);
  if (const int64_t wrong = call.unordered()) return wrong;
  Choice& c = call.c;
  call.results(weights, indices, slot_mask);
  call.noise(seed, row_offset, noise);
  call.perturbed(sigma, samples);
  float* const counts = c.weights;
  c.weights = nullptr;
  call.run(call.kernels.hard, c.rows, grain(4 * c.frames));
  c.weights = counts;
  call.run(call.kernels.perturbed, c.rows * c.chunks, 1);
  call.run(call.kernels.counts_to_weights, grain(c.slots * c.frames));
  return 0;
}

void perturbed_backward(Tensor grad, Tensor scores, Tensor indices, double sigma, int64_t samples,
                        Tensor seed, int64_t row_offset, MaybeTensor noise, bool by_score,
                        bool diagonal, Tensor grad_scores) {
  Call call(scores, indices.size(1), by_score);
  Choice& c = call.c;
  call.backward(grad, indices, grad_scores);
  call.noise(seed, row_offset, noise);
  call.perturbed(sigma, samples);
  c.diagonal = diagonal;
  Tensor sums = torch::stable::new_empty(
      scores, {c.rows * c.chunks * call.kernels.sums_floats(c)});
  c.sums = floats(sums);
  call.run(call.kernels.perturbed_backward, c.rows * c.chunks, 1);
  call.run(call.kernels.add_chunks, grain(2 * c.chunks * c.frames));
}

int64_t gumbel(Tensor scores, int64_t k, Tensor seed, int64_t row_offset, MaybeTensor noise,
               bool by_score, Tensor weights, Tensor indices, Tensor slot_mask) {
  Call call(scores, k, by_score);
  if (const int64_t wrong = call.unordered()) return wrong;
  call.results(weights, indices, slot_mask);
  call.noise(seed, row_offset, noise);
  call.run(call.kernels.gumbel, call.c.rows, grain(16 * call.c.frames));
  return 0;
}

void gumbel_backward(Tensor grad, Tensor scores, Tensor indices, double temperature, Tensor seed,
                     int64_t row_offset, MaybeTensor noise, Tensor grad_scores) {
  Call call(scores, indices.size(1), false);
  Choice& c = call.c;
  call.backward(grad, indices, grad_scores);
  call.noise(seed, row_offset, noise);
  c.temperature = static_cast<float>(temperature);
  call.run(call.kernels.gumbel_backward, c.rows, grain((16 + 4 * c.slots) * c.frames));
}

int64_t lapsum(Tensor scores, int64_t k, double temperature, bool by_score, Tensor weights,
               Tensor indices, Tensor slot_mask) {
  Call call(scores, k, by_score);
  if (const int64_t wrong = call.unordered()) return wrong;
  Choice& c = call.c;
  call.results(weights, indices, slot_mask);
  float* const to = c.weights;
  c.weights = nullptr;
  call.run(call.kernels.hard, c.rows, grain(4 * c.frames));
  parallel(c.rows, grain(100 * c.frames), [&](int64_t begin, int64_t end) {
    Lapsum row;
    for (int64_t r = begin; r < end; ++r) {
      lapsum_row(c.scores + r * c.frames, c.frames, k, temperature, &row, to + r * c.frames);
    }
  });
  return 0;
}

void lapsum_backward(Tensor grad, Tensor scores, int64_t k, double temperature,
                     Tensor grad_scores) {
  const int64_t frames = scores.size(1);
  const float *from = floats(grad), *x = floats(scores);
  float* const to = floats(grad_scores);
  parallel(scores.size(0), grain(100 * frames), [&](int64_t begin, int64_t end) {
    Lapsum row;
    for (int64_t at = begin * frames; at < end * frames; at += frames) {
      lapsum_backward_row(from + at, x + at, frames, k, temperature, &row, to + at);
    }
  });
}

constexpr int64_t kFewTasks = 64;

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

Gather gather_of(const Tensor& values, const Tensor& weights, const Tensor& indices) {
  Gather g{};
  g.dtype = dtype_of(values);
  g.rows = values.size(0);
  g.frames = values.size(1);
  g.slots = indices.size(1);
  g.width = values.size(2);
  g.values = values.const_data_ptr();
  g.values_row = values.stride(0);
  g.values_frame = values.stride(1);
  g.weights = floats(weights);
  if (weights.dim() == 2) g.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  // Parts as long as memory likes them, as long as there are some for many threads.
  const int64_t fair = parts(parts(g.rows * g.width, kFewTasks), kWidth) * kWidth;
  g.part = std::max(kWidth, std::min(8 * kWidth, fair));
  return g;
}

void run(const Kernels& kernels, void (*kernel)(const Gather&, int64_t, int64_t, float*),
         const Gather& g, int64_t tasks, int64_t least) {
  parallel(tasks, least, [&](int64_t begin, int64_t end) {
    kernel(g, begin, end, scratch(kernels.gather_scratch(g)));
  });
}

void gather(Tensor values, Tensor weights, Tensor indices, Tensor out) {
  Gather g = gather_of(values, weights, indices);
  const Kernels& kernels = VD_PICK_KERNELS(topk_sampling_kernels, g.dtype);
  g.out = out.mutable_data_ptr();
  run(kernels, kernels.gather, g, g.rows * parts(g.width, g.part), grain(g.slots * g.part));
}

void gather_backward(Tensor grad, Tensor values, Tensor weights, Tensor indices,
                     MaybeTensor grad_values, MaybeTensor grad_weights) {
  Gather g = gather_of(values, weights, indices);
  const Kernels& kernels = VD_PICK_KERNELS(topk_sampling_kernels, g.dtype);
  g.grad = grad.const_data_ptr();
  g.grad_row = grad.stride(0);
  g.grad_slot = grad.stride(1);
  if (grad_values) {
    g.grad_values = grad_values->mutable_data_ptr();
    run(kernels, kernels.gather_backward_values, g, g.rows * parts(g.width, g.part),
        grain(g.frames * g.part));
  }
  if (grad_weights) {
    g.grad_weights = floats(*grad_weights);
    run(kernels, kernels.gather_backward_weights, g, g.rows * parts(g.frames, kFrames),
        grain(g.slots * g.width));
  }
}

}  // namespace
}  // namespace topk_sampling

STABLE_TORCH_LIBRARY_IMPL(vd, CPU, m) {
  m.impl("_topk_hard_cpp", TORCH_BOX(&topk_sampling::hard));
  m.impl("_topk_perturbed_cpp", TORCH_BOX(&topk_sampling::perturbed));
  m.impl("_topk_perturbed_backward_cpp", TORCH_BOX(&topk_sampling::perturbed_backward));
  m.impl("_topk_gumbel_cpp", TORCH_BOX(&topk_sampling::gumbel));
  m.impl("_topk_gumbel_backward_cpp", TORCH_BOX(&topk_sampling::gumbel_backward));
  m.impl("_topk_lapsum_cpp", TORCH_BOX(&topk_sampling::lapsum));
  m.impl("_topk_lapsum_backward_cpp", TORCH_BOX(&topk_sampling::lapsum_backward));
  m.impl("_topk_gather_cpp", TORCH_BOX(&topk_sampling::gather));
  m.impl("_topk_gather_backward_cpp", TORCH_BOX(&topk_sampling::gather_backward));
}

}  // namespace vd
