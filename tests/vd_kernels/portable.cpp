// Runs kernels of the portable level without torch and prints their results bit by bit: another
// compiler or architecture must print the same (.ci/cross).
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "spacetime_attention/cpu_kernels.h"
#include "topk_sampling/cpu_kernels.h"

namespace {

// Numbers between -2 and 2; the same everywhere.
std::vector<float> numbers(int64_t count, uint32_t seed) {
  std::vector<float> x(count);
  for (float& value : x) {
    seed = seed * 1664525 + 1013904223;
    value = static_cast<float>(static_cast<int32_t>(seed)) * 0x1p-30f;
  }
  return x;
}

std::vector<float> room(int64_t count) { return std::vector<float>(count, 0.0f); }

// One line: a checksum of all bits, and the first value to look at.
template <typename T>
void print(const char* name, const std::vector<T>& x) {
  uint64_t sum = 0xcbf29ce484222325;
  const auto* bytes = reinterpret_cast<const unsigned char*>(x.data());
  for (size_t i = 0; i < x.size() * sizeof(T); ++i) sum = (sum ^ bytes[i]) * 0x100000001b3;
  std::printf("%-32s %016" PRIx64 " %.9g\n", name, sum, static_cast<double>(x[0]));
}

void choose() {
  const auto& kernels = vd::scalar::topk_sampling_kernels;
  constexpr int64_t rows = 3, frames = 203, slots = 9;
  std::vector<float> scores = numbers(rows * frames, 1), weights = room(rows * slots * frames);
  for (int64_t t = 0; t < frames; t += 3) scores[t] = -INFINITY;
  std::vector<int64_t> indices(rows * slots);
  const auto slot_mask = std::make_unique<bool[]>(rows * slots);
  const std::vector<float> grad = numbers(rows * slots * frames, 2);
  std::vector<float> grad_scores = room(rows * frames);

  vd::topk_sampling::Choice c{};
  c.rows = rows, c.frames = frames, c.slots = slots;
  c.scores = scores.data();
  c.seed = 1234567890123, c.row_offset = 5;
  c.indices = indices.data();
  c.slot_mask = slot_mask.get();
  c.sigma = 0.5, c.samples = 100, c.chunks = 2;
  c.temperature = 0.7f;
  c.grad = grad.data();
  c.grad_scores = grad_scores.data();
  std::vector<float> scratch = room(kernels.choice_scratch(c));
  std::vector<float> sums = room(rows * c.chunks * kernels.sums_floats(c));
  c.sums = sums.data();

  kernels.hard(c, 0, rows, scratch.data());
  print("hard: indices", indices);
  c.weights = weights.data();
  kernels.perturbed(c, 0, rows * c.chunks, scratch.data());
  kernels.counts_to_weights(c, 0, rows);
  print("perturbed: weights", weights);
  for (const bool diagonal : {false, true}) {
    c.diagonal = diagonal;
    kernels.perturbed_backward(c, 0, rows * c.chunks, scratch.data());
    kernels.add_chunks(c, 0, rows);
    print(diagonal ? "diagonal: gradient" : "perturbed: gradient", grad_scores);
  }
  weights.assign(weights.size(), 0.0f);
  kernels.gumbel(c, 0, rows, scratch.data());
  print("gumbel: indices", indices);
  kernels.gumbel_backward(c, 0, rows, scratch.data());
  print("gumbel: gradient", grad_scores);
}

// Of any dtype: what lies in memory are random bits, so small that no float is infinite or NaN.
std::vector<uint16_t> elements(vd::Dtype dtype, int64_t count, uint32_t seed) {
  const std::vector<float> x = numbers(count, seed);
  std::vector<uint16_t> bits(dtype == vd::Dtype::kFloat ? 2 * count : count);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t word;
    std::memcpy(&word, &x[i], sizeof word);
    if (dtype == vd::Dtype::kFloat) std::memcpy(&bits[2 * i], &word, sizeof word);
    if (dtype == vd::Dtype::kBFloat16) bits[i] = static_cast<uint16_t>(word >> 16);
    if (dtype == vd::Dtype::kHalf) bits[i] = static_cast<uint16_t>((word & 0x83ff0000) >> 16 | 0x3800);
  }
  return bits;
}

void attend(vd::Dtype dtype, const char* name) {
  using namespace vd::spacetime_attention;
  const auto& kernels = vd::scalar::spacetime_attention_kernels;
  constexpr int64_t frames = 5, patches = 7, heads = 3, width = 13;
  constexpr int64_t count = frames * patches * heads * width;
  const auto video = [](const std::vector<uint16_t>& x) {
    return Video{x.data(), count, patches * heads * width, heads * width, width};
  };
  const auto query = elements(dtype, count, 3), key = elements(dtype, count, 4);
  const auto value = elements(dtype, count, 5), grad = elements(dtype, count, 6);
  std::vector<std::vector<uint16_t>> results(4, std::vector<uint16_t>(2 * count));

  Arguments a{};
  a.dtype = dtype, a.axis = Axis::kTime;
  a.batch = 1, a.frames = frames, a.patches = patches, a.heads = heads, a.width = width;
  a.groups = patches, a.length = frames;
  for (int64_t& reach : a.window) reach = -1;
  a.scale = 0.3f;
  a.query = video(query), a.key = video(key), a.value = video(value), a.grad_out = video(grad);
  a.out = results[0].data();
  a.grad_query = results[1].data(), a.grad_key = results[2].data(), a.grad_value = results[3].data();

  std::vector<float> scratch = room(kernels.forward_scratch(a));
  kernels.forward(a, 0, kernels.tasks(a), scratch.data());
  scratch = room(kernels.backward_scratch(a));
  kernels.backward(a, 0, kernels.tasks(a), scratch.data());
  for (const auto& result : results) print(name, result);
}

}  // namespace

int main() {
  choose();
  attend(vd::Dtype::kFloat, "attention: float32");
  attend(vd::Dtype::kBFloat16, "attention: bfloat16");
  attend(vd::Dtype::kHalf, "attention: float16");
}
