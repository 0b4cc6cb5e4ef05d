// KL of two diagonal Gaussians on a CPU, summed over a sample, and its gradient to the second one: gaussian_kl.py's.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "exp_cpu.hpp"
#include "types_cpu.hpp"

namespace {

constexpr int BLOCK = 256, LANES = 8;

// (e^d - 1 - d, e^d - 1), by the series where they cancel
inline void exp_minus_line(float d, float& bend, float& grown) {
  const float near = d * ((((d * (1.0f / 720) + 1.0f / 120) * d + 1.0f / 24) * d + 1.0f / 6) * d + 0.5f);
  const bool small = std::fabs(d) < 0.25f;
  const float all = expm1_of(d);
  bend = small ? near * d : all - d;
  grown = small ? near * d + d : all;
}

// a mean's or a log-variance's numbers: [batch, n], or one a sample
struct Values {
  const void* from;
  int64_t type, full;

  const float* of(int64_t b, int64_t at, int count, float* room) const {
    if (full) return read(from, int(type), at, count, room);
    std::fill(room, room + count, static_cast<const float*>(from)[b]);
    return room;
  }
};

}  // namespace

// kl [batch]; of_mean and of_log, unless null: d / d mean2 and d / d log2 [batch, n] of their types
extern "C" void gaussian_kl(const void* mean1, const void* log1, const void* mean2, const void* log2, float* kl,
                            void* of_mean, void* of_log, int64_t mean1_type, int64_t log1_type, int64_t log1_full,
                            int64_t mean2_type, int64_t log2_type, int64_t log2_full, int64_t slope_type,
                            int64_t batch, int64_t n, int64_t threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  std::vector<double> sums(batch * blocks);
  const Values values[4] = {{mean1, mean1_type, 1}, {log1, log1_type, log1_full},
                            {mean2, mean2_type, 1}, {log2, log2_type, log2_full}};
  const float scale = 1.0f / float(n);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < batch * blocks; job++) {
    alignas(64) float room[4][BLOCK], value[BLOCK] = {}, slope[BLOCK], pulls[BLOCK];
    const int64_t b = job / blocks, start = job % blocks * BLOCK, at = b * n + start;
    const int count = int(std::min<int64_t>(BLOCK, n - start));
    const float* v[4];
    for (int k = 0; k < 4; k++) v[k] = values[k].of(b, at, count, room[k]);
    for (int i = 0; i < count; i++) {
      float bend, grown;
      exp_minus_line(v[1][i] - v[3][i], bend, grown);
      const float apart = v[2][i] - v[0][i], pull = apart * exp_of(-v[3][i]), square = pull * apart;
      value[i] = 0.5f * (bend + square);
      pulls[i] = scale * pull;
      slope[i] = -0.5f * scale * (grown + square);
    }
    if (of_mean) write(pulls, 1.0f, of_mean, int(slope_type), at, count);
    if (of_log) write(slope, 1.0f, of_log, int(slope_type), at, count);
    double lanes[LANES] = {}, all = 0;
    for (int i = 0; i < BLOCK; i += LANES)
      for (int j = 0; j < LANES; j++) lanes[j] += value[i + j];
    for (double lane : lanes) all += lane;
    sums[job] = all;
  }
  for (int64_t b = 0; b < batch; b++) {
    double all = 0;
    for (int64_t i = b * blocks; i < (b + 1) * blocks; i++) all += sums[i];
    kl[b] = float(all / double(n));
  }
}
