// A row of masked diffusion on a CPU: only the tokens that it can change are read, their noise is never stored.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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
// places in a row's header: the scale of a score's noise, the share of a nucleus, the score that is enough
constexpr int64_t C_SKIP = 0, C_OUT = 1, HI = 3;
enum Order { RANDOM, CONFIDENCE, MARGIN, ENTROPY };

// the WIDTH words, one lane after another
void in_order(const Words& v, uint32_t* out) {
  for (int i = 0; i < LANES; i++) {
    out[4 * i] = v.a[i];
    out[4 * i + 1] = v.b[i];
    out[4 * i + 2] = v.c[i];
    out[4 * i + 3] = v.d[i];
  }
}

inline float uniform(uint32_t word) { return float(word) * 0x1p-32f + 0x1p-33f; }  // in (0, 1]

// uniform numbers of a sample's tokens
void uniforms(uint64_t seed, uint32_t row, uint32_t index, int64_t n, float* out) {
  uint32_t made[WIDTH];
  for (int64_t at = 0; at < n; at += WIDTH) {
    in_order(words(seed, uint32_t(at / 4), row, CHOICE, index), made);
    const int count = int(std::min<int64_t>(WIDTH, n - at));
    for (int i = 0; i < count; i++) out[at + i] = uniform(made[i]);
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

// vectors by name: a compiler takes loops of a lane apart instead
using Eight = float __attribute__((vector_size(32)));
using Four = float __attribute__((vector_size(16)));

template <class Vector>
inline Vector load(const float* v) {
  Vector x;
  std::memcpy(&x, v, sizeof(x));
  return x;
}

inline float sum_of_lane(const float* v) {
  const Eight x = load<Eight>(v) + load<Eight>(v + 8);
  float part[8];
  std::memcpy(part, &x, sizeof(x));
  const Four y = load<Four>(part) + load<Four>(part + 4);
  return (y[0] + y[2]) + (y[1] + y[3]);
}

// the largest of numbers that end in whole lanes; it does not see NaN
float largest(const float* v, int64_t steps) {
  Eight one = load<Eight>(v), two = load<Eight>(v + 8);
  for (int64_t i = 1; i < steps; i++) {
    const Eight x = load<Eight>(v + i * LANE), y = load<Eight>(v + i * LANE + 8);
    one = x > one ? x : one;
    two = y > two ? y : two;
  }
  float most = NONE;
  for (int j = 0; j < 8; j++) most = std::max(most, std::max(one[j], two[j]));
  return most;
}

// e = exp((m - top) a) and the sums of each LANE of them; their sum (NaN where one is)
double weigh(const float* m, int64_t steps, float top, float a, float* e, float* sums) {
  double all = 0;
  for (int64_t i = 0; i < steps; i++) {
    for (int j = 0; j < LANE; j++) e[i * LANE + j] = exp_of((m[i * LANE + j] - top) * a);
    sums[i] = sum_of_lane(e + i * LANE);
    all += sums[i];
  }
  return all;
}

// the numbers above t: the sum of their e, the least of them, and the largest of the others
struct Cut {
  double mass = 0;
  float above = HIGHEST, below = NONE;

  Cut(const float* m, const float* e, int64_t steps, float t) {
    Eight low = {}, high = {}, zero = {};
    for (int j = 0; j < 8; j++) low[j] = NONE, high[j] = HIGHEST;
    for (int64_t begin = 0; begin < 2 * steps; begin += EXACT) {
      Eight sum = {};
      for (int64_t i = begin; i < std::min<int64_t>(2 * steps, begin + EXACT); i++) {
        const Eight x = load<Eight>(m + 8 * i), y = load<Eight>(e + 8 * i);
        sum += x > t ? y : zero;
        high = (x > t) & (x < high) ? x : high;
        low = (x <= t) & (x > low) ? x : low;
      }
      for (int j = 0; j < 8; j++) mass += sum[j];
    }
    for (int j = 0; j < 8; j++) above = std::min(above, high[j]), below = std::max(below, low[j]);
  }
};

// the least number of the smallest set of the largest that holds a sum `held` of e: those above it hold less
float nucleus(const float* m, const float* e, int64_t steps, float top, float heat, double held) {
  float low = std::max(top - 88.0f * heat, LOWEST), high = top;  // below low e is 0
  while (low < high) {
    const float half = low + 0.5f * (high - low);
    const Cut cut(m, e, steps, half < high ? half : low);
    if (cut.mass < held)
      high = cut.below;
    else
      low = cut.above;
  }
  return high;
}

// a group by chance, of its sum's share, and a class of it: fastdiff.race. sums, e have room to a whole lane
int32_t drawn(const float* e, float* sums, int64_t steps, const uint32_t* word) {
  int32_t group = 0;
  float total = sums[0];
  if (steps > 1) {
    const int count = int(steps);
    float* ratio = sums + (steps + LANE - 1) / LANE * LANE;
    for (int i = 0; i < count; i++) ratio[i] = sums[i] / exponential(word[i]);
    float most;
    std::fill(ratio + count, ratio + (count + LANE - 1) / LANE * LANE, NONE);
    top_of(ratio, (count + LANE - 1) / LANE, most, group);
    total = sums[group];
  }
  const float* mine = e + group * LANE;
  const float target = uniform(word[steps]) * total;
  float so_far = 0;
  int32_t k = 0;
  for (int32_t j = 0; j < LANE && so_far < target; j++) {
    if (mine[j] > 0) k = j;
    so_far += mine[j];
  }
  return group * LANE + k;
}

// how sure a token is, but of CONFIDENCE; e has room for the numbers m. Sums leave out the class they are relative to.
float score_of(const float* m, int64_t steps, Order order, float* e) {
  float top;
  int32_t k;
  top_of(m, steps, top, k);
  const int count = int(steps) * LANE;
  for (int i = 0; i < count; i++) e[i] = exp_of(m[i] - top);
  e[k] = 0.0f;
  double sums[LANE] = {}, rest = 0, weighted = 0;
  add_up(int(steps), sums, [&](int i, int j) { return e[i * LANE + j]; });
  for (double x : sums) rest += x;
  if (order == MARGIN) {
    const double gap = *std::max_element(e, e + count);
    return float(std::log((1.0 - gap) / (rest + gap)));
  }
  std::fill(sums, sums + LANE, 0.0);
  add_up(int(steps), sums, [&](int i, int j) { return e[i * LANE + j] * std::max(m[i * LANE + j] - top, -104.0f); });
  for (double x : sums) weighted += x;
  return float(weighted / (1.0 + rest) - std::log1p(rest));
}

// of class k: the sums and their parts but for its own
float confidence_of(const float* m, int64_t steps, float top, int32_t k, const float* e, const float* sums) {
  double rest = 0;
  const int32_t group = k / LANE;
  for (int32_t i = 0; i < int32_t(steps); i++) rest += i == group ? 0.0f : sums[i];
  for (int32_t j = 0; j < LANE; j++) rest += group * LANE + j == k ? 0.0f : e[group * LANE + j];
  return float(double(m[k]) - double(top) - std::log(rest));
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

// asks for the first numbers of a token that is read next
void fetch(const void* from, int64_t type, int64_t at, int64_t width) {
  const int64_t size = type == FP32 ? 4 : 2;
  const char* first = static_cast<const char*>(from) + at * size;
  for (int64_t i = 0; i < std::min<int64_t>(width * size, 4096); i += 64) __builtin_prefetch(first + i);
}

struct Room {
  std::vector<float> m, v, e, sums;
  std::vector<uint32_t> words;
};

}  // namespace

// tokens [batch, length]: what becomes of them in row[b]; group: the block of a token; copies: [many, batch, length]
extern "C" void unmask_row(int64_t* tokens, const int32_t* group, const void* logits, const void* uncond,
                           const float* w, const float* table, const int64_t* rows, const int64_t* seeds,
                           const int64_t* index, int64_t* copies, int64_t many, int64_t mask, int64_t order,
                           int64_t batch, int64_t length, int64_t width, int64_t row_width, int64_t header,
                           int64_t w_row, int64_t w_each, int64_t row_each, int64_t cuts, int64_t m_type,
                           int64_t u_type, int64_t threads) {
  const int64_t early = width % 4 == 0 ? 0 : width % 4 == 2 ? 2 : 3;
  const int64_t steps = (width + early + LANE - 1) / LANE, counters = steps / 4 + 1;  // groups of a token, and its words
  const int64_t beside = std::max<int64_t>(1, LANES / counters);
  const int n = int(width);
  const auto row_of = [&](int64_t b) { return rows[b * row_each]; };
  const auto header_of = [&](int64_t b) { return table + row_of(b) * row_width; };
  const auto numbers_of = [&](int64_t b) { return header_of(b) + header; };  // A, b, d, s

  std::vector<int64_t> read_in, ends;  // the tokens that are read, and where those of a sample end
  std::vector<float> chance(order == RANDOM ? size_t(length) : 0);
  for (int64_t b = 0; b < batch; b++) {
    const float* c = numbers_of(b);
    if (order == RANDOM) uniforms(uint64_t(seeds[b]), uint32_t(row_of(b)), uint32_t(index[b]), length, chance.data());
    for (int64_t d = 0, at = b * length; d < length; d++, at++) {
      if (group[at] != int32_t(c[2])) continue;
      if (tokens[at] != mask) {
        if (order == RANDOM && chance[size_t(d)] > c[0]) tokens[at] = mask;
      } else if (order != RANDOM || chance[size_t(d)] <= c[1]) {
        read_in.push_back(at);
      }
    }
    ends.push_back(int64_t(read_in.size()));
  }

  const int64_t all = int64_t(read_in.size()), jobs = (all + beside - 1) / beside;
  std::vector<int32_t> hit(static_cast<size_t>(all));
  std::vector<float> score(order == RANDOM ? 0 : size_t(all));
#pragma omp parallel num_threads(int(threads))
  {
    static thread_local Room room;
    room.m.assign(size_t(steps) * LANE, NONE);
    room.v.resize(size_t(width));
    room.e.resize(size_t(steps) * LANE);
    room.sums.resize(size_t(2 * (steps + LANE)));
    room.words.resize(size_t((beside * counters + LANES - 1) / LANES * WIDTH));
    float *e = room.e.data(), *sums = room.sums.data();
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < jobs; job++) {
      const int64_t begin = job * beside, end = std::min(all, begin + beside);
      const auto sample = [&](int64_t i) { return read_in[size_t(i)] / length; };
      bool draws = false;
      for (int64_t i = begin; i < end; i++) draws = draws || numbers_of(sample(i))[3] != 0.0f;
      for (int64_t first = 0; draws && first < (end - begin) * counters; first += LANES) {
        Keys keys;
        for (int64_t lane = 0; lane < LANES; lane++) {
          const int64_t i = std::min(begin + (first + lane) / counters, end - 1), b = sample(i);
          const int64_t counter = read_in[size_t(i)] % length * counters + (first + lane) % counters;
          keys.put(int(lane), uint64_t(seeds[b]), uint32_t(counter), uint32_t(row_of(b)), CLASSES, uint32_t(index[b]));
        }
        in_order(keys.words(), room.words.data() + 4 * first);
      }
      for (int64_t i = begin; i < end; i++) {
        const int64_t at = read_in[size_t(i)], b = sample(i), shift = at % length * width % 4;
        if (i + 1 < all) fetch(logits, m_type, read_in[size_t(i + 1)] * width, width);
        if (i + 1 < all && uncond) fetch(uncond, u_type, read_in[size_t(i + 1)] * width, width);
        float* m = room.m.data() + shift;
        const float* given = read(logits, int(m_type), at * width, n, room.v.data());
        if (uncond) {
          const float* u = read(uncond, int(u_type), at * width, n, e);
          const float by = w[row_of(b) * w_row + b * w_each];
          for (int i = 0; i < n; i++) m[i] = given[i] == u[i] ? given[i] : u[i] + by * (given[i] - u[i]);
        } else {
          std::copy(given, given + width, m);
        }
        if (mask < width) m[mask] = NONE;
        m = room.m.data();
        std::fill(m, m + shift, NONE);
        std::fill(m + shift + width, m + steps * LANE, NONE);
        const float heat = numbers_of(b)[3];
        float top = largest(m, steps);
        int32_t k = 0;
        bool known = top > NONE, cut = false;
        if (heat != 0.0f && top < -NONE) {
          const double sum = known ? weigh(m, steps, top, std::min(1.0f / heat, 1e30f), e, sums) : 0.0;
          known = sum > 0;  // no NaN
          cut = known && cuts && header_of(b)[C_OUT] < 1;
          if (cut) {
            const float least = nucleus(m, e, steps, top, heat, header_of(b)[C_OUT] * sum);
            for (int64_t j = 0; j < steps * LANE; j++) e[j] = m[j] < least ? 0.0f : e[j];
            for (int64_t j = 0; j < steps; j++) sums[j] = sum_of_lane(e + j * LANE);
          }
          if (known) k = drawn(e, sums, steps, room.words.data() + 4 * (i - begin) * counters);
        } else {
          top_of(m, steps, top, k);
          known = top > NONE;
        }
        hit[size_t(i)] = known ? k - int32_t(shift) : int32_t(mask);
        if (order == RANDOM) continue;
        float sure = LOWEST;
        if (known && top == -NONE) {
          sure = HIGHEST;
        } else if (known && order == CONFIDENCE) {
          if (heat != 1.0f || cut) weigh(m, steps, top, 1.0f, e, sums);
          sure = confidence_of(m, steps, top, k, e, sums);
        } else if (known) {
          sure = score_of(m, steps, Order(order), e);
        }
        score[size_t(i)] = sure >= LOWEST ? std::min(sure, HIGHEST) : LOWEST;
      }
    }
  }

  std::vector<int64_t> places;
  std::vector<float> noise;
  for (int64_t b = 0; b < batch; b++) {
    places.clear();
    for (int64_t i = b ? ends[size_t(b - 1)] : 0; i < ends[size_t(b)]; i++) places.push_back(i);
    int64_t count = int64_t(places.size());
    if (order != RANDOM) {
      const float heat = header_of(b)[C_SKIP], enough = header_of(b)[HI];
      if (heat != 0.0f) {
        noise.resize(size_t(length + WIDTH));
        for (int64_t i = 0; i < length; i += WIDTH)
          draw<GUMBEL>(uint64_t(seeds[b]), uint32_t(i / 4), uint32_t(row_of(b)), CHOICE, uint32_t(index[b]),
                       noise.data() + i);
        for (int64_t i : places)
          score[size_t(i)] = shaken(score[size_t(i)], heat, noise[size_t(read_in[size_t(i)] % length)], Order(order));
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
        std::nth_element(places.begin(), places.begin() + count, places.end(), surer);
      }
    }
    for (int64_t i = 0; i < count; i++) tokens[read_in[size_t(places[size_t(i)])]] = hit[size_t(places[size_t(i)])];
  }
  for (int64_t i = 0; i < many; i++) std::copy(tokens, tokens + batch * length, copies + i * batch * length);
}
