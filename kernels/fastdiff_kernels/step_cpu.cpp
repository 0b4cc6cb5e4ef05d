// One row of a plan on a CPU, and the posterior: the loops behind fastdiff.cpu, for any row, shape and dtype.
//
// A block of every operand fits a core's first cache, so each is read from memory once and each result written once,
// however many terms a slot sums.

#include <algorithm>
#include <cstdint>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace {

constexpr int BLOCK = 512, SLOTS = 16, TERMS = SLOTS + 3, COPIES = 2;
enum Type { FP32, BF16, FP16 };
enum Source { P = -1, M = -2, N = -3 };  // else a slot

// what fastdiff.cpu.Row declares
struct Row {
  float c_skip, c_out, c_ratio, lo, hi, c_in_next;
  int32_t uses_p, clamps, targets;
  int32_t place[SLOTS], terms[SLOTS];
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
};

template <class T>
const float* widened(const void* from, int64_t at, int count, float* to) {
  const T* given = static_cast<const T*>(from) + at;
  for (int i = 0; i < count; i++) to[i] = static_cast<float>(given[i]);
  return to;
}

const float* read(const void* from, int type, int64_t at, int count, float* to) {
  if (type == BF16) return widened<c10::BFloat16>(from, at, count, to);
  if (type == FP16) return widened<c10::Half>(from, at, count, to);
  return static_cast<const float*>(from) + at;
}

template <class T>
void scaled(const float* from, float c, void* out, int64_t at, int count) {
  T* to = static_cast<T*>(out) + at;
  for (int i = 0; i < count; i++) to[i] = static_cast<T>(c * from[i]);
}

void write(const float* from, float c, void* out, int type, int64_t at, int count) {
  if (type == BF16) return scaled<c10::BFloat16>(from, c, out, at, count);
  if (type == FP16) return scaled<c10::Half>(from, c, out, at, count);
  scaled<float>(from, c, out, at, count);
}

// a NaN passes
void clamp(float* p, float lo, float hi, int count) {
  for (int i = 0; i < count; i++) {
    const float raised = p[i] < lo ? lo : p[i];
    p[i] = raised > hi ? hi : raised;
  }
}

// p = c_skip (x + c_ratio m), clamped: x and m may nearly cancel; without x c_out m
const float* prediction(const Row& row, const float* m, const float* x, int count, float* p) {
  if (row.c_skip != 0)
    for (int i = 0; i < count; i++) p[i] = row.c_skip * (x[i] + row.c_ratio * m[i]);
  else
    for (int i = 0; i < count; i++) p[i] = row.c_out * m[i];
  if (row.clamps) clamp(p, row.lo, row.hi, count);
  return p;
}

// elements at .. at + count - 1, all of sample b
void block(const Row& row, const Call& v, int64_t b, int64_t at, int count) {
  alignas(64) float mixed[BLOCK], other[BLOCK], predicted[BLOCK], values[SLOTS][BLOCK];
  const float* x = v.slots[0] + at;
  const float* m = read(v.m, v.m_type, at, count, mixed);
  if (v.uncond) {
    const float* u = read(v.uncond, v.uncond_type, at, count, other);
    const float w = v.w[v.w_each ? b : 0];
    for (int i = 0; i < count; i++) mixed[i] = u[i] + w * (m[i] - u[i]);
    m = mixed;
  }
  const float* p = row.uses_p || v.x0 ? prediction(row, m, x, count, predicted) : m;
  const auto term = [&](int j) { return j == P ? p : j == M ? m : j == N ? v.noise + at : v.slots[j] + at; };
  const float* next = x;
  for (int t = 0; t < row.targets; t++) {
    float* to = values[t];
    const float* c = row.c[t];
    int k = row.terms[t] % 2;  // then two terms a pass
    if (k) {
      const float* s = term(row.source[t][0]);
      for (int i = 0; i < count; i++) to[i] = c[0] * s[i];
    } else {
      std::fill(to, to + count, 0.0f);
    }
    for (; k < row.terms[t]; k += 2) {
      const float *s = term(row.source[t][k]), *r = term(row.source[t][k + 1]);
      for (int i = 0; i < count; i++) to[i] = to[i] + c[k] * s[i] + c[k + 1] * r[i];
    }
    if (row.place[t] == 0) next = to;
  }
  if (v.x0) std::copy(p, p + count, v.x0 + at);
  for (int j = 0; j < COPIES; j++)
    if (v.copies[j]) write(next, row.c_in_next, v.copies[j], v.copy_type, at, count);
  for (int t = 0; t < row.targets; t++) std::copy(values[t], values[t] + count, v.slots[row.place[t]] + at);
}

}  // namespace

extern "C" void affine_row(const Row* row, const Call* call, int threads) {
  const int64_t blocks = (call->n + BLOCK - 1) / BLOCK, jobs = call->batch * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < jobs; job++) {
    const int64_t b = job / blocks, start = job % blocks * BLOCK;
    block(*row, *call, b, b * call->n + start, int(std::min<int64_t>(BLOCK, call->n - start)));
  }
}

// coef [batch or 1, 8]: c_skip, c_ratio, k_x0, k_xt: x0 = clamp(c_skip (x + c_ratio m)), mean = k_x0 x0 + k_xt x
extern "C" void posterior(const void* x, const void* m, const float* coef, void* mean, void* x0, int x_type, int m_type,
                          int each, int clips, float lo, float hi, int64_t batch, int64_t n, int threads) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK, jobs = batch * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < jobs; job++) {
    alignas(64) float held[BLOCK], other[BLOCK], p[BLOCK], y[BLOCK];
    const int64_t b = job / blocks, start = job % blocks * BLOCK, at = b * n + start;
    const int count = int(std::min<int64_t>(BLOCK, n - start));
    const float *c = coef + (each ? 8 * b : 0), *v = read(x, x_type, at, count, held);
    const float* u = read(m, m_type, at, count, other);
    for (int i = 0; i < count; i++) p[i] = c[0] * (v[i] + c[1] * u[i]);
    if (clips) clamp(p, lo, hi, count);
    for (int i = 0; i < count; i++) y[i] = c[2] * p[i] + c[3] * v[i];
    write(y, 1.0f, mean, x_type, at, count);
    write(p, 1.0f, x0, x_type, at, count);
  }
}
