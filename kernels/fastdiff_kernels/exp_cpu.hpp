// The exponential and the normal distribution, in loops that a compiler turns into vector code.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

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

inline float exp_of(float x) {
  int32_t n;
  const float q = halves(x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x, n);
  const int32_t part = n >> 1;  // 2^n alone may be below the normal numbers
  return (1.0f + q) * power(part) * power(n - part);
}

// e^x - 1, to full precision near 0
inline float expm1_of(float x) {
  int32_t n;
  const float q = halves(x < -80.0f ? -80.0f : x > 1.0f ? 1.0f : x, n), s = power(n);
  return x > 1.0f ? exp_of(x) - 1.0f : s * q + (s - 1.0f);
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
  return z > 0 ? 1.0f - q : q;
}

}  // namespace
