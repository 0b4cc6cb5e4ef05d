// One row of a plan on categorical data on a CPU, for any number of classes: readout, update, the model's next input.
//
// A job is some whole tokens of a sample. Their logits and noise stay in a core's caches and noise is never stored.
// Few classes are gone through for LANE tokens side by side, many for LANE classes of one token, so that every loop is
// vector code; what a token's numbers are depends on its sample alone.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "philox_cpu.hpp"
#include "sums_cpu.hpp"
#include "types_cpu.hpp"

namespace {

constexpr int LANE = 16, FEW = 64, JOB = 2048, SLOTS = 16, TERMS = SLOTS + 2, COPIES = 2;
constexpr int EXACT = 64;  // steps a lane adds up in fp32, before fp64
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
enum Readout { SAMPLE, ARGMAX, MEAN };

// what fastdiff.categorical_cpu.Call declares; null where there is none. All dense: [batch, tokens, width]
struct Call {
  float* state;
  const void *m, *uncond;
  const float *w, *noise, *gumbel, *table;
  const int64_t *row, *seeds, *index;
  void* copies[COPIES];
  int64_t* classes;
  int64_t batch, tokens, width, slots, header, row_width, row_each, w_row, w_each;
  int32_t m_type, uncond_type, copy_type, readout, threads;
};

// e^x - 1 = 2^n (1 + q) - 1 for x in [-104, 88]; a NaN passes
inline float halves(float x, int32_t& n) {
  float t = x * 1.44269504089f + 12582912.0f;
  std::memcpy(&n, &t, 4);
  n -= 0x4B400000;
  t -= 12582912.0f;
  const float r = (x - t * 0.693359375f) + t * 2.12194440e-4f;
  float q = 1.9875691500e-4f;
  q = q * r + 1.3981999507e-3f;
  q = q * r + 8.3334519073e-3f;
  q = q * r + 4.1665795894e-2f;
  q = q * r + 1.6666665459e-1f;
  q = q * r + 5.0000001201e-1f;
  return q * r * r + r;
}

inline float power(int32_t n) {
  float s;
  n = int32_t(uint32_t(n + 127) << 23);
  std::memcpy(&s, &n, 4);
  return s;
}

inline float exp_of(float x) {
  int32_t n;
  const float q = halves(x < -104.0f ? -104.0f : x > 88.0f ? 88.0f : x, n);
  const int32_t part = n >> 1;  // 2^n alone may be below the normal numbers
  return (1.0f + q) * power(part) * power(n - part);
}

// tanh(z / 2), to full precision near 0
inline float tanh_of_half(float z) {
  int32_t n;
  const float size = std::fabs(z), q = halves(size > 40.0f ? 40.0f : size, n), s = power(n), e = s * q + (s - 1.0f);
  return std::copysign(e / (e + 2.0f), z);
}

// A token's numbers, LANE a step: lane j's number of step i is read(i, j)
struct Top {
  float value[LANE];  // NaN where one is
  int32_t step[LANE];  // the first that reaches it
};

template <class Read>
inline void scan(int first, int last, const Read& read, Top& top) {
  for (int i = first; i < last; i++)
    for (int j = 0; j < LANE; j++) {
      const float x = read(i, j);
      const bool more = x > top.value[j];
      top.step[j] = more ? i : top.step[j];
      top.value[j] = more || x != x ? x : top.value[j];
    }
}

template <class Read>
inline void add_exp(int first, int last, const Read& read, const float* top, float* e, double* sums) {
  for (int begin = first; begin < last; begin += EXACT) {
    float part[LANE] = {};
    for (int i = begin; i < std::min(last, begin + EXACT); i++)
      for (int j = 0; j < LANE; j++) part[j] += e[i * LANE + j] = exp_of(read(i, j) - top[j]);
    for (int j = 0; j < LANE; j++) sums[j] += part[j];
  }
}

const Top NONE = [] {
  Top top;
  for (int j = 0; j < LANE; j++) top.value[j] = NOTHING, top.step[j] = 0;
  return top;
}();

// LANE neighbouring tokens of few classes, a lane each; lanes beyond the last of `left` tokens repeat it
struct Beside {
  int width, left;

  Beside(int width, int left) : width(width), left(std::min(left, LANE)) {}
  void turned(const float* v, float* tile) const {
    for (int j = 0; j < LANE; j++) {
      const float* from = v + std::min(j, left - 1) * width;
      for (int i = 0; i < width; i++) tile[i * LANE + j] = from[i];
    }
  }
  void top(const float* v, float* value, int32_t* hit, float* tile) const {
    turned(v, tile);
    Top found = NONE;
    scan(0, width, [&](int i, int j) { return tile[i * LANE + j]; }, found);
    for (int j = 0; j < left; j++) value[j] = found.value[j], hit[j] = found.step[j];
  }
  void softmax(const float* v, float a, float b, float* to, float* tile) const {
    turned(v, tile);
    Top found = NONE;
    const auto read = [&](int i, int j) { return tile[i * LANE + j]; };
    scan(0, width, read, found);
    double sums[LANE] = {};
    add_exp(0, width, read, found.value, tile, sums);
    float scale[LANE];
    for (int j = 0; j < LANE; j++) scale[j] = float(a / sums[j]);
    for (int i = 0; i < width; i++)
      for (int j = 0; j < LANE; j++) tile[i * LANE + j] = tile[i * LANE + j] * scale[j] + b;
    for (int j = 0; j < left; j++)
      for (int i = 0; i < width; i++) to[j * width + i] = tile[i * LANE + j];
  }
};

// one token of many classes, LANE of them a step
struct Along {
  int width, whole;  // steps that are full

  explicit Along(int width) : width(width), whole(width / LANE) {}
  Top scanned(const float* v, float* rest) const {
    Top found = NONE;
    std::fill(std::copy(v + whole * LANE, v + width, rest), rest + LANE, NOTHING);
    scan(0, whole, [&](int i, int j) { return v[i * LANE + j]; }, found);
    if (width % LANE) scan(whole, whole + 1, [&](int, int j) { return rest[j]; }, found);
    return found;
  }
  static float largest(const Top& top) {
    float most = NOTHING;
    for (int j = 0; j < LANE; j++) most = top.value[j] > most || top.value[j] != top.value[j] ? top.value[j] : most;
    return most;
  }
  void top(const float* v, float* value, int32_t* hit, float*) const {
    float rest[LANE];
    const Top found = scanned(v, rest);
    *value = largest(found);
    int32_t first = width;
    for (int j = 0; j < LANE; j++)
      if (!(found.value[j] < *value)) first = std::min(first, found.step[j] * LANE + j);
    *hit = first;
  }
  void softmax(const float* v, float a, float b, float* to, float* e) const {
    float rest[LANE], most[LANE];
    std::fill(most, most + LANE, largest(scanned(v, rest)));
    double sums[LANE] = {}, all = 0;
    add_exp(0, whole, [&](int i, int j) { return v[i * LANE + j]; }, most, e, sums);
    if (width % LANE) add_exp(whole, whole + 1, [&](int, int j) { return rest[j]; }, most, e, sums);
    for (int j = 0; j < LANE; j++) all += sums[j];
    const float scale = float(a / all);
    for (int i = 0; i < width; i++) to[i] = e[i] * scale + b;
  }
};

// work(how to go through some tokens, the first of them) for all `tokens`
template <class Work>
void each(int width, int tokens, const Work& work) {
  if (width <= FEW)
    for (int t = 0; t < tokens; t += LANE) work(Beside(width, tokens - t), t);
  else
    for (int t = 0; t < tokens; t++) work(Along(width), t);
}

// tokens a job: the Philox blocks and lanes they fill least in vain
int64_t tokens_of_job(int64_t width, int64_t tokens) {
  int64_t best = 1;
  double worth = 0;
  for (int64_t many = 1; many <= std::min<int64_t>(tokens, JOB / width); many++) {
    const int64_t n = many * width, numbers = (n + (n % 4 ? 3 : 0) + WIDTH - 1) / WIDTH * WIDTH;
    const int64_t lanes = width == 1 || width > FEW ? many : (many + LANE - 1) / LANE * LANE;
    const double filled = double(n) / numbers * many / lanes;
    if (filled >= worth) worth = filled, best = many;
  }
  return best;
}

struct Room {  // of a thread
  std::vector<float> all;
  int64_t each;

  Room(int64_t size, int parts) : all(), each((size + WIDTH + 2 * LANE) / LANE * LANE) { all.resize(each * parts); }
  float* part(int i) { return all.data() + i * each; }
};

enum Part { V, Z, E, P, X, VALUES };

// `count` numbers of a sample from element `start` on, drawn into `to` from the counter that holds the first
template <Kind KIND>
__attribute__((noinline)) const float* drawn(const Call& v, int64_t b, int64_t row, uint32_t stream, int64_t start, int64_t count, float* to) {
  const int64_t skipped = start % 4, counter = start / 4;
  for (int64_t at = 0; at < skipped + count; at += WIDTH)
    draw<KIND>(uint64_t(v.seeds[b]), uint32_t(counter + at / 4), uint32_t(row), stream,
               v.index ? uint32_t(v.index[b]) : 0u, to + at);
  return to + skipped;
}

void job(const Call& v, int64_t b, int64_t d, int tokens, Room& room) {
  const int64_t row = v.row[v.row_each ? b : 0], start = d * v.width, at = b * v.tokens * v.width + start;
  const int width = int(v.width), n = tokens * width, slots = int(v.slots);
  const float* c = v.table + row * v.row_width;
  const float *A = c + v.header, *bs = A + slots * slots, *ss = bs + 2 * slots, *from = ss + slots, *into = from + slots;

  float* mixed = room.part(V);
  const float* m = read(v.m, v.m_type, at, n, mixed);
  if (v.uncond) {
    const float* u = read(v.uncond, v.uncond_type, at, n, room.part(Z));
    const float w = v.w[row * v.w_row + b * v.w_each];
    for (int i = 0; i < n; i++) mixed[i] = u[i] + w * (m[i] - u[i]);
    m = mixed;
  }
  const float* p = nullptr;  // of "mean", and of two classes
  float* made = room.part(P);
  if (v.readout == MEAN) {
    p = made;
    if (width == 1)
      for (int i = 0; i < n; i++) made[i] = tanh_of_half(m[i]);
    else
      each(width, tokens, [&](const auto& some, int t) {
        some.softmax(m + t * width, 1.0f, 0.0f, made + t * width, room.part(E));
      });
  }
  if (v.readout == SAMPLE) {
    const float* g = v.gumbel ? v.gumbel + at
                     : width == 1 ? drawn<LOGISTIC>(v, b, row, 2, start, n, room.part(Z))
                                  : drawn<GUMBEL>(v, b, row, 2, start, n, room.part(Z));
    for (int i = 0; i < n; i++) mixed[i] = m[i] + g[i];
    m = mixed;
  }
  float top[JOB];
  int32_t hit[JOB];
  if (width == 1) {
    for (int i = 0; i < n; i++) top[i] = m[i], hit[i] = m[i] > 0.0f;
    if (!p) {
      p = made;
      for (int i = 0; i < n; i++) made[i] = m[i] > 0.0f ? 1.0f : -1.0f;
    }
  } else {
    each(width, tokens, [&](const auto& some, int t) { some.top(m + t * width, top + t, hit + t, room.part(E)); });
  }
  bool lost = false;
  for (int t = 0; t < tokens; t++) {
    lost |= top[t] != top[t];
    hit[t] = top[t] != top[t] ? 0 : hit[t];
  }
  if (v.classes) std::copy(hit, hit + tokens, v.classes + b * v.tokens + d);

  const float* z = nullptr;
  if (c[5] != 0.0f) {
    if (v.noise)
      z = v.noise + at;
    else if (v.seeds)
      z = drawn<NORMAL>(v, b, row, 1, start, n, room.part(Z));
  }
  const int64_t slot = v.batch * v.tokens * v.width;
  const float* s[TERMS];
  float weight[TERMS];
  for (int i = 0; i < slots; i++) {
    if (into[i] < 0) continue;
    int terms = 0;
    const auto term = [&](const float* of, float by) {
      if (of && by != 0.0f) s[terms] = of, weight[terms++] = by;
    };
    for (int j = 0; j < slots; j++)
      if (from[j] >= 0) term(v.state + int64_t(from[j]) * slot + at, A[i * slots + j]);
    term(z, ss[i]);
    term(p, bs[i]);
    float* y = slots == 1 ? v.state + at : room.part(VALUES + i);
    sum(s, weight, terms, y, n);
    if (!p)
      for (int t = 0; t < tokens; t++) y[t * width + hit[t]] += bs[i];
    for (int t = 0; lost && t < tokens; t++)
      if (top[t] != top[t]) std::fill(y + t * width, y + (t + 1) * width, top[t]);
  }
  for (int i = 0; slots > 1 && i < slots; i++) {
    const float* y = room.part(VALUES + i);
    if (into[i] >= 0) std::copy(y, y + n, v.state + int64_t(into[i]) * slot + at);
  }
  if (!v.copies[0]) return;
  const float* y = v.state + at;
  float* x = room.part(X);
  if (width == 1)
    for (int i = 0; i < n; i++) x[i] = tanh_of_half(y[i]);
  else
    each(width, tokens, [&](const auto& some, int t) {
      some.softmax(y + t * width, 2.0f, -1.0f, x + t * width, room.part(E));
    });
  for (void* copy : v.copies)
    if (copy) write(x, 1.0f, copy, v.copy_type, at, n);
}

}  // namespace

extern "C" void categorical_row(const Call* call) {
  const int64_t many = tokens_of_job(call->width, call->tokens), parts = (call->tokens + many - 1) / many;
#pragma omp parallel num_threads(call->threads)
  {
    Room room(std::max(many * call->width, LANE * std::min<int64_t>(call->width, FEW)),
              VALUES + (call->slots > 1 ? int(call->slots) : 0));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < call->batch * parts; i++) {
      const int64_t d = i % parts * many;
      job(*call, i / parts, d, int(std::min(many, call->tokens - d)), room);
    }
  }
}
