// The binned readout on a CPU: a Gaussian per element as one of K bins of [-1, 1], or as their mean.
//
// The mean is 1 - (1 + 2 T) / K with T the sum of Phi over the inner edges, by the formulas of binned.py.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "exp_cpu.hpp"
#include "types_cpu.hpp"

namespace {

constexpr int BLOCK = 256, FEW = 8, NEAREST = 5;

// the nearest integer of a number within 2^21, which std::rint is no vector code for
inline float nearest_of(float v) { return (v + 12582912.0f) - 12582912.0f; }

// total = the sum over the edges j = 1 .. bins - 1
void few(const float* mean, const float* deviation, int bins, float width, float* total, int count) {
  std::fill(total, total + count, 0.0f);
  for (int j = 1; j < bins; j++)
    for (int i = 0; i < count; i++) total[i] += normal_cdf((float(j) * width - 1.0f - mean[i]) / deviation[i]);
}

// the same where edges are more than a std apart: all but the nearest give 0 or 1
void sparse(const float* mean, const float* deviation, int bins, float width, float* total, int count) {
  const float last = float(bins - 1);
  float middle[BLOCK];
  for (int i = 0; i < count; i++) {
    middle[i] = nearest_of(clamp((mean[i] + 1.0f) / width, 0.0f, last));
    total[i] = clamp(last - NEAREST - middle[i], 0.0f, last);
  }
  for (int near = -NEAREST; near <= NEAREST; near++)
    for (int i = 0; i < count; i++) {
      const float j = middle[i] + float(near), value = normal_cdf((j * width - 1.0f - mean[i]) / deviation[i]);
      total[i] += pick((j >= 1.0f) & (j <= last), value, 0.0f);
    }
}

// Phi of an end, E max(0, n - |z|) and the sum of odd derivatives, for steps of h
struct End {
  float phi, beyond, bend;
};

inline End end_of_sum(float z, float h) {
  z = clamp(z, -20.0f, 20.0f);
  const float size = std::fabs(z), q = z * z, h2 = h * h, e = exp_of(-0.5f * q), low = tail(size, e);
  const float dense = 0.39894228f * e;
  const float he2 = q - 1.0f, he4 = (q - 6.0f) * q + 3.0f, he6 = ((q - 15.0f) * q + 45.0f) * q - 15.0f;
  const float bend =
      ((he6 * (-1.0f / 1209600) * h2 + he4 * (1.0f / 30240)) * h2 - he2 * (1.0f / 720)) * h2 + 1.0f / 12;
  return {pick(z > 0, 1.0f - low, low), dense - size * low, dense * bend * h};
}

// the same where edges are at most a std apart
void close(const float* mean, const float* deviation, int bins, float width, float* total, int count) {
  const float last = float(bins - 1);
  float between[BLOCK];
  for (int i = 0; i < count; i++) {
    const float one = 1.0f / deviation[i], h = width * one;
    const End low = end_of_sum((width - 1.0f - mean[i]) * one, h), high = end_of_sum((1.0f - width - mean[i]) * one, h);
    between[i] = clamp(last - (mean[i] + 1.0f) / width, 0.0f, last - 1.0f) +
                 (high.beyond - low.beyond) * deviation[i] / width;
    total[i] = 0.5f * (low.phi + high.phi) + (high.bend - low.bend);
  }
  if (std::any_of(deviation, deviation + count, [](float s) { return s >= 1.0f; })) {
    // there that difference would lose digits, and Phi is smooth: Gauss and Legendre's six points
    constexpr float POINT[3] = {0.23861919f, 0.66120939f, 0.93246951f};
    constexpr float WEIGHT[3] = {0.23395697f, 0.18038079f, 0.08566225f};
    float smooth[BLOCK] = {};
    for (int k = 0; k < 6; k++) {
      const float point = (k % 2 ? -POINT[k / 2] : POINT[k / 2]) * (1.0f - width), weight = WEIGHT[k / 2];
      for (int i = 0; i < count; i++) smooth[i] += weight * normal_cdf((point - mean[i]) / deviation[i]);
    }
    for (int i = 0; i < count; i++) between[i] = pick(deviation[i] >= 1.0f, smooth[i] * (last - 1.0f), between[i]);
  }
  for (int i = 0; i < count; i++) total[i] += between[i];
}

void bin_mean(const float* mean, const float* deviation, int bins, float width, float* p, int count) {
  float total[BLOCK], other[BLOCK];
  if (bins <= FEW + 1) {
    few(mean, deviation, bins, width, total, count);
  } else {
    close(mean, deviation, bins, width, total, count);
    if (std::any_of(deviation, deviation + count, [&](float s) { return s < width; })) {
      sparse(mean, deviation, bins, width, other, count);
      for (int i = 0; i < count; i++) total[i] = pick(deviation[i] < width, other[i], total[i]);
    }
  }
  for (int i = 0; i < count; i++) {
    const float made = 1.0f - 0.5f * width - width * total[i];
    p[i] = pick((mean[i] == mean[i]) & (deviation[i] == deviation[i]), made, NAN);
  }
}

}  // namespace

// out [batch, n] from x [batch, n] and m [batch, 2 n], means and logarithms of stds; of normals n [batch, n] the bin they
// fall into, without them the mean. coef [batch, 2], or of all samples: c_skip, c_out
extern "C" void binned(const float* x, const void* m, const float* coef, const float* noise, float* out, int64_t m_type,
                       int64_t each, int64_t bins, int64_t batch, int64_t n, int64_t threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  const float width = 2.0f / float(bins), last = float(bins - 1);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < batch * blocks; job++) {
    alignas(64) float held[BLOCK], mean[BLOCK], deviation[BLOCK];
    const int64_t b = job / blocks, start = job % blocks * BLOCK, at = b * n + start;
    const int count = int(std::min<int64_t>(BLOCK, n - start));
    const float *c = coef + (each ? 2 * b : 0), size = std::fabs(c[1]);
    const float* m0 = read(m, int(m_type), 2 * b * n + start, count, held);
    for (int i = 0; i < count; i++) mean[i] = c[0] * x[at + i] + c[1] * m0[i];
    const float* m1 = read(m, int(m_type), (2 * b + 1) * n + start, count, held);
    for (int i = 0; i < count; i++) deviation[i] = size * exp_of(m1[i]);
    if (!noise) {
      bin_mean(mean, deviation, int(bins), width, out + at, count);
      continue;
    }
    for (int i = 0; i < count; i++) {
      const float v = clamp((mean[i] + deviation[i] * noise[at + i] + 1.0f) / width, 0.0f, last);  // NaN passes
      const float near = nearest_of(v), bin = near - pick(near > v, 1.0f, 0.0f);
      out[at + i] = bin * width + (0.5f * width - 1.0f);
    }
  }
}
