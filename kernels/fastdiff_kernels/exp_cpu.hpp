// The exponential and the normal distribution, in loops that a compiler turns into vector code.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// a where it is true, else b: by bits, because a compiler follows a constant a into a branch, which is no vector code
// where a machine has no masks
inline float pick(bool first, float a, float b) {
  uint32_t x, y, mask = -uint32_t(first);
  std::memcpy(&x, &a, 4);
  std::memcpy(&y, &b, 4);
  x = (x & mask) | (y & ~mask);
  std::memcpy(&a, &x, 4);
  return a;
}

// a NaN passes
inline float clamp(float x, float lo, float hi) { return pick(x > hi, hi, pick(x < lo, lo, x)); }

// e^x - 1 = 2^n (1 + q) - 1 for x in [-104, 89]; a NaN passes
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

// TAME: x is within 80 of 0, where the same bits need no clamps and one power of 2
template <bool TAME = false>
inline float exp_of(float x) {
  int32_t n;
  if (TAME) {
    const float q = halves(x, n);
    return (1.0f + q) * power(n);
  }
  const float q = halves(clamp(x, -104.0f, 89.0f), n);
  const int32_t part = n >> 1;  // 2^n alone may be below the normal numbers
  return (1.0f + q) * power(part) * power(n - part);
}

// e^x - 1, to full precision near 0; in halves, because 2^128 is beyond fp32 where e^x is not
template <bool TAME = false>
inline float expm1_of(float x) {
  int32_t n;
  const float q = halves(TAME ? x : clamp(x, -80.0f, 89.0f), n), half = power(n - 1);
  return (half * q + (half - 0.5f)) * 2.0f;
}

// the standard normal's Phi(-t) of t >= 0, within 2e-7; e = exp(-t^2 / 2)
inline float tail(float t, float e) {
  const float u = 1.0f / (1.0f + 0.25f * t);
  float y = -8.644611937e-2f;
  y = y * u + 3.154317116e-1f;
  y = y * u - 2.1187538e-1f;
  y = y * u + 2.195970314e-1f;
  y = y * u + 6.326677966e-2f;
  y = y * u + 9.94635445e-2f;
  y = y * u + 1.005624303e-1f;
  return y * u * e;
}

inline float normal_cdf(float z) {
  const float q = tail(std::fabs(z), exp_of(-0.5f * z * z));
  return pick(z > 0, 1.0f - q, q);
}

}  // namespace
