// Noise on a CPU, and what training makes of it without storing it: noised data, targets, losses and their gradients.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "levels_cpu.hpp"
#include "philox_cpu.hpp"
#include "types_cpu.hpp"

namespace {

struct Draws {
  float* out;
  const int64_t *seeds, *index, *rows;
  int64_t stream, count, batch, n, first;
  bool paired;
};

template <Kind KIND>
void fill(const Draws& v, int threads) {
  const int64_t shared = v.first ? 0 : samples_of_draw(v.n), blocks = shared ? 1 : (v.n + WIDTH - 1) / WIDTH;
  const int64_t groups = shared ? (v.batch + shared - 1) / shared : v.batch, jobs = v.count * groups * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < jobs; job++) {
    const int64_t start = job % blocks * WIDTH, k = job / blocks / groups, group = job / blocks % groups;
    const int64_t b = shared ? group * shared : group, many = std::min(shared ? shared : 1, v.batch - b);
    const int64_t count = shared ? many * v.n : std::min<int64_t>(v.n - start, WIDTH);
    const auto row = [&](int64_t i) { return uint32_t(v.rows[v.paired ? b + i : k]); };
    float *to = v.out + (k * v.batch + b) * v.n + start, part[WIDTH], *made = count < WIDTH ? part : to;
    const auto stream = uint32_t(v.stream);
    if (shared)
      draw_samples<KIND>(int(many), int(v.n), v.seeds + b, v.index + b, stream, row, made);
    else
      draw<KIND>(uint64_t(v.seeds[b]), uint32_t(v.first + start / 4), row(0), stream, uint32_t(v.index[b]), made);
    if (made != to) std::memcpy(to, part, sizeof(float) * count);
  }
}

// normals of one stream and row [batch, n]; what fastdiff.ops._fused.Noise declares
struct Noise {
  const int64_t *seeds, *index;  // index null: 0 each
  int64_t stream, row, batch, n;

  const int64_t* index_of(int64_t b) const { return index ? index + b : nullptr; }
};

// `count` numbers of a sample and their normals
struct Block {
  int64_t b, at, number;
  int count;
  const float* n;
};

template <class Work>
void each_block(const Noise& noise, int threads, const Work& work) {
  const int64_t shared = samples_of_draw(noise.n), blocks = (noise.n + WIDTH - 1) / WIDTH;
  const int64_t jobs = shared ? (noise.batch + shared - 1) / shared : noise.batch * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < jobs; job++) {
    alignas(64) float n[WIDTH];
    if (shared) {
      const int64_t b = job * shared, many = std::min(shared, noise.batch - b);
      draw_samples<NORMAL>(int(many), int(noise.n), noise.seeds + b, noise.index_of(b), uint32_t(noise.stream),
                           [&](int) { return uint32_t(noise.row); }, n);
      for (int64_t i = 0; i < many; i++) work({b + i, (b + i) * noise.n, b + i, int(noise.n), n + i * noise.n});
      continue;
    }
    const int64_t b = job / blocks, start = job % blocks * WIDTH;
    draw<NORMAL>(uint64_t(noise.seeds[b]), uint32_t(start / 4), uint32_t(noise.row), uint32_t(noise.stream),
                 noise.index ? uint32_t(noise.index[b]) : 0u, n);
    work({b, b * noise.n + start, job, int(std::min<int64_t>(noise.n - start, WIDTH)), n});
  }
}

enum Rho { L2, L1, HUBER };

// d becomes rho's derivative at d, `value` rho(d); NaN stays NaN
template <Rho RHO>
void rho(float* d, float* value, float delta, int count) {
  for (int i = 0; i < count; i++) {
    const float x = d[i];
    if (RHO == L2) {
      value[i] = x * x;
      d[i] = 2.0f * x;
    } else if (RHO == L1) {
      value[i] = std::fabs(x);
      d[i] = (x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f) + 0.0f * x;
    } else {
      const float raised = x < -delta ? -delta : x, inside = raised > delta ? delta : raised;
      value[i] = inside * (x - 0.5f * inside);
      d[i] = inside;
    }
  }
}

inline double sum(const float* value) {
  double lanes[8] = {}, all = 0;
  for (int i = 0; i < WIDTH; i += 8)
    for (int j = 0; j < 8; j++) lanes[j] += value[i + j];
  for (int j = 0; j < 8; j++) all += lanes[j];
  return all;
}

}  // namespace

// out [count, batch, n] = a stream's noise of every row and every (seed, index) pair from counter `first` on;
// paired: count = 1 and a row each sample
extern "C" void fill_noise(float* out, const int64_t* seeds, const int64_t* index, const int64_t* rows, int64_t stream,
                           int64_t count, int64_t batch, int64_t n, int64_t first, int kind, int paired, int threads) {
  const Draws draws{out, seeds, index, rows, stream, count, batch, n, first, paired != 0};
  if (kind == NORMAL) fill<NORMAL>(draws, threads);
  if (kind == GUMBEL) fill<GUMBEL>(draws, threads);
  if (kind == LOGISTIC) fill<LOGISTIC>(draws, threads);
}

// out = c[0] x + c[1] noise, and target, unless it is null, c[2] x + c[3] noise; x [batch, n], c the sample's row
extern "C" void add_noise(const Noise* noise, const Rows* rows, const void* x, void* out, void* target, int64_t x_type,
                          int64_t out_type, int64_t threads) {
  each_block(*noise, int(threads), [&](const Block& v) {
    alignas(64) float held[WIDTH], y[WIDTH];
    const float *from = read(x, int(x_type), v.at, v.count, held), *c = rows->of(v.b, 4);
    for (void* to : {out, target}) {
      if (!to) return;
      for (int i = 0; i < v.count; i++) y[i] = c[0] * from[i] + c[1] * v.n[i];
      write(y, 1.0f, to, int(out_type), v.at, v.count);
      c += 2;
    }
  });
}

// loss [batch] = c[2] mean(rho(m - goal)), whose derivative by m is scale [batch] = c[2] / n times slope = rho', of m's
// type; goal = c[0] x0 (unless it is null) + c[1] noise, c the sample's row
extern "C" void denoising_loss(const Noise* noise, const Rows* rows, const void* m, const void* x0, float* loss,
                               void* slope, float* scale, int64_t m_type, int64_t x0_type, int64_t kind,
                               float delta, int64_t threads) {
  const int64_t blocks = (noise->n + WIDTH - 1) / WIDTH;
  std::vector<double> sums(noise->batch * blocks);  // by which a loss is added up in an order of n alone
  const auto derivative = kind == L2 ? rho<L2> : kind == L1 ? rho<L1> : rho<HUBER>;
  each_block(*noise, int(threads), [&](const Block& v) {
    alignas(64) float held[WIDTH], value[WIDTH] = {}, d[WIDTH];
    const float* c = rows->of(v.b, 4);
    for (int i = 0; i < v.count; i++) d[i] = c[1] * v.n[i];
    if (x0) {
      const float* clean = read(x0, int(x0_type), v.at, v.count, held);
      for (int i = 0; i < v.count; i++) d[i] += c[0] * clean[i];
    }
    const float* given = read(m, int(m_type), v.at, v.count, held);
    for (int i = 0; i < v.count; i++) d[i] = given[i] - d[i];
    derivative(d, value, delta, v.count);
    write(d, 1.0f, slope, int(m_type), v.at, v.count);
    sums[v.number] = sum(value);
  });
  for (int64_t b = 0; b < noise->batch; b++) {
    double all = 0;
    for (int64_t i = b * blocks; i < (b + 1) * blocks; i++) all += sums[i];
    const float weight = rows->of(b, 4)[2];
    loss[b] = float(weight * (all / double(noise->n)));  // of an empty sample NaN
    scale[b] = weight / float(noise->n);
  }
}

// out = g[b] x, of x's type: the gradient of a sample whose loss is multiplied by g
extern "C" void scaled_samples(const void* x, const float* g, void* out, int64_t type, int64_t batch, int64_t n,
                               int64_t threads) {
  const int64_t blocks = (n + WIDTH - 1) / WIDTH;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < batch * blocks; job++) {
    alignas(64) float held[WIDTH];
    const int64_t b = job / blocks, start = job % blocks * WIDTH, at = b * n + start;
    const int count = int(std::min<int64_t>(n - start, WIDTH));
    write(read(x, int(type), at, count, held), g[b], out, int(type), at, count);
  }
}
