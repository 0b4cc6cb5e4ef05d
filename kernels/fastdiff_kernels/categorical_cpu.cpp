// Categorical data on a CPU, any number of classes: a row of a plan, noised data, and the loss with its gradient.
//
// A job is some whole tokens of a sample, or some small samples that share a draw. Their numbers and noise stay in a
// core's caches, and noise is never stored.

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "exp_cpu.hpp"
#include "philox_cpu.hpp"
#include "softmax_cpu.hpp"
#include "sums_cpu.hpp"
#include "types_cpu.hpp"

namespace {

constexpr int JOB = 2048, TERMS = SLOTS + 2;
enum Readout { SAMPLE, ARGMAX, MEAN };

// tensors [batch, tokens, width], dense
struct Shape {
  int64_t batch, tokens, width;
};

// what fastdiff.categorical_cpu.Call declares; null where there is none
struct Call {
  Shape shape;
  float* state;
  const void *m, *uncond;
  const float *w, *noise, *gumbel, *table;
  const int64_t *row, *seeds, *index;
  void* copies[COPIES];
  int64_t* classes;
  int64_t slots, header, row_width, row_each, w_row, w_each;
  int32_t m_type, uncond_type, copy_type, readout, threads;
};

// tokens a job, in whole tiles: as many as leave the fewest numbers of a Philox block unused
int64_t tokens_of_job(int64_t width, int64_t tokens) {
  const int64_t limit = std::min<int64_t>(tokens, JOB / width), step = width > FEW ? 1 : LANE;
  int64_t best = std::max<int64_t>(1, limit);
  double most = 0;
  for (int64_t many = best; many > 0; many = many > step ? (many - 1) / step * step : 0) {
    const int64_t n = many * width, numbers = (n + (n % 4 ? 3 : 0) + WIDTH - 1) / WIDTH * WIDTH;
    const double used = double(n) / double(numbers);
    if (used > most) most = used, best = many;
  }
  return best;
}

// buffers of a thread
enum Part { V, Z, TILE, P, VALUES };

struct Room {
  float* all;
  int64_t each;

  // kept for the next call: new memory is mapped and cleared page by page
  Room(int64_t size, int parts) : each((size + WIDTH + 2 * LANE) / LANE * LANE) {
    static thread_local std::vector<float> kept;
    if (int64_t(kept.size()) < each * parts) kept.resize(size_t(each) * parts);
    all = kept.data();
  }
  float* part(int i) { return all + i * each; }
};

// `tokens` tokens, n numbers, from the element `start` of sample b on; of `samples` samples, all of each where many
struct Job {
  int64_t b, start, token, at;  // token, at: places in the whole tensors
  int samples, tokens, width, n;

  int each() const { return n / samples; }
};

template <class Work>
void each_job(const Shape& shape, int64_t together, int parts, int threads, const Work& work) {
  const int64_t many = tokens_of_job(shape.width, shape.tokens), pieces = (shape.tokens + many - 1) / many;
  const int64_t shared = pieces == 1 ? std::max<int64_t>(1, together) : 1, groups = (shape.batch + shared - 1) / shared;
  const int64_t size = std::max(shared * many * shape.width, LANE * std::min<int64_t>(shape.width, FEW));
#pragma omp parallel num_threads(threads)
  {
    Room room(size, parts);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < groups * pieces; i++) {
      const int64_t b = i / pieces * shared, d = i % pieces * many, samples = std::min(shared, shape.batch - b);
      const int64_t tokens = samples * std::min(many, shape.tokens - d), token = b * shape.tokens + d;
      const int64_t w = shape.width;
      work(Job{b, d * w, token, token * w, int(samples), int(tokens), int(w), int(tokens * w)}, room, i);
    }
  }
}

// a job's noise, drawn from the Philox counter that holds its first element on
template <Kind KIND>
const float* drawn(const Job& job, const int64_t* seeds, const int64_t* index, int64_t row, uint32_t stream,
                   float* to) {
  if (job.samples > 1) {
    draw_samples<KIND>(job.samples, job.each(), seeds + job.b, index ? index + job.b : nullptr, stream,
                       [&](int) { return uint32_t(row); }, to);
    return to;
  }
  const int64_t skipped = job.start % 4, counter = job.start / 4;
  for (int64_t at = 0; at < skipped + job.n; at += WIDTH)
    draw<KIND>(uint64_t(seeds[job.b]), uint32_t(counter + at / 4), uint32_t(row), stream,
               index ? uint32_t(index[job.b]) : 0u, to + at);
  return to + skipped;
}

// to = a softmax(v) + b, or of two classes 2 sigmoid(v) - 1; `to` has room for a tile behind its end
void softmax(const Job& job, const float* v, float a, float b, float* to, float* room) {
  if (job.width == 1) {
    for (int i = 0; i < job.n; i++) to[i] = tanh_of_half(v[i]);
    return;
  }
  each(job.width, job.tokens, [&](const Tile& tile, int t) {
    float* made = tile.beside ? room : to + t * job.width;  // what many classes leave beyond is written over
    tile.softmax(tile.load(v + t * job.width, room), a, b, made);
    if (tile.beside) tile.store(room, to + t * job.width);
  });
}

// a token's largest number and its class, 0 where that is NaN; is one NaN?
bool decide(const Job& job, const float* v, float* top, int32_t* hit, float* room) {
  if (job.width == 1)
    for (int i = 0; i < job.n; i++) top[i] = v[i], hit[i] = v[i] > 0.0f;
  else
    each(job.width, job.tokens, [&](const Tile& tile, int t) {
      const Top found = tile.top(tile.load(v + t * job.width, room));
      std::copy(found.value, found.value + tile.tokens, top + t);
      std::copy(found.first, found.first + tile.tokens, hit + t);
    });
  bool lost = false;
  for (int t = 0; t < job.tokens; t++) {
    lost |= top[t] != top[t];
    hit[t] = top[t] != top[t] ? 0 : hit[t];
  }
  return lost;
}

void run(const Call& v, const Job& job, Room& room) {
  const int64_t row = v.row[v.row_each ? job.b : 0], size = v.shape.batch * v.shape.tokens * v.shape.width;
  const int n = job.n, slots = int(v.slots), width = job.width;
  const float *c = v.table + row * v.row_width, *A = c + v.header, *b = A + slots * slots, *s = b + 2 * slots;
  const float *reads = s + slots, *writes = reads + slots;

  float *mixed = room.part(V), *p = nullptr;  // p: unless it is a one-hot
  const float* m = read(v.m, v.m_type, job.at, n, mixed);
  if (v.uncond) {
    const float* u = read(v.uncond, v.uncond_type, job.at, n, room.part(Z));
    for (int k = 0, each = job.each(); k < job.samples; k++) {
      const float w = v.w[row * v.w_row + (job.b + k) * v.w_each];
      for (int i = k * each; i < (k + 1) * each; i++) mixed[i] = m[i] == u[i] ? m[i] : u[i] + w * (m[i] - u[i]);
    }
    m = mixed;
  }
  if (v.readout == MEAN) softmax(job, m, 1.0f, 0.0f, p = room.part(P), room.part(TILE));
  if (v.readout == SAMPLE) {
    const auto made = width == 1 ? drawn<LOGISTIC> : drawn<GUMBEL>;
    const float* g = v.gumbel ? v.gumbel + job.at : made(job, v.seeds, v.index, row, CLASSES, room.part(Z));
    for (int i = 0; i < n; i++) mixed[i] = m[i] + g[i];
    m = mixed;
  }
  float top[JOB];
  int32_t hit[JOB];
  const bool lost = decide(job, m, top, hit, room.part(TILE));
  if (v.classes) std::copy(hit, hit + job.tokens, v.classes + job.token);
  if (width == 1 && !p) {
    p = room.part(P);
    for (int i = 0; i < n; i++) p[i] = hit[i] ? 1.0f : -1.0f;
  }

  const float* z = nullptr;
  if (c[5] != 0.0f && v.noise) z = v.noise + job.at;
  if (c[5] != 0.0f && !v.noise && v.seeds) z = drawn<NORMAL>(job, v.seeds, v.index, row, ROWS, room.part(Z));
  const auto target = [&](int i) { return v.state + int64_t(writes[i]) * size + job.at; };
  for (int i = 0; i < slots; i++) {
    if (writes[i] < 0) continue;
    const float* of[TERMS];
    float by[TERMS];
    int terms = 0;
    const auto term = [&](const float* x, float weight) {
      if (x && weight != 0.0f) of[terms] = x, by[terms++] = weight;
    };
    for (int j = 0; j < slots; j++)
      if (reads[j] >= 0) term(v.state + int64_t(reads[j]) * size + job.at, A[i * slots + j]);
    term(z, s[i]);
    term(p, b[i]);
    float* y = slots == 1 ? target(i) : room.part(VALUES + i);
    sum(of, by, terms, y, n);
    for (int t = 0; !p && t < job.tokens; t++) y[t * width + hit[t]] += b[i];
    for (int t = 0; lost && t < job.tokens; t++)
      if (top[t] != top[t]) std::fill(y + t * width, y + (t + 1) * width, top[t]);
  }
  for (int i = 0; slots > 1 && i < slots; i++)
    if (writes[i] >= 0) std::copy(room.part(VALUES + i), room.part(VALUES + i) + n, target(i));
  if (!v.copies[0]) return;
  softmax(job, v.state + job.at, 2.0f, -1.0f, room.part(V), room.part(TILE));
  for (void* copy : v.copies)
    if (copy) write(room.part(V), 1.0f, copy, v.copy_type, job.at, n);
}

// the sum of the squared errors of a job's tokens; d, unless null, becomes `tokens` times its gradient
double error_of(const Job& job, const float* m, const int64_t* x, float* d, float* room) {
  double all = 0;
  if (job.width == 1) {
    float error[JOB];
    for (int i = 0; i < job.n; i++) {
      float up, down;
      sigmoids(m[i], up, down);
      const float r = x[i] ? -down : up;
      error[i] = 2.0f * r * r;
      if (d) d[i] = 4.0f * r * up * down;
    }
    for (int i = 0; i < job.n; i++) all += error[i];
    return all;
  }
  each(job.width, job.tokens, [&](const Tile& tile, int t) {
    double rest[LANE] = {}, squares[LANE] = {}, error[LANE];  // sums over the others: 1 - p loses digits at p near 1
    float p[LANE], dot[LANE], scale[LANE];
    tile.exps(tile.load(m + t * job.width, room), 1.0f, room, scale);
    for (int j = 0; j < tile.tokens; j++) p[j] = std::exchange(room[tile.at(j, x[t + j])], 0.0f) * scale[j];
    add_up(tile.steps, rest, [&](int i, int j) { return room[i * LANE + j] *= scale[j]; });
    add_up(tile.steps, squares, [&](int i, int j) { return room[i * LANE + j] * room[i * LANE + j]; });
    tile.join(rest);
    tile.join(squares);
    for (int j = 0; j < tile.tokens; j++) {
      all += error[j] = squares[j] + rest[j] * rest[j];
      dot[j] = float(squares[j] - p[j] * rest[j]);  // sum p (p - onehot)
    }
    if (!d) return;
    std::fill(dot + tile.tokens, dot + LANE, dot[tile.tokens - 1]);
    for (int i = 0; i < tile.steps; i++)
      for (int j = 0; j < LANE; j++) room[i * LANE + j] *= 2.0f * (room[i * LANE + j] - dot[j]);
    for (int j = 0; j < tile.tokens; j++) room[tile.at(j, x[t + j])] = float(-2.0 * p[j] * error[j]);
    tile.store(room, d + t * job.width);
  });
  return all;
}

}  // namespace

extern "C" void categorical_row(const Call* call) {
  const int64_t together = call->row_each || !call->seeds ? 1 : samples_of_draw(call->shape.tokens * call->shape.width);
  each_job(call->shape, together, VALUES + (call->slots > 1 ? int(call->slots) : 0), call->threads,
           [&](const Job& job, Room& room, int64_t) { run(*call, job, room); });
}

// z = c[0] onehot(x) (two classes: 2 x - 1) + c[1] n, c the sample's row of four, stored unless null; out = 2 softmax(z) - 1
extern "C" void categorical_noise(const Shape* shape, const int64_t* x, const float* noise, const Rows* rows,
                                  const int64_t* seeds, const int64_t* index, int64_t row, void* out, void* logits,
                                  int64_t out_type, int64_t threads) {
  const int64_t together = noise ? 1 : samples_of_draw(shape->tokens * shape->width);
  each_job(*shape, together, VALUES, int(threads), [&](const Job& job, Room& room, int64_t) {
    const float* n = noise ? noise + job.at : drawn<NORMAL>(job, seeds, index, row, ROWS, room.part(Z));
    const int64_t* classes = x + job.token;
    float *z = room.part(V), *y = room.part(P);
    for (int k = 0, each = job.each(), tokens = job.tokens / job.samples; k < job.samples; k++) {
      const float alpha = rows->of(job.b + k, 4)[0], sigma = rows->of(job.b + k, 4)[1];
      for (int i = k * each; i < (k + 1) * each; i++) z[i] = sigma * n[i];
      for (int t = k * tokens; t < (k + 1) * tokens; t++) {
        if (job.width == 1)
          z[t] += classes[t] ? alpha : -alpha;
        else
          z[t * job.width + classes[t]] += alpha;
      }
    }
    softmax(job, z, 2.0f, -1.0f, y, room.part(TILE));
    write(y, 1.0f, out, int(out_type), job.at, job.n);
    if (logits) write(z, 1.0f, logits, int(out_type), job.at, job.n);
  });
}

// error [batch] = mean over tokens of ||onehot(x) - softmax(m)||^2 (two classes: 2 (x - sigmoid(m))^2); grad, of m's
// type, unless null: `tokens` times its gradient
extern "C" void categorical_loss(const Shape* shape, const void* m, const int64_t* x, float* error, void* grad,
                                 int64_t m_type, int64_t threads) {
  const int64_t many = tokens_of_job(shape->width, shape->tokens), jobs = (shape->tokens + many - 1) / many;
  std::vector<double> sums(shape->batch * jobs);  // which are added up in an order of the sample alone
  each_job(*shape, 1, VALUES, int(threads), [&](const Job& job, Room& room, int64_t i) {
    const float* logits = read(m, int(m_type), job.at, job.n, room.part(V));
    const bool apart = grad && m_type != FP32;  // an fp32 gradient is made where it belongs
    float* d = apart ? room.part(P) : grad ? static_cast<float*>(grad) + job.at : nullptr;
    sums[i] = error_of(job, logits, x + job.token, d, room.part(TILE));
    if (apart) write(d, 1.0f, grad, int(m_type), job.at, job.n);
  });
  for (int64_t b = 0; b < shape->batch; b++) {
    double all = 0;
    for (int64_t i = b * jobs; i < (b + 1) * jobs; i++) all += sums[i];
    error[b] = float(all / double(shape->tokens));
  }
}
