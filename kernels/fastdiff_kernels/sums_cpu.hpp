// Sums of products over a block. An operand may be the output itself, never a part of it shifted.

#include <algorithm>

namespace {

constexpr int IN_ONE = 4;  // terms a pass sums
constexpr int SLOTS = 16, COPIES = 2;  // what a row may have at most, of slots and of places for the model's next input

// f(i) for every element, several vectors at a time: the counting costs as much as a sum of two terms
template <class F>
void unrolled(int count, F f) {
  constexpr int MANY = 32;
  int i = 0;
  for (; i + MANY <= count; i += MANY)
#pragma omp simd
    for (int j = i; j < i + MANY; j++) f(j);
#pragma omp simd
  for (int j = i; j < count; j++) f(j);
}

// the operands of K terms in registers: a result that is written might change what is still in memory
template <int K>
struct Terms {
  const float* s[K ? K : 1];
  float c[K ? K : 1];

  Terms(const float* const* s_, const float* c_) {
    for (int k = 0; k < K; k++) s[k] = s_[k], c[k] = c_[k];
  }
};

template <int K, bool MORE>
void add(const float* const* s, const float* c, float* to, int count) {
  const Terms<K> t(s, c);
  unrolled(count, [=](int i) {
    float v = MORE ? to[i] + t.c[0] * t.s[0][i] : t.c[0] * t.s[0][i];
    for (int k = 1; k < K; k++) v += t.c[k] * t.s[k][i];
    to[i] = v;
  });
}

template <bool MORE>
void add(const float* const* s, const float* c, int n, float* to, int count) {
  if (n == 1) return add<1, MORE>(s, c, to, count);
  if (n == 2) return add<2, MORE>(s, c, to, count);
  if (n == 3) return add<3, MORE>(s, c, to, count);
  add<IN_ONE, MORE>(s, c, to, count);
}

// to = the sum of n terms; `to` may be s[0], or any of IN_ONE
void sum(const float* const* s, const float* c, int n, float* to, int count) {
  if (n == 0) return void(std::fill(to, to + count, 0.0f));
  add<false>(s, c, std::min(n, IN_ONE), to, count);
  for (int k = IN_ONE; k < n; k += IN_ONE) add<true>(s + k, c + k, std::min(n - k, IN_ONE), to, count);
}

}  // namespace
