// Coefficients of a continuous schedule at given times, in float64: levels.py's on a CPU.

#include <cmath>
#include <cstdint>
#include <limits>

namespace {

// in the order of fastdiff.ops._levels.KINDS, TARGETS (of fastdiff.ops.add_noise) and GIVES
enum Schedule { VP, SUB_VP, VE, FLOW, EDM, COSINE, BFN_CONTINUOUS, BFN_DISCRETE };
enum Target { TO_EPS, TO_V, TO_X0, TO_SCORE, TO_FLOW };
enum Gives { GIVES_NOISE, GIVES_LOSS, GIVES_CLASSES };

struct Pair {
  double x0, eps;
};

// alpha, sigma at t in [0, 1]; p: the schedule's parameters
inline Pair level(int64_t schedule, double t, const double* p) {
  switch (schedule) {
    case VP:
    case SUB_VP: {
      const double B = t * (p[0] + p[1] * t), rest = -std::expm1(-B);
      return {std::exp(-0.5 * B), schedule == VP ? std::sqrt(rest) : rest};
    }
    case VE:
      return {1.0, p[0] * std::exp(t * p[1])};
    case FLOW: {
      const double by = 1.0 + (p[0] - 1.0) * t;
      return {(1.0 - t) / by, p[0] * t / by};
    }
    case EDM:
      return {1.0, std::pow(p[0] + t * p[1], p[2])};
    case COSINE: {
      if (t == 1.0) return {0.0, 1.0};
      const double theta = (t + p[0]) / p[1] * p[2];
      return {std::cos(theta) / p[4], std::sqrt(std::sin(theta - p[3]) * std::sin(theta + p[3])) / p[4]};
    }
    case BFN_CONTINUOUS: {
      const double B = p[0] * (1.0 - t), gamma = -std::expm1(-B);
      return {gamma, std::sqrt(gamma * std::exp(-B))};
    }
    default:
      return {p[0] * ((1.0 - t) * (1.0 - t)), p[1] * (1.0 - t)};
  }
}

// a target's coefficients of x0 and eps
inline Pair of_target(int64_t target, Pair v) {
  switch (target) {
    case TO_EPS:
      return {0.0, 1.0};
    case TO_X0:
      return {1.0, 0.0};
    case TO_SCORE:
      return {0.0, -1.0 / v.eps};
    case TO_FLOW:
      return {-1.0, 1.0};
    default: {
      const double h = std::hypot(v.x0, v.eps);
      return h == 0 ? Pair{-1.0, 0.0} : Pair{-v.eps / h, v.x0 / h};
    }
  }
}

}  // namespace

// out [count, 4], as levels.py's kernel; target -1: none
extern "C" void levels(const double* t, const double* p, float* out, int64_t schedule, int64_t gives, int64_t target,
                       int64_t count) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (int64_t b = 0; b < count; b++, out += 4) {
    if (!(t[b] >= 0 && t[b] <= 1)) {
      out[0] = out[1] = out[2] = out[3] = nan;
      continue;
    }
    Pair v = level(schedule, t[b], p);
    if (gives == GIVES_CLASSES) v.eps *= p[2];
    const Pair goal = target < 0 ? v : of_target(target, v), first = gives == GIVES_LOSS ? goal : v;
    out[0] = float(first.x0), out[1] = float(first.eps);
    out[2] = gives == GIVES_LOSS ? 1.0f : float(goal.x0), out[3] = gives == GIVES_LOSS ? 0.0f : float(goal.eps);
  }
}
