"""Coefficients of a continuous schedule at given times: closed forms in float64, one launch for torch's twenty.

Literals are exact in float32 (Triton holds them so); every other constant is a float64 parameter.
"""

import triton
import triton.language as tl


@triton.jit
def one_minus_exp(B):
    """1 - e^-B for B >= 0, without cancellation (Kahan: the error of e^-B leaves through its own logarithm)."""
    u = tl.exp(-B)
    near = (1.0 - u) * B / tl.where(u == 1.0, 1.0, -tl.log(u))
    return tl.where(u == 1.0, B, tl.where(u < 0.5, 1.0 - u, near))


@triton.jit
def alpha_sigma(t, p, KIND: tl.constexpr):
    """alpha, sigma [BLOCK] float64 of schedule KIND (fastdiff.ops._levels.KINDS), whose parameters are at p."""
    p0 = tl.load(p)
    if KIND == "VP" or KIND == "SubVP":
        B = t * (p0 + tl.load(p + 1) * t)
        rest = one_minus_exp(B)
        return tl.exp(-0.5 * B), tl.sqrt(rest) if KIND == "VP" else rest
    elif KIND == "VE":
        return t * 0.0 + 1.0, p0 * tl.exp(t * tl.load(p + 1))
    elif KIND == "Flow":
        by = 1.0 + (p0 - 1.0) * t
        return (1.0 - t) / by, p0 * t / by
    elif KIND == "EDM":
        base = p0 + t * tl.load(p + 1)
        return t * 0.0 + 1.0, tl.exp(tl.load(p + 2) * tl.log(base))
    elif KIND == "Cosine":
        first, scale = tl.load(p + 3), tl.load(p + 4)
        theta = (t + p0) / tl.load(p + 1) * tl.load(p + 2)
        sigma = tl.sqrt(tl.sin(theta - first) * tl.sin(theta + first)) / scale
        return tl.where(t == 1.0, 0.0, tl.cos(theta) / scale), sigma
    elif KIND == "BFNContinuous":
        B = p0 * (1.0 - t)
        gamma = one_minus_exp(B)
        return gamma, tl.sqrt(gamma * tl.exp(-B))
    else:  # BFNDiscrete
        sigma = tl.load(p + 1) * (1.0 - t)
        return p0 * ((1.0 - t) * (1.0 - t)), sigma


@triton.jit
def target_pair(alpha, sigma, TARGET: tl.constexpr):
    """A target's coefficients of x0 and eps, as fastdiff.ops.add_noise.TARGETS has them."""
    zero, one = alpha * 0.0, sigma * 0.0 + 1.0
    if TARGET == "eps":
        return zero, one
    elif TARGET == "x0":
        return one, zero
    elif TARGET == "score":
        return zero, -1.0 / sigma
    elif TARGET == "flow":
        return zero - 1.0, one
    else:  # v
        h = tl.sqrt(alpha * alpha + sigma * sigma)
        return tl.where(h == 0.0, -1.0, -sigma / h), tl.where(h == 0.0, 0.0, alpha / h)


@triton.jit(do_not_specialize=["count"])
def levels_kernel(
    t_ptr,  # [count], any float dtype
    p_ptr,  # the schedule's parameters, float64
    out_ptr,  # [count, 4] fp32
    count,
    KIND: tl.constexpr,
    GIVES: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
    MATH: tl.constexpr,
):
    """Rows of four numbers; NaN where a time is not in [0, 1].

    GIVES "noise": alpha, sigma, the target's pair (without a target: alpha, sigma again); "loss": the target's pair, 1,
    0; "classes": alpha, sigma twice, of one channel for two classes sqrt(2) sigma.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    t = tl.load(t_ptr + at, mask=inside, other=0.0).to(tl.float64)
    valid = (t >= 0.0) & (t <= 1.0)
    alpha, sigma = alpha_sigma(tl.where(valid, t, 0.5), p_ptr, KIND)
    alpha, sigma = tl.where(valid, alpha, float("nan")), tl.where(valid, sigma, float("nan"))
    if GIVES == "classes":
        sigma *= tl.load(p_ptr + 2)
    c0, c1, c2, c3 = alpha, sigma, alpha, sigma
    if TARGET is not None:
        c2, c3 = target_pair(alpha, sigma, TARGET)
    if GIVES == "loss":
        c0, c1, c2, c3 = c2, c3, alpha * 0.0 + 1.0, alpha * 0.0
    out_ptr += at * 4
    tl.store(out_ptr, c0.to(tl.float32), mask=inside)
    tl.store(out_ptr + 1, c1.to(tl.float32), mask=inside)
    tl.store(out_ptr + 2, c2.to(tl.float32), mask=inside)
    tl.store(out_ptr + 3, c3.to(tl.float32), mask=inside)
