// One row of a plan on a CPU, and the posterior: the loops behind fastdiff.cpu, for any row, shape and dtype.
//
// A block of every operand fits a core's first cache (a large one, of rows that one pass makes, its second), so each is
// read from memory once and each result written once, however many terms a slot sums.

#include <algorithm>
#include <cstdint>

#include "philox_cpu.hpp"
#include "sums_cpu.hpp"
#include "types_cpu.hpp"

namespace {

constexpr int BLOCK = 512, LARGE = 4096, TERMS = SLOTS + 3;
enum Source { P = -1, M = -2, N = -3 };  // else a slot

// p = clamp(c_skip (x + c_ratio m)): x and m may nearly cancel
struct Prediction {
  float c_skip, c_ratio, lo, hi;
};

// what fastdiff.cpu.Row declares
struct Row {
  Prediction p;
  float c_in_next;
  int32_t skips, uses_p, fused, targets;  // fused: p is in target 0 alone, its last term, or all of target 1
  int32_t noisy, number;
  int32_t place[SLOTS], terms[SLOTS], held[SLOTS];
  int32_t source[SLOTS][TERMS];
  float c[SLOTS][TERMS];
};

// what fastdiff.cpu.Call declares; null where there is none
struct Call {
  float* slots[SLOTS];
  const void *m, *uncond;
  const float *w, *noise;
  float* x0;
  void* copies[COPIES];
  int32_t m_type, uncond_type, copy_type, w_each;
  int64_t batch, n;
  const int64_t *seeds, *index;  // the noise of a row that is given none
  int64_t samples;
};

// a NaN passes
inline float predicted(const Prediction& of, float x, float m) {
  const float p = of.c_skip * (x + of.c_ratio * m), raised = p < of.lo ? of.lo : p;
  return raised > of.hi ? of.hi : raised;
}

// In every loop below an operand may be the output itself, never a part of it shifted.

// to = the sum of K terms, + b p where SUMMED; kept = p where KEPT: one pass
template <bool SUMMED, bool KEPT, int K>
void fuse(const Prediction& of, const float* x, const float* m, float b, const float* const* s, const float* c,
          float* to, float* kept, int count) {
  const Terms<K> t(s, c);
  unrolled(count, [=](int i) {
    const float p = predicted(of, x[i], m[i]);
    float v = K ? t.c[0] * t.s[0][i] : b * p;
    for (int k = 1; k < K; k++) v += t.c[k] * t.s[k][i];
    to[i] = SUMMED && K ? v + b * p : v;
    if (KEPT) kept[i] = p;
  });
}

template <bool SUMMED, bool KEPT>
void fuse(const Prediction& of, const float* x, const float* m, float b, const float* const* s, const float* c, int n,
          float* to, float* kept, int count) {
  if (n == 0) return fuse<true, KEPT, 0>(of, x, m, b, s, c, to, kept, count);
  if (n == 1) return fuse<SUMMED, KEPT, 1>(of, x, m, b, s, c, to, kept, count);
  if (n == 2) return fuse<SUMMED, KEPT, 2>(of, x, m, b, s, c, to, kept, count);
  if (n == 3) return fuse<SUMMED, KEPT, 3>(of, x, m, b, s, c, to, kept, count);
  fuse<SUMMED, KEPT, IN_ONE>(of, x, m, b, s, c, to, kept, count);
}

// elements at .. at + count - 1, all of sample b where there is a weight each; noise: theirs
void block(const Row& row, const Call& v, int64_t b, int64_t at, int count, const float* noise) {
  alignas(64) static const float nothing[BLOCK] = {};
  alignas(64) float mixed[BLOCK], other[BLOCK], p[BLOCK], values[SLOTS][BLOCK];
  const float *x = row.skips ? v.slots[0] + at : nothing, *m = read(v.m, v.m_type, at, count, mixed);
  if (v.uncond) {
    const float* u = read(v.uncond, v.uncond_type, at, count, other);
    const float w = v.w[v.w_each ? b : 0];
    for (int i = 0; i < count; i++) mixed[i] = u[i] + w * (m[i] - u[i]);
    m = mixed;
  }
  const auto slot = [&](int target) { return v.slots[row.place[target]] + at; };
  const float* s[TERMS];
  const auto terms = [&](int target) {
    for (int k = 0; k < row.terms[target]; k++) {
      const int j = row.source[target][k];
      s[k] = j == P ? p : j == M ? m : j == N ? noise : v.slots[j] + at;
    }
    return row.terms[target];
  };
  if (row.fused && !(v.x0 && row.targets > 1)) {
    const bool summed = row.source[0][row.terms[0] - 1] == P;
    const int n = terms(0) - summed;
    float* kept = v.x0 ? v.x0 + at : row.targets > 1 ? slot(1) : nullptr;
    const auto pass = !kept ? fuse<true, false> : summed ? fuse<true, true> : fuse<false, true>;
    pass(row.p, x, m, row.c[0][n], s, row.c[0], n, slot(0), kept, count);
  } else {
    if (row.uses_p || v.x0) fuse<true, false, 0>(row.p, x, m, 1.0f, nullptr, nullptr, p, nullptr, count);
    if (v.x0) std::copy(p, p + count, v.x0 + at);
    for (int t = 0; t < row.targets; t++) {
      const int n = terms(t);
      sum(s, row.c[t], n, row.held[t] ? values[t] : slot(t), count);
    }
    for (int t = 0; t < row.targets; t++)
      if (row.held[t]) std::copy(values[t], values[t] + count, slot(t));
  }
  for (int j = 0; j < COPIES; j++)
    if (v.copies[j]) write(v.slots[0] + at, row.c_in_next, v.copies[j], v.copy_type, at, count);
}

// does nothing of a block go through its own memory? Then blocks may be larger, and a row costs fewer of them
bool direct(const Row& row, const Call& v) {
  const bool summed = row.fused ? row.skips && !(v.x0 && row.targets > 1) : !row.uses_p && !v.x0;
  const bool held = std::any_of(row.held, row.held + row.targets, [](int h) { return h; });
  return summed && !held && v.m_type == FP32 && !v.uncond;
}

// a row that draws its noise, a block at a time
void drawn(const Row& row, const Call& v, int threads) {
  const int64_t n = v.batch * v.n / v.samples, shared = samples_of_draw(n), blocks = (n + BLOCK - 1) / BLOCK;
  const int64_t jobs = shared ? (v.samples + shared - 1) / shared : v.samples * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < jobs; job++) {
    alignas(64) float noise[BLOCK];
    if (shared) {
      const int64_t b = job * shared, many = std::min(shared, v.samples - b), each = v.w_each ? 1 : many;
      draw_samples<NORMAL>(int(many), int(n), v.seeds + b, v.index + b, ROWS, [&](int) { return row.number; }, noise);
      for (int64_t i = 0; i < many; i += each) block(row, v, b + i, (b + i) * n, int(each * n), noise + i * n);
      continue;
    }
    const int64_t b = job / blocks, start = job % blocks * BLOCK, count = std::min<int64_t>(BLOCK, n - start);
    for (int64_t i = 0; i < count; i += WIDTH)
      draw<NORMAL>(uint64_t(v.seeds[b]), uint32_t((start + i) / 4), row.number, ROWS, uint32_t(v.index[b]), noise + i);
    block(row, v, b, b * n + start, int(count), noise);
  }
}

// mean = k_x0 p + k_xt x and x0 = p, converted on the way: a pass that only converts does not overlap the next one's loads
template <class X, class M>
void posterior_of(const Prediction& of, float k_x0, float k_xt, const void* x_, const void* m_, void* mean_, void* x0_,
                  int64_t at, int count) {
  const X* x = static_cast<const X*>(x_) + at;
  const M* m = static_cast<const M*>(m_) + at;
  X *mean = static_cast<X*>(mean_) + at, *x0 = static_cast<X*>(x0_) + at;
  unrolled(count, [=](int i) {
    const float v = static_cast<float>(x[i]), p = predicted(of, v, static_cast<float>(m[i]));
    mean[i] = static_cast<X>(k_xt * v + k_x0 * p);
    x0[i] = static_cast<X>(p);
  });
}

using Posterior = decltype(&posterior_of<float, float>);

template <class X>
Posterior posterior_of_model(int64_t type) {
  if (type == BF16) return posterior_of<X, c10::BFloat16>;
  return type == FP16 ? posterior_of<X, c10::Half> : posterior_of<X, float>;
}

}  // namespace

extern "C" void affine_row(const Row* row, const Call* call, int threads) {
  if (row->noisy && !call->noise) return drawn(*row, *call, threads);
  const bool many = call->batch * call->n >= 4 * int64_t(threads) * LARGE;  // enough for every thread
  const int64_t size = many && direct(*row, *call) ? LARGE : BLOCK;
  const int64_t blocks = (call->n + size - 1) / size, jobs = call->batch * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < jobs; job++) {
    const int64_t b = job / blocks, start = job % blocks * size, at = b * call->n + start;
    block(*row, *call, b, at, int(std::min(size, call->n - start)), call->noise ? call->noise + at : nullptr);
  }
}

// a row of 8: c_skip, c_ratio, k_x0, k_xt: x0 = clamp(c_skip (x + c_ratio m)), mean = k_x0 x0 + k_xt x; and the sample's
// variance and its logarithm [2, batch]
extern "C" void posterior(const Rows* rows, const void* x, const void* m, void* mean, void* x0, float* variance,
                          int64_t x_type, int64_t m_type, float lo, float hi, int64_t batch, int64_t n,
                          int64_t threads) {
  for (int64_t b = 0; b < batch; b++)
    for (int i = 0; i < 2; i++) variance[i * batch + b] = rows->of(b, 8)[4 + i];
  const auto pass = x_type == BF16   ? posterior_of_model<c10::BFloat16>(m_type)
                    : x_type == FP16 ? posterior_of_model<c10::Half>(m_type)
                                     : posterior_of_model<float>(m_type);
  const int64_t size = batch * n >= 4 * threads * LARGE ? LARGE : BLOCK, blocks = (n + size - 1) / size;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < batch * blocks; job++) {
    const int64_t b = job / blocks, start = job % blocks * size;
    const float* c = rows->of(b, 8);
    pass({c[0], c[1], lo, hi}, c[2], c[3], x, m, mean, x0, b * n + start, int(std::min(size, n - start)));
  }
}
