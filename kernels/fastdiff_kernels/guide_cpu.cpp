// Guidance on a CPU that looks at the whole sample: its sums, three numbers made of them, and the combination.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "types_cpu.hpp"

namespace {

constexpr int BLOCK = 256, LANES = 8;
enum Rule { CFG, RESCALE, APG, ZERO_STAR };

// of c and v, which is c - u, or u itself for ZERO_STAR
struct Sums {
  double c = 0, v = 0, cc = 0, vv = 0, cv = 0;
};

// in fp64, where products of fp32 numbers are exact: a variance is a difference of sums
Sums sums_of(const float* c, const float* u, bool apart, int count) {
  double lanes[5][LANES] = {};
  const auto add = [&](int i, int j) {
    const double x = c[i + j], y = apart ? double(c[i + j] - u[i + j]) : double(u[i + j]);
    lanes[0][j] += x;
    lanes[1][j] += y;
    lanes[2][j] += x * x;
    lanes[3][j] += y * y;
    lanes[4][j] += x * y;
  };
  int i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int j = 0; j < LANES; j++) add(i, j);
  for (int j = 0; i + j < count; j++) add(i, j);
  double all[5] = {};
  for (int k = 0; k < 5; k++)
    for (double lane : lanes[k]) all[k] += lane;
  return {all[0], all[1], all[2], all[3], all[4]};
}

// scales [batch, 3]: k_c, k_d, k_u of every sample, from lift [batch], the weight less 1
void scales_of(const void* c, const void* u, int c_type, int u_type, const float* lift, float* scales, int64_t rule,
               double a, double r, int64_t batch, int64_t n, int threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  std::vector<Sums> parts(batch * blocks);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < batch * blocks; job++) {
    alignas(64) float held[BLOCK], other[BLOCK];
    const int64_t start = job % blocks * BLOCK, at = job / blocks * n + start;
    const int count = int(std::min<int64_t>(BLOCK, n - start));
    parts[job] = sums_of(read(c, c_type, at, count, held), read(u, u_type, at, count, other), rule != ZERO_STAR, count);
  }
  for (int64_t b = 0; b < batch; b++) {
    Sums s;
    for (int64_t i = b * blocks; i < (b + 1) * blocks; i++) {
      const Sums& part = parts[i];
      s = {s.c + part.c, s.v + part.v, s.cc + part.cc, s.vv + part.vv, s.cv + part.cv};
    }
    const double up = lift[b], size = double(n);
    double k_c, k_d, k_u = 1;
    if (rule == RESCALE) {
      const double of_c = s.cc - s.c * s.c / size;
      const double of_g = of_c + up * (2 * (s.cv - s.c * s.v / size) + up * (s.vv - s.v * s.v / size));
      k_c = a * std::sqrt(of_c / of_g) + (1 - a);
      k_d = up * k_c;
    } else if (rule == APG) {
      const double norm = std::sqrt(s.vv), k = r > 0 && !(norm <= r) ? r / norm : 1.0;
      k_c = 1 - up * (1 - a) * k * s.cv / s.cc;
      k_d = up * k;
    } else {
      k_c = 1;
      k_d = up;
      k_u = s.cv / (s.vv + 1e-8);
    }
    const double made[3] = {k_c, k_d, k_u};
    std::copy(made, made + 3, scales + 3 * b);
  }
}

}  // namespace

// scales [batch, 3]: k_c, k_d, k_u of every sample, from lift [batch], the weight less 1; and, unless it is null, out =
// k_c c + k_d (c - k_u u), of c's type. a: rescale or eta; r: the largest norm of c - u, 0: none
extern "C" void guide(const void* c, const void* u, const float* lift, float* scales, void* out, int64_t c_type,
                      int64_t u_type, int64_t rule, float a, float r, int64_t batch, int64_t n, int64_t threads) {
  if (rule == CFG)
    for (int64_t b = 0; b < batch; b++) scales[3 * b] = scales[3 * b + 2] = 1.0f, scales[3 * b + 1] = lift[b];
  else
    scales_of(c, u, int(c_type), int(u_type), lift, scales, rule, a, r, batch, n, int(threads));
  if (!out) return;
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < batch * blocks; job++) {
    alignas(64) float held[BLOCK], other[BLOCK], y[BLOCK];
    const int64_t b = job / blocks, start = job % blocks * BLOCK, at = b * n + start;
    const int count = int(std::min<int64_t>(BLOCK, n - start));
    const float k_c = scales[3 * b], k_d = scales[3 * b + 1], k_u = scales[3 * b + 2];
    const float *from = read(c, int(c_type), at, count, held), *less = read(u, int(u_type), at, count, other);
    for (int i = 0; i < count; i++) y[i] = k_c * from[i] + k_d * (from[i] - k_u * less[i]);
    write(y, 1.0f, out, int(c_type), at, count);
  }
}
