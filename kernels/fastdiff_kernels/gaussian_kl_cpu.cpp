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
template <bool TAME>
inline void exp_minus_line(float d, float& bend, float& grown) {
  const float near = d * ((((d * (1.0f / 720) + 1.0f / 120) * d + 1.0f / 24) * d + 1.0f / 6) * d + 0.5f);
  const bool small = std::fabs(d) < 0.25f;
  const float all = expm1_of<TAME>(d);
  bend = pick(small, near * d, all - d);
  grown = pick(small, near * d + d, all);
}

// are all exponents of a block within 80 of 0, where an exponential is a normal number? NaN is not
inline bool tame(const float* l1, const float* l2, int count) {
  uint32_t worst = 0;
  for (int i = 0; i < count; i++) {
    const float d = l1[i] - l2[i];
    uint32_t a, b;
    std::memcpy(&a, &d, 4);
    std::memcpy(&b, &l2[i], 4);
    a &= 0x7FFFFFFF;
    b &= 0x7FFFFFFF;
    a = a > b ? a : b;
    worst = worst > a ? worst : a;
  }
  return worst < 0x42A00000;  // the bits of 80
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

// a block of a sample: mean1, log1, mean2, log2
struct Block {
  int64_t b, at;
  int count;
  const float* v[4];
};

template <class Each>
void each_block(const Values (&values)[4], int64_t batch, int64_t n, int64_t threads, Each each) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < batch * blocks; job++) {
    alignas(64) float room[4][BLOCK];
    const int64_t b = job / blocks, start = job % blocks * BLOCK;
    Block block{b, b * n + start, int(std::min<int64_t>(BLOCK, n - start)), {}};
    for (int k = 0; k < 4; k++) block.v[k] = values[k].of(b, block.at, block.count, room[k]);
    each(job, block);
  }
}

}  // namespace

// kl [batch]
extern "C" void gaussian_kl(const void* mean1, const void* log1, const void* mean2, const void* log2, float* kl,
                            int64_t mean1_type, int64_t log1_type, int64_t log1_full, int64_t mean2_type,
                            int64_t log2_type, int64_t log2_full, int64_t batch, int64_t n, int64_t threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  std::vector<double> sums(batch * blocks);
  const Values values[4] = {{mean1, mean1_type, 1}, {log1, log1_type, log1_full},
                            {mean2, mean2_type, 1}, {log2, log2_type, log2_full}};
  each_block(values, batch, n, threads, [&](int64_t job, const Block& block) {
    alignas(64) float value[BLOCK];
    const float *m1 = block.v[0], *l1 = block.v[1], *m2 = block.v[2], *l2 = block.v[3];
    const auto fill = [&]<bool TAME>() {
      for (int i = 0; i < block.count; i++) {
        float bend, grown;
        exp_minus_line<TAME>(l1[i] - l2[i], bend, grown);
        const float apart = m2[i] - m1[i];
        value[i] = bend + apart * exp_of<TAME>(-l2[i]) * apart;
      }
    };
    tame(l1, l2, block.count) ? fill.template operator()<true>() : fill.template operator()<false>();
    std::fill(value + block.count, value + BLOCK, 0.0f);
    double lanes[LANES] = {}, all = 0;
    for (int i = 0; i < BLOCK; i += LANES)
      for (int j = 0; j < LANES; j++) lanes[j] += value[i + j];
    for (double lane : lanes) all += lane;
    sums[job] = 0.5 * all;
  });
  for (int64_t b = 0; b < batch; b++) {
    double all = 0;
    for (int64_t i = b * blocks; i < (b + 1) * blocks; i++) all += sums[i];
    kl[b] = float(all / double(n));
  }
}

// of_mean and of_log [batch, n], unless null: g[b] times d kl / d mean2 and d / d log2
extern "C" void gaussian_kl_slopes(const void* mean1, const void* log1, const void* mean2, const void* log2,
                                   const float* g, void* of_mean, void* of_log, int64_t mean1_type, int64_t log1_type,
                                   int64_t log1_full, int64_t mean2_type, int64_t log2_type, int64_t log2_full,
                                   int64_t of_log_type, int64_t batch, int64_t n, int64_t threads) {
  const Values values[4] = {{mean1, mean1_type, 1}, {log1, log1_type, log1_full},
                            {mean2, mean2_type, 1}, {log2, log2_type, log2_full}};
  each_block(values, batch, n, threads, [&](int64_t, const Block& block) {
    alignas(64) float pulls[BLOCK], slope[BLOCK];
    const float *m1 = block.v[0], *l1 = block.v[1], *m2 = block.v[2], *l2 = block.v[3], scale = g[block.b] / float(n);
    const auto fill = [&]<bool TAME>() {
      for (int i = 0; i < block.count; i++) {
        float bend, grown;
        exp_minus_line<TAME>(l1[i] - l2[i], bend, grown);
        const float apart = m2[i] - m1[i];
        pulls[i] = apart * exp_of<TAME>(-l2[i]);
        slope[i] = grown + pulls[i] * apart;
      }
    };
    tame(l1, l2, block.count) ? fill.template operator()<true>() : fill.template operator()<false>();
    if (of_mean) write(pulls, scale, of_mean, int(mean2_type), block.at, block.count);
    if (of_log) write(slope, -0.5f * scale, of_log, int(of_log_type), block.at, block.count);
  });
}
