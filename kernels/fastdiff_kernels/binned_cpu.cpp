// The binned readout on a CPU: a Gaussian per element as one of K bins of [-1, 1], or as their mean.
//
// The mean is 1 - (1 + 2 T) / K with T the sum of Phi over the inner edges, by the formulas of binned.py.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "exp_cpu.hpp"
#include "types_cpu.hpp"

namespace {

constexpr int BLOCK = 256, FEW = 20, NEAREST = 6;

float clamp(float v, float lo, float hi) { return v < lo ? lo : v > hi ? hi : v; }

// total = the sum over the edges j = 1 .. bins - 1
void few(const float* mean, const float* deviation, int bins, float width, float* total, int count) {
  std::fill(total, total + count, 0.0f);
  for (int j = 1; j < bins; j++)
    for (int i = 0; i < count; i++) total[i] += normal_cdf((float(j) * width - 1.0f - mean[i]) / deviation[i]);
}

// the same where edges are more than a std apart: all but the nearest give 0 or 1
void sparse(const float* mean, const float* deviation, int bins, float width, float* total, int count) {
  const float last = float(bins - 1);
  for (int i = 0; i < count; i++) {
    const float nearest = std::floor((mean[i] + 1.0f) / width + 0.5f);
    total[i] = clamp(last - NEAREST - nearest, 0.0f, last);
  }
  for (int near = -NEAREST; near <= NEAREST; near++)
    for (int i = 0; i < count; i++) {
      const float j = std::floor((mean[i] + 1.0f) / width + 0.5f) + float(near);
      const float value = normal_cdf((j * width - 1.0f - mean[i]) / deviation[i]);
      total[i] += j >= 1.0f && j <= last ? value : 0.0f;
    }
}

// Phi of an end, E max(0, n - |z|) and the sum of odd derivatives, for steps of h
struct End {
  float phi, beyond, bend;
};

inline End end_of_sum(float z, float h) {
  z = clamp(z, -20.0f, 20.0f);
  const float size = std::fabs(z), q = z * z, h2 = h * h, dense = density(z), low = tail(size);
  const float he2 = q - 1.0f, he4 = (q - 6.0f) * q + 3.0f, he6 = ((q - 15.0f) * q + 45.0f) * q - 15.0f;
  const float he8 = (((q - 28.0f) * q + 210.0f) * q - 420.0f) * q + 105.0f;
  float bend = he8 * (1.0f / 47900160) * h2 - he6 * (1.0f / 1209600);
  bend = ((bend * h2 + he4 * (1.0f / 30240)) * h2 - he2 * (1.0f / 720)) * h2 + 1.0f / 12;
  return {z > 0 ? 1.0f - low : low, dense - size * low, dense * bend * h};
}

// the same where edges are at most a std apart; SMOOTH: of a std of 1 or more
template <bool SMOOTH>
void dense(const float* mean, const float* deviation, int bins, float width, float* total, int count) {
  constexpr float POINT[3] = {0.23861919f, 0.66120939f, 0.93246951f}, WEIGHT[3] = {0.23395697f, 0.18038079f, 0.08566225f};
  const float last = float(bins - 1);
  for (int i = 0; i < count; i++) {
    const float one = 1.0f / deviation[i], h = width * one, centre = -mean[i] * one, reach = (1.0f - width) * one;
    const End low = end_of_sum((width - 1.0f - mean[i]) * one, h), high = end_of_sum((1.0f - width - mean[i]) * one, h);
    float between = 0.0f;
    if (SMOOTH)
      for (int k = 0; k < 3; k++)
        between += (last - 1.0f) * WEIGHT[k] *
                   (normal_cdf(centre - POINT[k] * reach) + normal_cdf(centre + POINT[k] * reach));
    else
      between = clamp(last - (mean[i] + 1.0f) / width, 0.0f, last - 1.0f) +
                (high.beyond - low.beyond) * deviation[i] / width;
    total[i] = between + 0.5f * (low.phi + high.phi) + (high.bend - low.bend);
  }
}

void bin_mean(const float* mean, const float* deviation, int bins, float width, float* p, int count) {
  float total[BLOCK], other[BLOCK];
  const auto fill = [&](auto sum, auto where) {
    if (std::none_of(deviation, deviation + count, where)) return;
    sum(mean, deviation, bins, width, other, count);
    for (int i = 0; i < count; i++) total[i] = where(deviation[i]) ? other[i] : total[i];
  };
  if (bins <= FEW + 1) {
    few(mean, deviation, bins, width, total, count);
  } else {
    fill(sparse, [&](float s) { return !(s >= width); });
    fill(dense<false>, [&](float s) { return s >= width && s < 1.0f; });
    fill(dense<true>, [&](float s) { return s >= 1.0f; });
  }
  for (int i = 0; i < count; i++) {
    const float made = 1.0f - 0.5f * width - width * total[i];
    p[i] = mean[i] == mean[i] && deviation[i] == deviation[i] ? made : NAN;
  }
}

}  // namespace

// out [batch, n] from x [batch, n] and m [batch, 2 n], means and logarithms of stds; of normals n [batch, n] the bin they
// fall into, without them the mean. A row: c_skip, c_out
extern "C" void binned(const float* x, const void* m, const float* coef, const int64_t* row, const float* noise,
                       float* out, int64_t m_type, int64_t row_each, int64_t bins, int64_t batch, int64_t n,
                       int64_t threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  const float width = 2.0f / float(bins), last = float(bins - 1);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < batch * blocks; job++) {
    alignas(64) float held[BLOCK], mean[BLOCK], deviation[BLOCK];
    const int64_t b = job / blocks, start = job % blocks * BLOCK, at = b * n + start;
    const int count = int(std::min<int64_t>(BLOCK, n - start));
    const float *c = coef + 2 * row[row_each ? b : 0], size = std::fabs(c[1]);
    const float* m0 = read(m, int(m_type), 2 * b * n + start, count, held);
    for (int i = 0; i < count; i++) mean[i] = c[0] * x[at + i] + c[1] * m0[i];
    const float* m1 = read(m, int(m_type), (2 * b + 1) * n + start, count, held);
    for (int i = 0; i < count; i++) deviation[i] = size * exp_of(m1[i]);
    if (!noise) {
      bin_mean(mean, deviation, int(bins), width, out + at, count);
      continue;
    }
    for (int i = 0; i < count; i++) {
      const float bin = std::floor((mean[i] + deviation[i] * noise[at + i] + 1.0f) / width);
      out[at + i] = clamp(bin, 0.0f, last) * width + (0.5f * width - 1.0f);
    }
  }
}
