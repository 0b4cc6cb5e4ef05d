"""The probability-flow ODE as a function for other people's integrators, and the likelihood computed with it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.devices import has_float64, widest
from fastdiff.grid import points
from fastdiff.parameters import seen_by
from fastdiff.prediction import Prediction
from fastdiff.schedules import Betas, BFNDiscrete, Flow, Schedule
from fastdiff.schedules.base import positive

__all__ = ["drift", "log_likelihood"]

TRACES = ("hutchinson", "exact")
T_END = 1e-5
T_START = 1e-8  # before the start of a Bayesian flow: how far N(0, sigma^2) is off grows with the root of it
STREAM = 4  # of Hutchinson's probes


def drift(
    model: Callable[..., Any],
    schedule: Schedule,
    prediction: Prediction = "eps",
    *,
    cond: Mapping[str, Any] | None = None,
    sign: int = 1,
    sigma_data: float | None = None,
) -> Callable[[float | Tensor, Tensor], Tensor]:
    """The right-hand side of the probability-flow ODE, for torchdiffeq, scipy and other adaptive integrators.

        dx/dt = f(t) x - g(t)^2 score / 2 = A(t) x + d(t) m,   score = -eps / sigma

    A and d are computed in float64 on the host; on Flow dx/dt = sigma'(t) (eps - x0), finite at t = 1 too.
    Args: model(x, t, **cond), t [B] the schedule's model_time; schedule; prediction, sign, sigma_data: see GridOptions.
    A module sees x in the dtype of its parameters.
    Returns: f(t, x): t a number or a tensor of one element (read on the host), x [B, *] -> dx/dt in x's dtype.
        Differentiable in x. torchdiffeq steps past its last time unless options={"step_t": last} says otherwise.
    Raises: ValueError where f or g is infinite, t lies outside the schedule, or the model returns another shape than
        x's; TypeError for a model that is none, or another schedule.
    Source: Song et al. 2021, arXiv:2011.13456, eq. 13.
    """
    _check(model, schedule)
    arguments = dict(cond or {})

    def velocity(t: float | Tensor, x: Tensor) -> Tensor:
        time = np.array([float(t)])
        at = points(schedule, time, prediction=prediction, sign=sign, sigma_data=sigma_data)
        c = at.convert
        if isinstance(schedule, Flow):
            speed = schedule.shift / (1 + (schedule.shift - 1) * time) ** 2
            A, d = speed * (c.e_skip - c.c_skip), speed * (c.e_out - c.c_out)
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                pull = 0.5 * schedule.diffusion2(time) / at.sigma
                A, d = schedule.drift(time) + pull * c.e_skip, pull * c.e_out
        if not (np.isfinite(A[0]) and np.isfinite(d[0])):
            raise ValueError(
                f"the drift of {schedule} with prediction {prediction!r} is not finite at t = {time[0]:g}: begin and "
                "end inside (log_likelihood: t_start=, t_end=)"
            )
        whole = at.times.dtype.kind == "i"
        dtype = torch.int64 if whole else torch.float64 if x.dtype == torch.float64 else torch.float32
        seen = torch.full((len(x),), at.times[0].item(), dtype=dtype, device=x.device)
        shown = float(c.c_in[0]) * x if c.c_in[0] != 1 else x
        m = model(seen_by(model, shown), seen, **arguments)
        if not isinstance(m, Tensor) or m.shape != x.shape:
            got = tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__
            raise ValueError(f"the model must return the shape of its input, {tuple(x.shape)}, got {got}")
        return torch.add(float(A[0]) * x, m.to(x.dtype), alpha=float(d[0]))

    return velocity


def _check(model: object, schedule: object) -> None:
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t, **cond), got {type(model).__name__}")
    if not isinstance(schedule, Schedule):
        raise TypeError(f"the probability flow needs a fastdiff.schedules.Schedule, got {type(schedule).__name__}")
    if isinstance(schedule, BFNDiscrete):
        raise ValueError("the probability flow is of numbers, BFNDiscrete is a flow of classes")


def _span(
    schedule: Schedule, prediction: Prediction, t_end: float | None, t_start: float | None
) -> tuple[float, float]:
    """From where to where: a default is moved inside where there is no noise, so that ln(sigma) is finite."""
    low = 0.0 if t_end is None else float(t_end)
    top = schedule.t_start(prediction) if t_start is None else float(t_start)
    if not 0 <= low < top <= schedule.t_max:
        raise ValueError(
            f"t_end must be < t_start, both in [0, {schedule.t_max:g}], got t_start={top:g}, t_end={low:g}"
        )
    if t_end is None and float(schedule.sigma(0.0)) == 0:
        low = T_END * schedule.t_max
    if t_start is None and float(schedule.sigma(top)) == 0:
        top *= 1 - T_START
    if float(schedule.alpha(top)) == 0 and not isinstance(schedule, Flow):  # whose field is finite there
        if t_start is not None:
            raise ValueError(f"there is no signal at t_start={top:g} of {schedule}, where the drift is infinite")
        top = top - 1 if isinstance(schedule, Betas) else schedule.t_start("eps")
    return low, top


def _followed(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The model, refused where autograd does not see that its output depends on x: its divergence would be lost."""

    looked = False

    def followed(x: Tensor, t: Tensor, **cond: Any) -> Tensor:  # noqa: ANN401 - the model's own
        nonlocal looked
        m = model(seen_by(model, x), t, **cond)
        lost = isinstance(m, Tensor) and not m.requires_grad
        if isinstance(m, Tensor) and not lost and not looked:  # its parameters may be what asks for a gradient
            lost = torch.autograd.grad(m.sum(), x, retain_graph=True, allow_unused=True)[0] is None
        looked = True
        if lost:
            raise ValueError(
                "the model's output does not depend on x through autograd (no_grad, inference_mode or detach in it?): "
                "its divergence cannot be taken"
            )
        return m

    return followed


def log_likelihood(
    model: Callable[..., Any],
    schedule: Schedule,
    x0: Tensor,
    prediction: Prediction = "eps",
    *,
    trace: str = "hutchinson",
    t_end: float | None = None,
    t_start: float | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    seed: int | None = None,
    seeds: Sequence[int] | Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    cond: Mapping[str, Any] | None = None,
    sign: int = 1,
    sigma_data: float | None = None,
) -> Tensor:
    """log p(x0) of the model, by the change of variables along the probability flow.

        ln p(x(t_end)) = ln p(x(t_start)) + int_{t_end}^{t_start} div v dt,   dx/dt = v(t, x): drift

    Args:
        x0: [B, *] float32 or float64, taken as the state at t_end. trace: of the Jacobian, "hutchinson" (one Rademacher
        probe a sample, of Philox; unbiased) or "exact" (one backward pass an element). t_end: default 0 where the
        schedule has noise there, else 1e-5 t_max. t_start: default the schedule's or, where there is no signal, before
        that: 0.9946 of Cosine, the last index but one of a chain, 1 - 1e-8 of a Bayesian flow. prior: x [B, *] -> ln p
        [B] at t_start, default N(0, sigma^2 I). seed (default 0), seeds: of the probes. rtol, atol: of the integrator
        (Runge-Kutta 4(5) of scipy, else torchdiffeq) and of every sample, whatever the batch: they are divided by
        sqrt(B), as its norm is that of all. A chain is integrated over ln(sigma / alpha): its field over t jumps at
        every index. The rest: see drift.
    Returns: [B] float64 (fp32 on a device without float64), in nats; no gradient.
    Raises: ImportError without scipy and torchdiffeq; ValueError for bad options, or a model autograd does not follow;
        RuntimeError if integration fails.
    Source: Song et al. 2021, arXiv:2011.13456, eq. 39; trace: Grathwohl et al. 2019, arXiv:1810.01367.
    """
    _check(model, schedule)
    if trace not in TRACES:
        raise ValueError(f"unknown trace {trace!r}; valid: {', '.join(TRACES)}")
    if not isinstance(x0, Tensor) or x0.dtype not in (torch.float32, torch.float64) or x0.ndim < 2:
        raise TypeError("x0 must be a float32 or float64 tensor [B, *]")
    if x0.is_cpu and not bool(x0.isfinite().all()):
        raise ValueError("x0 must be finite")
    low, top = _span(schedule, prediction, t_end, t_start)
    positive(rtol=rtol, atol=atol)
    batch, n = x0.shape[0], x0.shape[1:].numel()
    solve = _integrator(rtol / max(1, batch) ** 0.5, atol / max(1, batch) ** 0.5)
    if batch == 0:
        return torch.zeros(0, dtype=widest(x0.device), device=x0.device)
    keys, index = rng.keys(0 if seed is None and seeds is None else seed, seeds, batch=batch, device=x0.device)
    with torch.inference_mode(False):  # autograd does not follow what inference mode has made
        given = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in (cond or {}).items()}
        probe = rng.normal(keys, x0.shape[1:], stream=STREAM, index=index).sign().to(x0.dtype)
    field = drift(_followed(model), schedule, prediction, cond=given, sign=sign, sigma_data=sigma_data)

    home, wide = x0.device if has_float64(x0.device) else torch.device("cpu"), widest(x0.device)

    def augmented(s: float, state: Tensor) -> Tensor:
        t, rate = _place(schedule, s, low, top)
        with torch.inference_mode(False), torch.enable_grad():
            x = state.detach()[:, :n].reshape(x0.shape).to(x0.dtype, copy=True).to(x0.device).requires_grad_()
            v = field(t, x) / rate
            if trace == "exact":
                rows = [torch.autograd.grad(v.flatten(1)[:, i].sum(), x, retain_graph=True)[0] for i in range(n)]
                divergence = sum(r.flatten(1)[:, i] for i, r in enumerate(rows))
            else:
                divergence = (torch.autograd.grad((v * probe).sum(), x)[0] * probe).flatten(1).sum(1)
        return torch.cat([v.detach().flatten(1).to(home), divergence[:, None].to(home)], dim=1).double()  # type: ignore[index]

    start = torch.nn.functional.pad(x0.detach().flatten(1).to(home).double(), (0, 1))
    end = solve(augmented, *(_variable(schedule, t) for t in (low, top)), start)
    x, change = end[:, :n], end[:, n]
    if prior is not None:
        at_start = prior(x.reshape(x0.shape).to(wide).to(x0.device))
        if not isinstance(at_start, Tensor) or at_start.shape != (batch,):
            got = tuple(at_start.shape) if isinstance(at_start, Tensor) else type(at_start).__name__
            raise ValueError(f"prior must return a number a sample, shape ({batch},), got {got}")
        return at_start.to(wide) + change.to(wide).to(x0.device)
    variance = float(schedule.sigma(top)) ** 2
    nats = -0.5 * (x**2).sum(1) / variance - 0.5 * n * math.log(2 * math.pi * variance) + change
    return nats.to(wide).to(x0.device)


def _variable(schedule: Schedule, t: float) -> float:
    """What the integral goes over: t, or ln(sigma / alpha) of a chain, in which its field has no jumps."""
    return -0.5 * float(schedule.logsnr(t)) if isinstance(schedule, Betas) else t


def _place(schedule: Schedule, s: float, low: float, top: float) -> tuple[float, float]:
    """t at s = `_variable`, and ds/dt there: g^2 / (2 sigma^2) of a chain."""
    if not isinstance(schedule, Betas):
        return s, 1.0
    t = min(max(float(schedule.t_of(np.array(-2.0 * s))), low), top)
    return t, 0.5 * float(schedule.diffusion2(t)) / float(schedule.sigma(t)) ** 2


def _integrator(rtol: float, atol: float) -> Callable[..., Tensor]:
    """solve(f, t0, t1, y0) -> y(t1), by scipy if it is installed, else by torchdiffeq."""
    try:
        solve_ivp = importlib.import_module("scipy.integrate").solve_ivp
    except ImportError:
        try:
            odeint = importlib.import_module("torchdiffeq").odeint
        except ImportError:
            raise ImportError(
                "log_likelihood integrates with scipy or torchdiffeq and finds neither: pip install scipy"
            ) from None

        def by_torchdiffeq(f: Callable[..., Tensor], t0: float, t1: float, y0: Tensor) -> Tensor:
            times = torch.tensor([t0, t1], dtype=torch.float64, device=y0.device)
            stop = {"step_t": times[-1:]}  # no step beyond the schedule's times
            end: Tensor = odeint(f, y0, times, rtol=rtol, atol=atol, method="dopri5", options=stop)[-1]
            return end

        return by_torchdiffeq

    def by_scipy(f: Callable[..., Tensor], t0: float, t1: float, y0: Tensor) -> Tensor:
        def flat(t: float, y: np.ndarray) -> np.ndarray:
            out: np.ndarray = f(t, torch.from_numpy(y).to(y0.device).view_as(y0)).flatten().cpu().numpy()
            return out

        done = solve_ivp(flat, (t0, t1), y0.flatten().cpu().numpy(), rtol=rtol, atol=atol)
        if not done.success:
            raise RuntimeError(f"the integration stopped at t = {done.t[-1]:g}: {done.message}")
        return torch.from_numpy(done.y[:, -1].copy()).to(y0.device).view_as(y0)

    return by_scipy
