// spacetime_attention on the CPU: divides the sequences among threads, and sums the gradients of what
// was broadcast.
#include <algorithm>
#include <array>
#include <vector>

#include "common/tensor.h"
#include "spacetime_attention/cpu_kernels.h"

namespace vd {
namespace spacetime_attention {
namespace {

Video video_of(const MaybeTensor& x) {
  if (!x) return {};
  return {x->const_data_ptr(), x->stride(0), x->stride(1), x->stride(2), x->stride(3)};
}

Prefix prefix_of(const MaybeTensor& x) {
  if (!x) return {};
  const int64_t group = x->size(1) == 1 ? 0 : x->stride(1);
  return {x->const_data_ptr(), x->stride(0), group, x->stride(2), x->stride(3)};
}

// Stride of a dimension that is broadcast where it has one element.
int64_t step(const Tensor& x, int64_t dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); }

Arguments arguments_of(const Tensor& query, const Tensor& key, const Tensor& value, int64_t axis,
                       const std::vector<int64_t>& window, int64_t columns, bool causal,
                       const MaybeTensor& key_mask, const MaybeTensor& prefix_query,
                       const MaybeTensor& prefix_key, const MaybeTensor& prefix_value,
                       const MaybeTensor& gate, double scale) {
  Arguments a{};
  a.dtype = dtype_of(query);
  a.axis = static_cast<Axis>(axis);
  a.batch = query.size(0);
  a.frames = query.size(1);
  a.patches = query.size(2);
  a.heads = query.size(3);
  a.width = query.size(4);
  a.groups = a.axis == Axis::kTime ? a.patches : a.axis == Axis::kSpace ? a.frames : 1;
  a.length = a.axis == Axis::kTime    ? a.frames
             : a.axis == Axis::kSpace ? a.patches
                                      : a.frames * a.patches;
  a.prefixes = prefix_key ? prefix_key->size(2) : 0;
  // Nothing is farther away than all tokens are, and sums with a window are not to overflow.
  for (size_t i = 0; i < 3; ++i) {
    a.window[i] = i < window.size() ? std::min(window[i], a.frames * a.patches) : -1;
  }
  a.columns = columns;
  a.causal = causal;
  a.real = key_mask ? static_cast<const bool*>(key_mask->const_data_ptr()) : nullptr;
  a.real_patches = key_mask && key_mask->dim() == 3;
  a.scale = static_cast<float>(scale);
  a.query = video_of(query);
  a.key = video_of(key);
  a.value = video_of(value);
  a.prefix_query = prefix_of(prefix_query);
  a.prefix_key = prefix_of(prefix_key);
  a.prefix_value = prefix_of(prefix_value);
  if (gate) {
    a.gate = {gate->const_data_ptr(), dtype_of(*gate), step(*gate, 0), step(*gate, 1),
              step(*gate, 2),         step(*gate, 3),  step(*gate, 4)};
  }
  a.stream = query.numel() * static_cast<int64_t>(query.element_size()) >= kStreamBytes;
  return a;
}

// Whether sequences have neither tokens nor prefixes: there is nothing to compute.
bool is_empty(const Arguments& a) { return a.length + a.prefixes == 0; }

void forward(Tensor query, Tensor key, Tensor value, int64_t axis, std::vector<int64_t> window,
             int64_t columns, bool causal, MaybeTensor key_mask, MaybeTensor prefix_query,
             MaybeTensor prefix_key, MaybeTensor prefix_value, MaybeTensor gate, double scale,
             Tensor out, MaybeTensor prefix_out) {
  Arguments a = arguments_of(query, key, value, axis, window, columns, causal, key_mask,
                             prefix_query, prefix_key, prefix_value, gate, scale);
  a.out = out.mutable_data_ptr();
  a.prefix_out = prefix_out ? prefix_out->mutable_data_ptr() : nullptr;
  if (is_empty(a)) return;
  const Kernels& kernels = VD_PICK_KERNELS(spacetime_attention_kernels, a.dtype);
  parallel(kernels.tasks(a), 1, [&](int64_t begin, int64_t end) {
    kernels.forward(a, begin, end, scratch(kernels.forward_scratch(a)));
  });
}

// to = from [sizes] summed over the dimensions in which `to` has one element, in order.
void sum_to(const float* from, const std::array<int64_t, 5>& sizes, const Tensor& to) {
  float* sums = static_cast<float*>(to.mutable_data_ptr());
  std::fill(sums, sums + to.numel(), 0.0f);
  std::array<int64_t, 5> steps;
  for (int64_t dim = 0; dim < 5; ++dim) steps[dim] = step(to, dim);
  for (int64_t i = 0; i < sizes[0]; ++i) {
    for (int64_t j = 0; j < sizes[1]; ++j) {
      for (int64_t k = 0; k < sizes[2]; ++k) {
        for (int64_t l = 0; l < sizes[3]; ++l) {
          float* row = sums + i * steps[0] + j * steps[1] + k * steps[2] + l * steps[3];
          for (int64_t m = 0; m < sizes[4]; ++m) row[m * steps[4]] += *from++;
        }
      }
    }
  }
}

// Where the kernels write a gradient [sizes] of floats: the result itself, unless something was
// broadcast, which has to be summed afterwards. Zeros, and nowhere, when no gradient reaches it.
class Summed {
 public:
  Summed(const MaybeTensor& result, bool reached, const std::array<int64_t, 5>& sizes)
      : sizes_(sizes) {
    if (!result) return;
    result_ = result;
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    if (!reached) {
      float* to = static_cast<float*>(result->mutable_data_ptr());
      std::fill(to, to + result->numel(), 0.0f);
      result_.reset();
    } else if (count != result->numel()) {
      parts_ = torch::stable::new_empty(*result, {count});
    }
  }

  float* data() const { return floats_of(parts_ ? parts_ : result_); }

  void finish() const {
    if (parts_) sum_to(data(), sizes_, *result_);
  }

 private:
  MaybeTensor result_, parts_;
  std::array<int64_t, 5> sizes_;
};

void backward(MaybeTensor grad_out, MaybeTensor grad_prefix_out, Tensor query, Tensor key,
              Tensor value, int64_t axis, std::vector<int64_t> window, int64_t columns, bool causal,
              MaybeTensor key_mask, MaybeTensor prefix_query, MaybeTensor prefix_key,
              MaybeTensor prefix_value, MaybeTensor gate, double scale, MaybeTensor grad_query,
              MaybeTensor grad_key, MaybeTensor grad_value, MaybeTensor grad_prefix_query,
              MaybeTensor grad_prefix_key, MaybeTensor grad_prefix_value, MaybeTensor grad_gate) {
  Arguments a = arguments_of(query, key, value, axis, window, columns, causal, key_mask,
                             prefix_query, prefix_key, prefix_value, gate, scale);
  const auto pointer = [](const MaybeTensor& x) { return x ? x->mutable_data_ptr() : nullptr; };
  a.grad_out = video_of(grad_out);
  a.grad_prefix_out = prefix_of(grad_prefix_out);
  a.grad_query = pointer(grad_query);
  a.grad_key = pointer(grad_key);
  a.grad_value = pointer(grad_value);
  const std::array<int64_t, 5> prefixes{a.batch, a.groups, a.prefixes, a.heads, a.width};
  const Summed prefix_query_sums(grad_prefix_query, grad_prefix_out.has_value(), prefixes);
  const Summed prefix_key_sums(grad_prefix_key, true, prefixes);
  const Summed prefix_value_sums(grad_prefix_value, true, prefixes);
  a.grad_gate_narrow = grad_gate && dtype_of(*grad_gate) != Dtype::kFloat;
  const Summed gate_sums(
      a.grad_gate_narrow ? MaybeTensor() : grad_gate, grad_out.has_value(),
      {a.batch, a.frames, a.patches, a.heads, a.gate.width == 0 ? 1 : a.width});
  a.grad_prefix_query = prefix_query_sums.data();
  a.grad_prefix_key = prefix_key_sums.data();
  a.grad_prefix_value = prefix_value_sums.data();
  a.grad_gate = a.grad_gate_narrow ? pointer(grad_gate) : gate_sums.data();
  const Kernels& kernels = VD_PICK_KERNELS(spacetime_attention_kernels, a.dtype);
  parallel(is_empty(a) ? 0 : kernels.tasks(a), 1, [&](int64_t begin, int64_t end) {
    kernels.backward(a, begin, end, scratch(kernels.backward_scratch(a)));
  });
  for (const Summed* sums : {&prefix_query_sums, &prefix_key_sums, &prefix_value_sums, &gate_sums}) {
    sums->finish();
  }
}

}  // namespace
}  // namespace spacetime_attention

STABLE_TORCH_LIBRARY_IMPL(vd, CPU, m) {
  m.impl("_spacetime_attention_cpp", TORCH_BOX(&spacetime_attention::forward));
  m.impl("_spacetime_attention_backward_cpp", TORCH_BOX(&spacetime_attention::backward));
}

}  // namespace vd
