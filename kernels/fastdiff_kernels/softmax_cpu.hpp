// Softmax, its largest number and what is made of both, for tokens of any number of classes.
//
// A tile is what LANE lanes go through step by step: LANE neighbouring tokens of few classes, a lane each, or LANE
// classes a step of one token of many. So every loop is vector code, and a token's numbers depend on its own alone.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int LANE = 16, FEW = 64;
constexpr int EXACT = 64;  // steps a lane adds up in fp32, before fp64

// tanh(z / 2), to full precision near 0
inline float tanh_of_half(float z) {
  int32_t n;
  const float size = std::fabs(z), q = halves(pick(size > 40.0f, 40.0f, size), n), s = power(n), e = s * q + (s - 1.0f);
  return std::copysign(e / (e + 2.0f), z);
}

// the two parts of 1 = sigmoid(z) + sigmoid(-z), each to full precision
inline void sigmoids(float z, float& up, float& down) {
  const float e = exp_of(-std::fabs(z)), big = 1.0f / (1.0f + e), small = e * big;
  up = pick(z < 0, small, big);
  down = pick(z < 0, big, small);
}

// sums[j] += the sum of value(i, j) over all steps
template <class Value>
inline void add_up(int steps, double* sums, const Value& value) {
  for (int begin = 0; begin < steps; begin += EXACT) {
    float part[LANE] = {};
    for (int i = begin; i < std::min(steps, begin + EXACT); i++)
      for (int j = 0; j < LANE; j++) part[j] += value(i, j);
    for (int j = 0; j < LANE; j++) sums[j] += part[j];
  }
}

// to = [4, n] read column by column, and `rows` the way back: twice, they transpose 16 rows of any length as vectors
static_assert(LANE == 4 * 4);
inline void columns(const float* from, int n, float* __restrict__ to) {
  for (int k = 0; k < n; k++)
    for (int q = 0; q < 4; q++) to[4 * k + q] = from[q * n + k];
}

inline void rows(const float* from, int n, float* __restrict__ to) {
  for (int k = 0; k < n; k++)
    for (int q = 0; q < 4; q++) to[q * n + k] = from[4 * k + q];
}

// a token's largest number (NaN where one is) and the first class that has it, as every lane of the token knows them
struct Top {
  float value[LANE];
  int32_t first[LANE];
};

struct Tile {
  int width, tokens, steps;
  bool beside;

  Tile(int width, int left)
      : width(width), tokens(width <= FEW ? std::min(left, LANE) : 1),
        steps(width <= FEW ? width : (width + LANE - 1) / LANE), beside(width <= FEW) {}

  int64_t size() const { return int64_t(steps) * LANE; }

  // where class k of token t is
  int64_t at(int t, int64_t k) const { return beside ? k * LANE + t : k; }

  // lanes without a token repeat the last, classes without a number have -inf; `room` is used where v is no tile itself
  const float* load(const float* v, float* room) const {
    if (beside && tokens == LANE) {
      float half[LANE * FEW];
      columns(v, 4 * width, half);
      columns(half, 4 * width, room);
      return room;
    }
    if (beside) {
      for (int j = 0; j < LANE; j++) {
        const float* from = v + std::min(j, tokens - 1) * width;
        for (int i = 0; i < width; i++) room[i * LANE + j] = from[i];
      }
      return room;
    }
    if (width % LANE == 0) return v;
    std::fill(std::copy(v, v + width, room), room + size(), -std::numeric_limits<float>::infinity());
    return room;
  }

  void store(const float* tile, float* to) const {
    if (!beside) return void(std::copy(tile, tile + width, to));
    if (tokens == LANE) {
      float half[LANE * FEW];
      rows(tile, 4 * width, half);
      rows(half, 4 * width, to);
      return;
    }
    for (int j = 0; j < tokens; j++)
      for (int i = 0; i < width; i++) to[j * width + i] = tile[i * LANE + j];
  }

  Top top(const float* tile) const {
    Top found;
    for (int j = 0; j < LANE; j++) found.value[j] = -std::numeric_limits<float>::infinity(), found.first[j] = 0;
    for (int i = 0; i < steps; i++)
      for (int j = 0; j < LANE; j++) {
        const float x = tile[i * LANE + j];
        const bool more = x > found.value[j];
        found.first[j] = more ? i : found.first[j];
        found.value[j] = more || x != x ? x : found.value[j];
      }
    if (beside) return found;
    float most = found.value[0];
    int32_t first = width;
    for (float x : found.value) most = x > most || x != x ? x : most;
    for (int j = 0; j < LANE; j++)
      if (found.value[j] == most) first = std::min(first, found.first[j] * LANE + j);
    std::fill(found.value, found.value + LANE, most);
    std::fill(found.first, found.first + LANE, first);
    return found;
  }

  // every lane of a token gets the token's sum
  void join(double* sums) const {
    if (beside) return;
    double all = 0;
    for (int j = 0; j < LANE; j++) all += sums[j];
    std::fill(sums, sums + LANE, all);
  }

  // to = exp(from - its largest), scale = a / its sum: a softmax(from) but for a product; both tiles, perhaps the same
  void exps(const float* from, float a, float* to, float* scale) const {
    const Top most = top(from);
    double sums[LANE] = {};
    add_up(steps, sums, [&](int i, int j) { return to[i * LANE + j] = exp_of(from[i * LANE + j] - most.value[j]); });
    join(sums);
    for (int j = 0; j < LANE; j++) scale[j] = float(a / sums[j]);
  }

  // to = a softmax(from) + b
  void softmax(const float* from, float a, float b, float* to) const {
    float scale[LANE];
    exps(from, a, to, scale);
    for (int i = 0; i < steps; i++)
      for (int j = 0; j < LANE; j++) to[i * LANE + j] = to[i * LANE + j] * scale[j] + b;
  }
};

// work(a tile's shape, its first token) for all tokens
template <class Work>
void each(int width, int tokens, const Work& work) {
  for (int t = 0; t < tokens; t += Tile(width, tokens - t).tokens) work(Tile(width, tokens - t), t);
}

}  // namespace
