// Guidance on a CPU that looks at the whole sample: its sums, three numbers made of them, and the combination.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "types_cpu.hpp"

namespace {

constexpr int BLOCK = 256, LANES = 16;
constexpr int64_t HELD = 1 << 17;  // elements that two passes find in a cache
enum Rule { CFG, RESCALE, APG, ZERO_STAR };

// of c and v, which is c - u, or u itself for ZERO_STAR; the first two for RESCALE alone
struct Sums {
  double c = 0, v = 0, cc = 0, vv = 0, cv = 0;
};

// the mean of the first few, which the sums of RESCALE are taken about: a variance is a difference of sums
float near(const float* x, int count) {
  float total = 0;
  const int few = std::min(count, LANES);
  for (int i = 0; i < few; i++) total += x[i];
  return total / few;
}

// a block's, in fp32 about `near`; what that took away is put back in fp64
template <Rule rule>
Sums sums_of(const float* c, const float* u, int count) {
  float x[LANES] = {}, y[LANES] = {}, xx[LANES] = {}, yy[LANES] = {}, xy[LANES] = {};
  const float s = rule == RESCALE ? near(c, count) : 0, t = rule == RESCALE ? s - near(u, count) : 0;
  const auto add = [&](int i, int j) {
    float of_c = c[i + j], of_v = rule == ZERO_STAR ? u[i + j] : of_c - u[i + j];
    if constexpr (rule == RESCALE) {
      of_c -= s, of_v -= t;
      x[j] += of_c, y[j] += of_v;
    }
    if constexpr (rule != ZERO_STAR) xx[j] += of_c * of_c;
    yy[j] += of_v * of_v;
    xy[j] += of_c * of_v;
  };
  int i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int j = 0; j < LANES; j++) add(i, j);
  for (int j = 0; i + j < count; j++) add(i, j);
  Sums all;
  for (int j = 0; j < LANES; j++) all.c += x[j], all.v += y[j], all.cc += xx[j], all.vv += yy[j], all.cv += xy[j];
  const double a = s, b = t;
  all.cc += a * (2 * all.c + count * a);
  all.vv += b * (2 * all.v + count * b);
  all.cv += a * all.v + b * all.c + count * a * b;
  all.c += count * a;
  all.v += count * b;
  return all;
}

// scales [batch, 3]: k_c, k_d, k_u of samples first .. last, from w, a weight or one a sample (each: 1)
template <Rule rule>
void scales_of(const void* c, const void* u, int c_type, int u_type, const float* w, int64_t each, float* scales,
               double a, double r, int64_t first, int64_t last, int64_t n, int threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK, begin = first * blocks, end = last * blocks;
  std::vector<Sums> parts(end - begin);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = begin; job < end; job++) {
    alignas(64) float held[BLOCK], other[BLOCK];
    const int64_t start = job % blocks * BLOCK, at = job / blocks * n + start;
    const int count = int(std::min<int64_t>(BLOCK, n - start));
    parts[job - begin] = sums_of<rule>(read(c, c_type, at, count, held), read(u, u_type, at, count, other), count);
  }
  for (int64_t b = first; b < last; b++) {
    Sums s;
    for (int64_t i = (b - first) * blocks; i < (b + 1 - first) * blocks; i++) {
      const Sums& part = parts[i];
      s = {s.c + part.c, s.v + part.v, s.cc + part.cc, s.vv + part.vv, s.cv + part.cv};
    }
    const double up = w[each * b] - 1.0f, size = double(n);
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

// out = k_c c + k_d (c - k_u u) of samples first .. last
void combine(const void* c, const void* u, int c_type, int u_type, const float* scales, void* out, int64_t first,
             int64_t last, int64_t n, int threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = first * blocks; job < last * blocks; job++) {
    alignas(64) float held[BLOCK], other[BLOCK], y[BLOCK];
    const int64_t b = job / blocks, start = job % blocks * BLOCK, at = b * n + start;
    const int count = int(std::min<int64_t>(BLOCK, n - start));
    const float k_c = scales[3 * b], k_d = scales[3 * b + 1], k_u = scales[3 * b + 2];
    const float *from = read(c, c_type, at, count, held), *less = read(u, u_type, at, count, other);
    for (int i = 0; i < count; i++) y[i] = k_c * from[i] + k_d * (from[i] - k_u * less[i]);
    write(y, 1.0f, out, c_type, at, count);
  }
}

}  // namespace

// scales [batch, 3]: k_c, k_d, k_u of every sample, from w, a weight or one a sample (each: 1); and, unless it is null,
// out = k_c c + k_d (c - k_u u), of c's type. a: rescale or eta; r: the largest norm of c - u, 0: none
extern "C" void guide(const void* c, const void* u, const float* w, float* scales, void* out, int64_t each,
                      int64_t c_type, int64_t u_type, int64_t rule, float a, float r, int64_t batch, int64_t n,
                      int64_t threads) {
  const auto sums = rule == RESCALE ? scales_of<RESCALE> : rule == APG ? scales_of<APG> : scales_of<ZERO_STAR>;
  // both passes over as many samples as a cache holds, one after the other
  const int64_t group = rule == CFG || !out ? batch : std::max<int64_t>(1, HELD / std::max<int64_t>(n, 1));
  for (int64_t first = 0; first < batch; first += group) {
    const int64_t last = std::min(batch, first + group);
    if (rule == CFG)
      for (int64_t b = first; b < last; b++)
        scales[3 * b] = scales[3 * b + 2] = 1.0f, scales[3 * b + 1] = w[each * b] - 1.0f;
    else
      sums(c, u, int(c_type), int(u_type), w, each, scales, a, r, first, last, n, int(threads));
    if (out) combine(c, u, int(c_type), int(u_type), scales, out, first, last, n, int(threads));
  }
}
