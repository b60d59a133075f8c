// language_gate on the CPU: packs the question, divides the work, and reduces what chunks summed.
#include <algorithm>
#include <vector>

#include "common/tensor.h"
#include "language_gate/cpu_kernels.h"

namespace vd {
namespace language_gate {
namespace {

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

Tokens tokens_of(const MaybeTensor& x) {
  if (!x) return {};
  return {x->const_data_ptr(), x->stride(0), x->stride(1), x->stride(2)};
}

Tensor floats_like(const Tensor& x, int64_t count) {
  return torch::stable::new_empty(x, {count}, torch::headeronly::ScalarType::Float);
}

// What forward and backward both need: sizes, and the question's real tokens packed.
struct Call {
  const Kernels& kernels;
  Arguments g{};
  int64_t batch, tokens, heads;
  const bool* real;
  std::vector<int64_t> count;

  Call(const Tensor& query, const Tensor& key_, const MaybeTensor& value,
       const MaybeTensor& gate_value_, const MaybeTensor& key_mask, const MaybeTensor& bias,
       double scale, int64_t reduction)
      : kernels(VD_PICK_KERNELS(language_gate_kernels, dtype_of(query))),
        batch(query.size(0)),
        tokens(key_.size(1)),
        heads(query.size(2)),
        real(key_mask ? static_cast<const bool*>(key_mask->const_data_ptr()) : nullptr),
        count(batch, tokens) {
    g.dtype = dtype_of(query);
    g.batch = batch;
    g.length = query.size(1);
    g.heads = heads;
    g.width = query.size(3);
    g.per_channel = gate_value_.has_value();
    g.channels = value ? value->size(3) : g.per_channel ? gate_value_->size(3) : 1;
    g.query = tokens_of(query);
    g.value = tokens_of(value);
    g.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
    g.reduction = static_cast<Reduction>(reduction);
    g.scale = static_cast<float>(scale);
    for (int64_t b = 0; real && b < batch; ++b) {
      count[b] = std::count(real + b * tokens, real + (b + 1) * tokens, true);
    }
    if (mean()) {
      for (int64_t& n : count) n = std::min<int64_t>(n, 1);
    }
    g.count = count.data();
    const int64_t most = count.empty() ? 0 : *std::max_element(count.begin(), count.end());
    g.padded = round_up(most, kernels.lanes);

    g.key = packing(tokens_of(key_), g.width, static_cast<float>(scale));
    if (g.per_channel) g.gate_value = packing(tokens_of(*gate_value_), g.channels, 1.0f);
  }

  bool mean() const { return g.reduction == Reduction::kMean; }

  int64_t padded(int64_t n) const { return round_up(n, kernels.row_step(g.dtype, mean())); }

  Packing packing(const Tokens& from, int64_t width, float factor) const {
    return {g.dtype, from, tokens, heads, width, g.padded, real, factor, mean(), nullptr, nullptr};
  }

  // Memory for [B,H,padded,width rounded up] floats.
  Tensor room(const Tensor& like, int64_t width, int64_t chunks = 1) const {
    return floats_like(like, batch * heads * chunks * g.padded * padded(width));
  }

  void pack(const Packing& p) const {
    parallel(batch * heads, 8, [&](int64_t begin, int64_t end) {
      kernels.pack(p, begin, end, scratch(p.padded * padded(p.width)));
    });
  }

  void unpack(const Unpacking& u) const {
    parallel(batch * heads, 8, [&](int64_t begin, int64_t end) {
      kernels.unpack(u, begin, end, scratch(padded(u.width)));
    });
  }

  Unpacking unpacking(int64_t width, double factor, const MaybeTensor& to) const {
    return {g.dtype, tokens, heads, width, g.padded, g.chunks, real, static_cast<float>(factor),
            mean(),  nullptr, to ? to->mutable_data_ptr() : nullptr};
  }
};

int64_t bytes_of(const MaybeTensor& x) {
  return x ? x->numel() * static_cast<int64_t>(x->element_size()) : 0;
}

void forward(Tensor query, Tensor key, MaybeTensor value, MaybeTensor gate_value,
             MaybeTensor key_mask, MaybeTensor bias, double scale, int64_t reduction,
             MaybeTensor out, MaybeTensor gate) {
  Call call(query, key, value, gate_value, key_mask, bias, scale, reduction);
  Arguments& g = call.g;
  const Tensor keys = call.room(query, g.width);
  g.key.columns = floats_of(keys);
  call.pack(g.key);
  MaybeTensor gate_values;
  if (g.per_channel) {
    gate_values = call.room(query, g.channels);
    g.gate_value.rows = floats_of(gate_values);
    call.pack(g.gate_value);
  }
  g.out = out ? out->mutable_data_ptr() : nullptr;
  g.gate = gate ? gate->mutable_data_ptr() : nullptr;
  g.stream = bytes_of(out) >= kStreamBytes;
  const int64_t blocks = (g.length + kBlock - 1) / kBlock;
  parallel(g.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    call.kernels.forward(g, begin, end, scratch(call.kernels.forward_scratch(g)));
  });
}

// Sums over L are formed in chunks, of which there are enough for many threads, and as many for any
// number of threads: so the bits do not depend on it.
constexpr int64_t kTasks = 24;

void backward(MaybeTensor grad_out, MaybeTensor grad_gate, Tensor query, Tensor key,
              MaybeTensor value, MaybeTensor gate_value, MaybeTensor key_mask, MaybeTensor bias,
              double scale, int64_t reduction, MaybeTensor grad_query, MaybeTensor grad_key,
              MaybeTensor grad_value, MaybeTensor grad_gate_value, MaybeTensor grad_bias) {
  Call call(query, key, value, gate_value, key_mask, bias, scale, reduction);
  Arguments& g = call.g;
  g.grad_out = tokens_of(grad_out);
  g.grad_gate = tokens_of(grad_gate);
  g.grad_query = grad_query ? grad_query->mutable_data_ptr() : nullptr;
  g.grad_value = grad_value ? grad_value->mutable_data_ptr() : nullptr;
  g.stream = bytes_of(grad_query) + bytes_of(grad_value) >= kStreamBytes;
  const int64_t groups = g.batch * ((g.heads + kHeads - 1) / kHeads);
  const int64_t blocks = (g.length + kBlock - 1) / kBlock;
  g.chunks = std::max<int64_t>(
      1, std::min(blocks, (kTasks + groups - 1) / std::max<int64_t>(groups, 1)));
  // If whole groups keep all threads busy, sums of chunks need not be kept for each other.
  const int64_t threads = torch::stable::get_num_threads();
  g.whole = groups % threads == 0 || groups >= 4 * threads;
  g.grad_key = call.unpacking(g.width, scale, grad_key);
  g.grad_gate_value = call.unpacking(g.channels, 1.0, grad_gate_value);

  MaybeTensor key_sums, value_sums, bias_sums;
  if (!g.whole && grad_key) key_sums = call.room(query, g.width, g.chunks);
  if (!g.whole && grad_gate_value) value_sums = call.room(query, g.channels, g.chunks);
  g.grad_key.sums = floats_of(key_sums);
  g.grad_gate_value.sums = floats_of(value_sums);
  const int64_t chunks = g.batch * g.heads * g.chunks;
  const int64_t biases = g.per_channel ? call.padded(g.channels) : 1;
  if (grad_bias) bias_sums = floats_like(query, chunks * biases);
  g.grad_bias = floats_of(bias_sums);
  parallel(groups * (g.whole ? 1 : g.chunks), 1, [&](int64_t begin, int64_t end) {
    call.kernels.backward(g, begin, end, scratch(call.kernels.backward_scratch(g)));
  });

  if (key_sums) call.unpack(g.grad_key);
  if (value_sums) call.unpack(g.grad_gate_value);
  if (grad_bias) {
    const int64_t own = g.per_channel ? g.channels : 1;
    float* to = static_cast<float*>(grad_bias->mutable_data_ptr());
    std::fill(to, to + g.heads * own, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t h = chunk / g.chunks % g.heads;
      for (int64_t c = 0; c < own; ++c) to[h * own + c] += g.grad_bias[chunk * biases + c];
    }
  }
}

}  // namespace
}  // namespace language_gate

STABLE_TORCH_LIBRARY_IMPL(vd, CPU, m) {
  m.impl("_language_gate_cpp", TORCH_BOX(&language_gate::forward));
  m.impl("_language_gate_backward_cpp", TORCH_BOX(&language_gate::backward));
}

// Of all operators. It takes no tensor whose device could tell which kernel to run.
int64_t scratch_bytes() { return scratch_book.tell(); }
STABLE_TORCH_LIBRARY_IMPL(vd, CompositeExplicitAutograd, m) {
  m.impl("_scratch_bytes_cpp", TORCH_BOX(&scratch_bytes));
}

}  // namespace vd
