// Philox4x32-10 noise on a CPU, the numbers of fastdiff.rng.normal and fastdiff.gumbel, in loops that a compiler turns
// into vector code.
//
// Counters are worked on LANES at a time and always in full, so a number does not depend on what is drawn beside it.
// The logarithm is a polynomial of the mantissa; the angle's quarter turn is read off the integer, exactly.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 64, WIDTH = 4 * LANES;
constexpr uint32_t ROWS = 1, CLASSES = 2;  // streams of a row's noise, as in fastdiff.rng

// key(i): the two words of lane i
template <class Key>
inline void philox(uint32_t* a, uint32_t* b, uint32_t* c, uint32_t* d, const Key& key) {
  for (uint32_t round = 0; round < 10; round++)
    for (int i = 0; i < LANES; i++) {
      const uint64_t p0 = uint64_t(a[i]) * 0xD2511F53u, p1 = uint64_t(c[i]) * 0xCD9E8D57u;
      a[i] = uint32_t(p1 >> 32) ^ b[i] ^ (key(i, 0) + round * 0x9E3779B9u);
      c[i] = uint32_t(p0 >> 32) ^ d[i] ^ (key(i, 1) + round * 0xBB67AE85u);
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

// -ln(1 - v), v = (word + 1/2) / 2^32 kept below 1
inline float exponential(uint32_t word) { return minus_ln1m(float(word) * 0x1.fffffep-33f + 0x1p-33f); }

inline float gumbel(uint32_t word) { return -ln(exponential(word)); }

// ln(v) - ln(1 - v), folded at 1/2; in bits, as a condition here would keep a loop from being vector code
inline float logistic(uint32_t word) {
  const uint32_t folded = word ^ (0u - (word >> 31));
  const float v = float(folded) * 0x1p-32f + 0x1p-33f, x = ln(v) + minus_ln1m(v);
  uint32_t bits;
  float y;
  std::memcpy(&bits, &x, 4);
  bits ^= word & 0x80000000u;
  std::memcpy(&y, &bits, 4);
  return y;
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

struct Words {
  uint32_t a[LANES], b[LANES], c[LANES], d[LANES];
};

// the four numbers of every lane, one after another
template <Kind KIND>
__attribute__((noinline)) void numbers(const Words& v, float* out) {
  float n[4][LANES];
  if constexpr (KIND == NORMAL) {
    for (int i = 0; i < LANES; i++) turn(v.b[i], radius(v.a[i]), n[0][i], n[1][i]);
    for (int i = 0; i < LANES; i++) turn(v.d[i], radius(v.c[i]), n[2][i], n[3][i]);
  } else {
    const uint32_t* words[4] = {v.a, v.b, v.c, v.d};
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < LANES; i++) n[j][i] = KIND == GUMBEL ? gumbel(words[j][i]) : logistic(words[j][i]);
  }
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < 4; j++) out[4 * i + j] = n[j][i];
}

// the words of one sample, from counter `first` on
inline Words words(uint64_t seed, uint32_t first, uint32_t row, uint32_t stream, uint32_t index) {
  Words v;
  for (int i = 0; i < LANES; i++) {
    v.a[i] = first + i;
    v.b[i] = row;
    v.c[i] = stream;
    v.d[i] = index;
  }
  const uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  philox(v.a, v.b, v.c, v.d, [&](int, int word) { return key[word]; });
  return v;
}

// counters and keys of lanes that are each of a sample of its own
struct Keys {
  Words v = {};
  uint32_t key[2][LANES] = {};

  void put(int lane, uint64_t seed, uint32_t counter, uint32_t row, uint32_t stream, uint32_t index) {
    v.a[lane] = counter;
    v.b[lane] = row;
    v.c[lane] = stream;
    v.d[lane] = index;
    key[0][lane] = uint32_t(seed);
    key[1][lane] = uint32_t(seed >> 32);
  }

  const Words& words() {
    philox(v.a, v.b, v.c, v.d, [&](int i, int word) { return key[word][i]; });
    return v;
  }
};

// WIDTH numbers of one sample, from counter `first` on
template <Kind KIND>
void draw(uint64_t seed, uint32_t first, uint32_t row, uint32_t stream, uint32_t index, float* out) {
  numbers<KIND>(words(seed, first, row, stream, index), out);
}

// how many whole samples of n numbers share a draw; 0 where a sample alone fills more than half of it
inline int64_t samples_of_draw(int64_t n) {
  const int64_t many = n ? LANES / ((n + 3) / 4) : 0;
  return many > 1 ? many : 0;
}

// the n numbers of each of `many` samples, one sample after another; out has room for WIDTH. row(i): of the i-th
template <Kind KIND, class Row>
void draw_samples(int many, int n, const int64_t* seeds, const int64_t* index, uint32_t stream, const Row& row,
                  float* out) {
  Keys keys;
  const int counters = (n + 3) / 4;
  for (int s = 0, lane = 0; s < many; s++)
    for (int i = 0; i < counters; i++, lane++)
      keys.put(lane, uint64_t(seeds[s]), uint32_t(i), row(s), stream, index ? uint32_t(index[s]) : 0u);
  numbers<KIND>(keys.words(), out);
  for (int s = 1; n % 4 && s < many; s++) std::memmove(out + s * n, out + s * counters * 4, sizeof(float) * n);
}

}  // namespace
