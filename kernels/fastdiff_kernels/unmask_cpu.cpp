// A row of masked diffusion on a CPU: only the tokens that it can change are read, their noise is never stored.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "exp_cpu.hpp"
#include "philox_cpu.hpp"
#include "softmax_cpu.hpp"
#include "types_cpu.hpp"

namespace {

constexpr float NONE = -std::numeric_limits<float>::infinity(), LOWEST = -3.0e38f, HIGHEST = 3.0e38f;
constexpr float ROUNDING = 0x1p-21f;  // what fp32 may take from 1 - b
constexpr uint32_t CHOICE = 5;       // the stream that chooses tokens
constexpr int64_t C_SKIP = 0, HI = 3;  // places in a row's header: the scale of a score's noise, the score that is enough
constexpr int64_t TOGETHER = 2 * WIDTH;  // numbers of tokens of few classes that are drawn in one go
enum Order { RANDOM, CONFIDENCE, MARGIN, ENTROPY };

// uniform numbers in (0, 1] of a sample's tokens
void uniforms(uint64_t seed, uint32_t row, uint32_t index, int64_t n, float* out) {
  const uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int64_t at = 0; at < n; at += WIDTH) {
    Words v;
    for (int i = 0; i < LANES; i++) v.a[i] = uint32_t(at / 4 + i), v.b[i] = row, v.c[i] = CHOICE, v.d[i] = index;
    philox(v.a, v.b, v.c, v.d, [&](int, int word) { return key[word]; });
    const uint32_t* words[4] = {v.a, v.b, v.c, v.d};
    for (int64_t i = 0; i < std::min<int64_t>(WIDTH, n - at); i++)
      out[at + i] = float(words[i % 4][i / 4]) * 0x1p-32f + 0x1p-33f;
  }
}

// a score with noise: one that is ln(p / (1 - p)) as ln p. The surest and the least sure are what they are.
float shaken(float score, float heat, float noise, Order order) {
  if (score == HIGHEST || score == LOWEST) return score;
  float plain = score;
  if (order != ENTROPY) plain = std::min(score, 0.0f) - std::log1p(std::exp(-std::abs(score)));
  return std::min(std::max(plain + heat * noise, LOWEST), HIGHEST);
}

// the largest of numbers that end in whole lanes (NaN where one is), and the first that has it
void top_of(const float* v, int64_t steps, float& value, int32_t& first) {
  float most[LANE];
  int32_t at[LANE];
  for (int j = 0; j < LANE; j++) most[j] = NONE, at[j] = 0;
  for (int32_t i = 0; i < int32_t(steps); i++)
    for (int j = 0; j < LANE; j++) {
      const float x = v[i * LANE + j];
      const bool more = x > most[j];
      at[j] = more ? i : at[j];
      most[j] = more || x != x ? x : most[j];
    }
  value = most[0];
  for (float x : most) value = x > value || x != x ? x : value;
  first = std::numeric_limits<int32_t>::max();
  for (int j = 0; j < LANE; j++)
    if (most[j] == value) first = std::min(first, at[j] * LANE + j);
}

// how sure a token is; e has room for the numbers m. Sums leave out the class they are relative to.
float score_of(const float* m, int64_t steps, int32_t k, Order order, float* e) {
  float top;
  int32_t first;
  top_of(m, steps, top, first);
  if (top == -NONE) return HIGHEST;
  if (order != CONFIDENCE) k = first;
  const int count = int(steps) * LANE;
  for (int i = 0; i < count; i++) e[i] = exp_of(m[i] - top);
  e[k] = 0.0f;
  double sums[LANE] = {}, rest = 0, weighted = 0;
  add_up(int(steps), sums, [&](int i, int j) { return e[i * LANE + j]; });
  for (double x : sums) rest += x;
  if (order == CONFIDENCE) return float(double(m[k]) - double(top) - std::log(rest));
  if (order == MARGIN) {
    const double gap = *std::max_element(e, e + count);
    return float(std::log((1.0 - gap) / (rest + gap)));
  }
  std::fill(sums, sums + LANE, 0.0);
  add_up(int(steps), sums, [&](int i, int j) { return e[i * LANE + j] * std::max(m[i * LANE + j] - top, -104.0f); });
  for (double x : sums) weighted += x;
  return float(weighted / (1.0 + rest) - std::log1p(rest));
}

// how many of tokens in their order are sure enough: by their own score, or of ENTROPY by the sum of those before
int64_t enough_of(const std::vector<int64_t>& places, const std::vector<float>& score, float enough, Order order) {
  int64_t count = 0;
  double before = 0;
  for (int64_t at : places) {
    if (order == ENTROPY ? before < enough : score[size_t(at)] <= enough) break;
    before += std::min(score[size_t(at)], 0.0f);
    count++;
  }
  return count;
}

struct Room {
  std::vector<float> m, u, v, g;
};

}  // namespace

// tokens [batch, length]: what becomes of them in row[b]; group: the block of a token; copies: [many, batch, length]
extern "C" void unmask_row(int64_t* tokens, const int32_t* group, const void* logits, const void* uncond,
                           const float* w, const float* table, const int64_t* rows, const int64_t* seeds,
                           const int64_t* index, int64_t* copies, int64_t many, int64_t mask, int64_t order,
                           int64_t batch, int64_t length, int64_t width, int64_t row_width, int64_t header,
                           int64_t w_row, int64_t w_each, int64_t row_each, int64_t m_type, int64_t u_type,
                           int64_t threads) {
  const int64_t steps = (width + LANE - 1) / LANE, all = batch * length;
  const int n = int(width);
  const int64_t beside = std::max<int64_t>(1, TOGETHER / width), pieces = (length + beside - 1) / beside;
  const auto row_of = [&](int64_t b) { return rows[b * row_each]; };
  const auto header_of = [&](int64_t b) { return table + row_of(b) * row_width; };
  const auto numbers_of = [&](int64_t b) { return header_of(b) + header; };  // A, b, d, s

  std::vector<float> chance(order == RANDOM ? size_t(length) : 0), score(order == RANDOM ? 0 : size_t(all));
  std::vector<int32_t> hit(size_t(all), -1);  // -1: not read
  std::vector<uint8_t> chosen(size_t(all), 0);
  for (int64_t b = 0; b < batch; b++) {
    const float* c = numbers_of(b);
    if (order == RANDOM) uniforms(uint64_t(seeds[b]), uint32_t(row_of(b)), uint32_t(index[b]), length, chance.data());
    for (int64_t d = 0, at = b * length; d < length; d++, at++) {
      if (group[at] != int32_t(c[2])) continue;
      if (tokens[at] == mask)
        chosen[size_t(at)] = order != RANDOM || chance[size_t(d)] <= c[1];
      else if (order == RANDOM && chance[size_t(d)] > c[0])
        tokens[at] = mask;
    }
  }

#pragma omp parallel num_threads(int(threads))
  {
    static thread_local Room room;
    room.m.assign(size_t(steps) * LANE, NONE);
    room.u.resize(size_t(steps) * LANE);
    room.v.assign(size_t(steps) * LANE, NONE);
    room.g.resize(size_t(beside * width + 2 * WIDTH));
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < batch * pieces; job++) {
      const int64_t b = job / pieces, begin = job % pieces * beside, end = std::min(length, begin + beside);
      const uint8_t* mine = chosen.data() + b * length;
      if (std::none_of(mine + begin, mine + end, [](uint8_t x) { return x != 0; })) continue;
      const int64_t row = row_of(b), early = begin * width % 4;
      const float heat = numbers_of(b)[3];
      if (heat != 0.0f)
        for (int64_t i = 0; i < early + (end - begin) * width; i += WIDTH)
          draw<GUMBEL>(uint64_t(seeds[b]), uint32_t((begin * width + i) / 4), uint32_t(row), CLASSES,
                       uint32_t(index[b]), room.g.data() + i);
      for (int64_t d = begin; d < end; d++) {
        if (!mine[d]) continue;
        const int64_t at = b * length + d;
        float *m = room.m.data(), *v = m;
        const float* given = read(logits, int(m_type), at * width, n, room.v.data());
        if (uncond) {
          const float* u = read(uncond, int(u_type), at * width, n, room.u.data());
          const float by = w[row * w_row + b * w_each];
          for (int i = 0; i < n; i++) m[i] = given[i] == u[i] ? given[i] : u[i] + by * (given[i] - u[i]);
        } else {
          std::copy(given, given + width, m);
        }
        if (mask < width) m[mask] = NONE;
        if (heat != 0.0f) {
          v = room.v.data();
          const float* g = room.g.data() + early + (d - begin) * width;
          for (int i = 0; i < n; i++) v[i] = m[i] + heat * g[i];
          std::fill(v + width, v + steps * LANE, NONE);
        }
        float top;
        int32_t k;
        top_of(v, steps, top, k);
        const bool known = top > NONE;  // no NaN, and a class that is allowed
        hit[size_t(at)] = known ? k : int32_t(mask);
        if (order == RANDOM) continue;
        const float sure = known ? score_of(m, steps, k, Order(order), room.u.data()) : LOWEST;
        score[size_t(at)] = sure >= LOWEST ? std::min(sure, HIGHEST) : LOWEST;
      }
    }
  }

  std::vector<int64_t> places;
  std::vector<float> noise;
  for (int64_t b = 0; b < batch; b++) {
    places.clear();
    for (int64_t at = b * length; at < (b + 1) * length; at++)
      if (hit[size_t(at)] >= 0) places.push_back(at);
    int64_t count = int64_t(places.size());
    if (order != RANDOM) {
      const float heat = header_of(b)[C_SKIP], enough = header_of(b)[HI];
      if (heat != 0.0f) {
        noise.resize(size_t(length + WIDTH));
        for (int64_t i = 0; i < length; i += WIDTH)
          draw<GUMBEL>(uint64_t(seeds[b]), uint32_t(i / 4), uint32_t(row_of(b)), CHOICE, uint32_t(index[b]),
                       noise.data() + i);
        for (int64_t at : places)
          score[size_t(at)] = shaken(score[size_t(at)], heat, noise[size_t(at - b * length)], Order(order));
      }
      const float kept = std::floor(float(count) * (1.0f - numbers_of(b)[1] + ROUNDING));
      count = std::max<int64_t>(0, count - int64_t(kept));
      const auto surer = [&](int64_t x, int64_t y) {
        const float p = score[size_t(x)], q = score[size_t(y)];
        return p != q ? p > q : x < y;
      };
      if (enough < HIGHEST) {
        std::sort(places.begin(), places.end(), surer);
        count = std::max(count, enough_of(places, score, enough, Order(order)));
      } else {
        std::partial_sort(places.begin(), places.begin() + count, places.end(), surer);
      }
    }
    for (int64_t i = 0; i < count; i++) tokens[places[size_t(i)]] = hit[size_t(places[size_t(i)])];
  }
  for (int64_t i = 0; i < many; i++) std::copy(tokens, tokens + all, copies + i * all);
}
