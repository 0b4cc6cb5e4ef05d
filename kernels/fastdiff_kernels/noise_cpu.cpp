// Philox4x32-10 noise on a CPU, the numbers of fastdiff.rng.normal and fastdiff.gumbel, and what training makes of it
// without storing it: noised data, targets, losses and their gradients. Loops that a compiler turns into vector code.
//
// Counters are worked on LANES at a time and always in full, so a number does not depend on what is drawn beside it.
// The logarithm is a polynomial of the mantissa; the angle's quarter turn is read off the integer, exactly.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "types_cpu.hpp"

namespace {

constexpr int LANES = 64, WIDTH = 4 * LANES;

inline void philox(uint32_t* a, uint32_t* b, uint32_t* c, uint32_t* d, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
    for (int i = 0; i < LANES; i++) {
      const uint64_t p0 = uint64_t(a[i]) * 0xD2511F53u, p1 = uint64_t(c[i]) * 0xCD9E8D57u;
      a[i] = uint32_t(p1 >> 32) ^ b[i] ^ k0;
      c[i] = uint32_t(p0 >> 32) ^ d[i] ^ k1;
      b[i] = uint32_t(p1);
      d[i] = uint32_t(p0);
    }
}

// ln u of a positive normal number
inline float ln(float u) {
  int32_t bits;
  std::memcpy(&bits, &u, 4);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23, rest = bits - (exponent << 23);
  float m;
  std::memcpy(&m, &rest, 4);  // in [sqrt(1/2), sqrt(2))
  const float f = m - 1.0f, s = f * f, e = float(exponent);
  float y = 7.0376836292e-2f;
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * s - 2.12194440e-4f * e - 0.5f * s;
  return f + y + 0.693359375f * e;
}

// -ln(1 - v) to full precision however small v is: what rounding 1 - v loses is put back
inline float minus_ln1m(float v) {
  const float u = 1.0f - v;
  return ((u - 1.0f) + v) / u - ln(u);
}

// sqrt(-2 ln u), u = (word + 1/2) / 2^32 in (0, 1]
inline float radius(uint32_t word) { return std::sqrt(-2.0f * ln(float(word) * 0x1p-32f + 0x1p-33f)); }

// -ln(-ln(1 - v)), v = (word + 1/2) / 2^32 kept below 1
inline float gumbel(uint32_t word) { return -ln(minus_ln1m(float(word) * 0x1.fffffep-33f + 0x1p-33f)); }

// ln(v) - ln(1 - v), folded at 1/2
inline float logistic(uint32_t word) {
  const bool upper = word >> 31;
  const float v = float(upper ? ~word : word) * 0x1p-32f + 0x1p-33f, x = ln(v) + minus_ln1m(v);
  return upper ? -x : x;
}

// r sin and r cos of the signed angle 2 pi word / 2^32
inline void turn(uint32_t word, float r, float& sine, float& cosine) {
  const int32_t quarter = int32_t(word + 0x20000000u) >> 30;
  const float t = float(int32_t(word - (uint32_t(quarter) << 30))) * 1.4629180792671596e-09f, t2 = t * t;
  const float s = ((-1.9515295891e-4f * t2 + 8.3321608736e-3f) * t2 - 1.6666654611e-1f) * t2 * t + t;
  const float c =
      ((2.443315711809948e-5f * t2 - 1.388731625493765e-3f) * t2 + 4.166664568298827e-2f) * t2 * t2 - 0.5f * t2 + 1.0f;
  const float x = quarter & 1 ? c : s, y = quarter & 1 ? s : c;
  sine = r * (quarter & 2 ? -x : x);
  cosine = r * ((quarter + 1) & 2 ? -y : y);
}

enum Kind { NORMAL, GUMBEL, LOGISTIC };

template <Kind KIND>
void draw(uint64_t seed, uint32_t first, uint32_t row, uint32_t stream, uint32_t index, float* out) {
  uint32_t a[LANES], b[LANES], c[LANES], d[LANES];
  float n[4][LANES];
  for (int i = 0; i < LANES; i++) {
    a[i] = first + i;
    b[i] = row;
    c[i] = stream;
    d[i] = index;
  }
  philox(a, b, c, d, uint32_t(seed), uint32_t(seed >> 32));
  if constexpr (KIND == NORMAL) {
    for (int i = 0; i < LANES; i++) turn(b[i], radius(a[i]), n[0][i], n[1][i]);
    for (int i = 0; i < LANES; i++) turn(d[i], radius(c[i]), n[2][i], n[3][i]);
  } else {
    const uint32_t* words[4] = {a, b, c, d};
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < LANES; i++) n[j][i] = KIND == GUMBEL ? gumbel(words[j][i]) : logistic(words[j][i]);
  }
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < 4; j++) out[4 * i + j] = n[j][i];
}

struct Draws {
  float* out;
  const int64_t *seeds, *index, *streams, *rows;
  int64_t pairs, batch, n, first;
  bool paired;
};

template <Kind KIND>
void fill(const Draws& v, int threads) {
  const int64_t blocks = (v.n + WIDTH - 1) / WIDTH, jobs = v.pairs * v.batch * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < jobs; job++) {
    const int64_t sample = job / blocks, start = job % blocks * WIDTH, count = std::min<int64_t>(v.n - start, WIDTH);
    const int64_t pair = sample / v.batch, b = sample % v.batch;
    float *to = v.out + sample * v.n + start, part[WIDTH], *made = count < WIDTH ? part : to;
    draw<KIND>(uint64_t(v.seeds[b]), uint32_t(v.first + start / 4), uint32_t(v.rows[v.paired ? b : pair]),
               uint32_t(v.streams[pair]), uint32_t(v.index[b]), made);
    if (made != to) std::memcpy(to, part, sizeof(float) * count);
  }
}

// normals of one stream and row [batch, n]; what fastdiff.native.Noise declares
struct Noise {
  const int64_t *seeds, *index;
  int64_t stream, row, batch, n;
};

// a block of WIDTH normals, of which the sample may have fewer elements
struct Block {
  int64_t b, at;
  int count;
  float n[WIDTH];
};

template <class Work>
void each_block(const Noise& noise, int threads, const Work& work) {
  const int64_t blocks = (noise.n + WIDTH - 1) / WIDTH, jobs = noise.batch * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < jobs; job++) {
    const int64_t b = job / blocks, start = job % blocks * WIDTH;
    alignas(64) Block block;
    block.b = b, block.at = b * noise.n + start, block.count = int(std::min<int64_t>(noise.n - start, WIDTH));
    draw<NORMAL>(uint64_t(noise.seeds[b]), uint32_t(start / 4), uint32_t(noise.row), uint32_t(noise.stream),
                 uint32_t(noise.index[b]), block.n);
    work(block, job);
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

// out [pairs, batch, n] = the noise of every (stream, row) pair and every (seed, index) pair from counter `first` on;
// paired: pairs = 1 and a row each sample
extern "C" void fill_noise(float* out, const int64_t* seeds, const int64_t* index, const int64_t* streams,
                           const int64_t* rows, int64_t pairs, int64_t batch, int64_t n, int64_t first, int kind,
                           int paired, int threads) {
  const Draws draws{out, seeds, index, streams, rows, pairs, batch, n, first, paired != 0};
  if (kind == NORMAL) fill<NORMAL>(draws, threads);
  if (kind == GUMBEL) fill<GUMBEL>(draws, threads);
  if (kind == LOGISTIC) fill<LOGISTIC>(draws, threads);
}

// out = coef[b][0] x + coef[b][1] noise, and target, unless it is null, coef[b][2] x + coef[b][3] noise; x [batch, n]
extern "C" void add_noise(const Noise* noise, const void* x, int x_type, const float* coef, void* out, void* target,
                          int out_type, int threads) {
  each_block(*noise, threads, [&](const Block& v, int64_t) {
    alignas(64) float held[WIDTH], y[WIDTH];
    const float *from = read(x, x_type, v.at, v.count, held), *c = coef + 4 * v.b;
    for (void* to : {out, target}) {
      if (!to) return;
      for (int i = 0; i < v.count; i++) y[i] = c[0] * from[i] + c[1] * v.n[i];
      write(y, 1.0f, to, out_type, v.at, v.count);
      c += 2;
    }
  });
}

// loss [batch] = coef[b][2] mean(rho(m - goal)), grad = its derivative by m, of m's type; goal = coef[b][0] x0 (unless
// it is null) + coef[b][1] noise; sums [batch, blocks]: room, by which a loss is added up in an order of n alone
extern "C" void denoising_loss(const Noise* noise, const void* m, int m_type, const void* x0, int x0_type,
                               const float* coef, int kind, float delta, float* loss, void* grad, double* sums,
                               int threads) {
  const auto derivative = kind == L2 ? rho<L2> : kind == L1 ? rho<L1> : rho<HUBER>;
  each_block(*noise, threads, [&](Block& v, int64_t job) {
    alignas(64) float held[WIDTH], value[WIDTH] = {}, d[WIDTH];
    const float* c = coef + 4 * v.b;
    for (int i = 0; i < v.count; i++) d[i] = c[1] * v.n[i];
    if (x0) {
      const float* clean = read(x0, x0_type, v.at, v.count, held);
      for (int i = 0; i < v.count; i++) d[i] += c[0] * clean[i];
    }
    const float* given = read(m, m_type, v.at, v.count, held);
    for (int i = 0; i < v.count; i++) d[i] = given[i] - d[i];
    derivative(d, value, delta, v.count);
    write(d, c[2] / float(noise->n), grad, m_type, v.at, v.count);
    sums[job] = sum(value);
  });
  const int64_t blocks = (noise->n + WIDTH - 1) / WIDTH;
  for (int64_t b = 0; b < noise->batch; b++) {
    double all = 0;
    for (int64_t i = b * blocks; i < (b + 1) * blocks; i++) all += sums[i];
    loss[b] = float(coef[4 * b + 2] * (all / double(noise->n)));  // of an empty sample NaN
  }
}
