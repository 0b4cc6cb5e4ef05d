// Dynamic thresholding on a CPU: an order statistic of |x0| a sample, found by counting the leading bits; and its use.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "types_cpu.hpp"

namespace {

constexpr int BLOCK = 256, SHIFT = 20, BINS = 1 << (32 - 1 - SHIFT);
constexpr uint32_t INFINITE = 0x7F800000u;

float as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// the k-th smallest of n magnitudes (bits of non-negative floats, ordered as they are) and the next one; NaN if one is
void select(const uint32_t* v, int64_t n, int64_t k, float& low, float& high) {
  std::vector<int64_t> counts(BINS);
  uint32_t most = 0;
  for (int64_t i = 0; i < n; i++) {
    counts[v[i] >> SHIFT]++;
    most = std::max(most, v[i]);
  }
  if (most > INFINITE) return void(low = high = as_float(most));
  uint32_t bin = 0;
  for (; k >= counts[bin]; bin++) k -= counts[bin];
  std::vector<uint32_t> inside;
  inside.reserve(counts[bin]);
  uint32_t next = most;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t of = v[i] >> SHIFT;
    if (of == bin) inside.push_back(v[i]);
    if (of > bin) next = std::min(next, v[i]);
  }
  std::nth_element(inside.begin(), inside.begin() + k, inside.end());
  if (k + 1 < int64_t(inside.size())) next = *std::min_element(inside.begin() + k + 1, inside.end());
  low = as_float(inside[k]);
  high = as_float(next);
}

}  // namespace

// bound [batch] = clamp(the quantile of |x0|, 1, maximum), between ranks k and k + 1; x0 = x, or, with m,
// c_skip (x + c_ratio (m guided)): row, scales [batch, 3] with u
extern "C" void threshold_bound(const void* x, const void* m, const float* row, const void* u, const float* scales,
                                float* bound, int64_t x_type, int64_t m_type, int64_t u_type, int64_t k, float fraction,
                                float maximum, int64_t batch, int64_t n, int64_t threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  std::vector<uint32_t> sizes(batch * n);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < batch * blocks; job++) {
    alignas(64) float held[BLOCK], other[BLOCK], third[BLOCK], y[BLOCK];
    const int64_t b = job / blocks, start = job % blocks * BLOCK, at = b * n + start;
    const int count = int(std::min<int64_t>(BLOCK, n - start));
    const float* from = read(x, int(x_type), at, count, held);
    std::copy(from, from + count, y);
    if (m) {
      const float* given = read(m, int(m_type), at, count, other);
      if (u) {
        const float *k = scales + 3 * b, *less = read(u, int(u_type), at, count, third);
        for (int i = 0; i < count; i++) other[i] = k[0] * given[i] + k[1] * (given[i] - k[2] * less[i]);
        given = other;
      }
      for (int i = 0; i < count; i++) y[i] += row[1] * given[i];
    }
    for (int i = 0; i < count; i++) y[i] = std::fabs(y[i]);
    std::memcpy(sizes.data() + at, y, sizeof(float) * count);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < batch; b++) {
    float low, high;
    select(sizes.data() + b * n, n, k, low, high);
    const float s = (fraction == 0 || low == high ? low : low + fraction * (high - low)) * (m ? std::fabs(row[0]) : 1.0f);
    bound[b] = s < 1.0f ? 1.0f : s > maximum ? maximum : s;
  }
}

// out = clamp(x0, -s, s) / s, of x0's type
extern "C" void threshold(const void* x0, const float* bound, void* out, int64_t type, int64_t batch, int64_t n,
                          int64_t threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < batch * blocks; job++) {
    alignas(64) float held[BLOCK], y[BLOCK];
    const int64_t b = job / blocks, start = job % blocks * BLOCK, at = b * n + start;
    const int count = int(std::min<int64_t>(BLOCK, n - start));
    const float *from = read(x0, int(type), at, count, held), s = bound[b];
    for (int i = 0; i < count; i++) y[i] = (from[i] < -s ? -s : from[i] > s ? s : from[i]) / s;
    write(y, 1.0f, out, int(type), at, count);
  }
}
