// "lapsum": a soft set of size K, solved exactly.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iterator>
#include <vector>

namespace vd {
namespace topk_sampling {

// The threshold b at which the Laplace distribution functions F((x - b) / alpha) of the scores sum
// to k. Sorts the scores; there are more than k of them.
//
// Between two neighbours x_j >= b >= x_{j+1} (j scores above b) the sum is
//   j - above/2 e^-(x_j - b)/alpha + below/2 e^-(b - x_{j+1})/alpha,
// above = sum over i <= j of e^-(x_i - x_j)/alpha, below alike: quadratic in e^(b/alpha). Distances
// are taken from the neighbours, so that nothing overflows.
inline double solve_lapsum(std::vector<double>* scores, int64_t k, double alpha) {
  std::vector<double>& x = *scores;
  const int64_t n = static_cast<int64_t>(x.size());
  std::sort(x.begin(), x.end(), std::greater<double>());
  const auto gap = [&](int64_t j) { return (x[j - 1] - x[j]) / alpha; };

  std::vector<double> below_of(n + 1, 0.0);  // of the scores from j on
  for (int64_t j = n - 1; j >= 0; --j) {
    below_of[j] = 1.0 + (j + 1 < n ? below_of[j + 1] * std::exp(-gap(j + 1)) : 0.0);
  }
  double above = 0.0;
  int64_t j = 0;
  for (; j < n; ++j) {
    // With b at x_j the sum is j - above/2 e^-gap + below/2; more when b lies lower.
    const double shrunk = j > 0 ? above * std::exp(-gap(j)) : 0.0;
    if (j + 0.5 * (below_of[j] - shrunk) >= k) break;
    above = 1.0 + shrunk;
  }
  const double below = below_of[j];
  const double missing = static_cast<double>(k - j);
  if (missing == 0) {  // both tails are equal, however small
    return 0.5 * (x[j - 1] + x[j] - alpha * std::log(above / below));
  }
  const double both = 0 < j && j < n ? above * below * std::exp(-gap(j)) : 0.0;
  const double size = std::abs(missing) + std::sqrt(missing * missing + both);
  return missing > 0 ? x[j] + alpha * std::log(below / size)
                     : x[j - 1] - alpha * std::log(above / size);
}

// Frames of one row whose weight can change, and their b.
struct Lapsum {
  std::vector<double> sorted;
  double threshold = 0.0;
  bool free = false;  // else all real frames are chosen

  void solve(const float* scores, int64_t frames, int64_t k, double alpha) {
    sorted.clear();
    std::copy_if(scores, scores + frames, std::back_inserter(sorted),
                 [](float x) { return x > -INFINITY; });
    free = static_cast<int64_t>(sorted.size()) > k;
    if (free) threshold = solve_lapsum(&sorted, k, alpha);
  }
};

inline void lapsum_row(const float* scores, int64_t frames, int64_t k, double alpha, Lapsum* row,
                       float* weights) {
  row->solve(scores, frames, k, alpha);
  for (int64_t t = 0; t < frames; ++t) {
    if (!(scores[t] > -INFINITY)) {
      weights[t] = 0.0f;
    } else if (!row->free) {
      weights[t] = 1.0f;
    } else {
      const double offset = (scores[t] - row->threshold) / alpha;
      const double tail = 0.5 * std::exp(-std::abs(offset));
      weights[t] = static_cast<float>(offset < 0 ? tail : 1.0 - tail);
    }
  }
}

// With q the Laplace density: q (G - sum q G / sum q).
inline void lapsum_backward_row(const float* grad, const float* scores, int64_t frames, int64_t k,
                                double alpha, Lapsum* row, float* to) {
  std::fill(to, to + frames, 0.0f);
  row->solve(scores, frames, k, alpha);
  if (!row->free) return;
  const auto distance = [&](int64_t t) { return std::abs(scores[t] - row->threshold) / alpha; };
  // The ratio of the sums with the largest q scaled to 1: all q may underflow, but not it.
  double nearest = INFINITY;
  for (int64_t t = 0; t < frames; ++t) nearest = std::min(nearest, distance(t));
  double total = 0.0, with_grad = 0.0;
  std::vector<double>& shares = row->sorted;  // no longer needed as such
  shares.resize(frames);
  for (int64_t t = 0; t < frames; ++t) {
    const bool real = scores[t] > -INFINITY;
    shares[t] = real ? std::exp(nearest - distance(t)) : 0.0;
    total += shares[t];
    with_grad += real ? shares[t] * grad[t] : 0.0;
  }
  const double mean = with_grad / total, density = std::exp(-nearest) / (2 * alpha);
  for (int64_t t = 0; t < frames; ++t) {
    if (scores[t] > -INFINITY) to[t] = static_cast<float>(density * shares[t] * (grad[t] - mean));
  }
}

}  // namespace topk_sampling
}  // namespace vd
