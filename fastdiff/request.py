"""What a person asks a sampler for, checked before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.noise import NoiseFunction
from fastdiff.ops._categorical import channels
from fastdiff.ops.guide import RULES, check_rule
from fastdiff.ops.threshold import check_threshold
from fastdiff.parameters import parameter_of
from fastdiff.plan import Plan
from fastdiff.readout import BINNED, CLASSES, ORDERS

__all__ = ["CHECK_FINITE", "MODES", "Options", "Request", "resolve"]

MODES = ("auto", "eager", "compile", "step_graph", "loop_graph")
GUIDE_OPTIONS: dict[str, tuple[str, ...]] = {
    "cfg": (), "rescale": ("rescale",), "apg": ("eta", "norm_threshold"), "zero_star": (),
}  # fmt: skip
SOURCES = ("seed", "seeds", "generator")
CHECK_FINITE = ("off", "warn", "raise")
GRAPH_DEVICES = ("cuda",)
MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Callback = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class Options:
    """Everything fd.sample takes besides the model, the plan and the shape: see fd.sample."""

    seed: int | None = None  # 0 where seeds are not given either
    seeds: Sequence[int] | Tensor | None = None
    first: int = 0
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    noise: str | NoiseFunction = "philox"
    cond: Mapping[str, Any] | None = None
    uncond: Mapping[str, Any] | None = None
    guidance: float | Sequence[float] | np.ndarray | Tensor | None = None
    batched_guidance: bool = True
    guide: str = "cfg"
    guide_options: Mapping[str, Any] | None = None
    threshold: tuple[float, float] | None = None
    x_T: Tensor | None = None
    x_init: Tensor | None = None
    mode: str = "auto"
    callback: Callback | None = None
    trajectory: bool = False
    progress: bool = False
    check_finite: str = "off"
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None

    def but(self, **changes: Any) -> Options:  # noqa: ANN401 - any option
        """The same options with some changed; an unknown name lists the valid ones."""
        for name in changes:
            if name not in self.__dict__:
                raise TypeError(f"unknown option {name!r}; valid: {', '.join(self.__dict__)}")
        new = object.__new__(Options)  # frozen fields set one by one take longer than a row
        new.__dict__.update(self.__dict__, **changes)
        given = [name for name in SOURCES if changes.get(name) is not None]
        for name in SOURCES:  # a default gives way to another one that is given
            if given and name not in given:
                new.__dict__[name] = None
        if given and "seed" not in given and "first" not in changes:  # it goes with a seed
            new.__dict__["first"] = 0
        return new


class Request(NamedTuple):
    """Checked and resolved options."""

    options: Options
    shape: tuple[int, ...]
    state: tuple[int, ...]  # of one slot: shape, and for classes the K (K = 2: one) logits of each
    device: torch.device
    dtype: torch.dtype
    out_dtype: torch.dtype
    keys: Callable[[], tuple[Tensor, Tensor]]  # makes rng.keys on the device
    seeded: tuple[int, int] | None  # (seed, first) that the keys come from; None where each sample has its own seed
    generators: tuple[torch.Generator, ...]
    weight: Tensor | None  # [N or 1, B or 1] fp32 on the host, None without guidance


def _shape(shape: object) -> tuple[int, ...]:
    if isinstance(shape, tuple) and shape and all(type(n) is int and n >= 0 for n in shape):
        return tuple(shape)
    try:
        out = tuple(int(n) for n in shape)  # type: ignore[attr-defined]
        exact = all(n == m and not isinstance(m, bool) for n, m in zip(out, shape, strict=True))  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise TypeError(f"shape must be a sequence of integers (B, ...), got {shape!r}") from None
    if not out or not exact or any(n < 0 for n in out):
        raise ValueError(f"shape must be (B, ...) with integers >= 0, got {shape!r}")
    return out


def _one_of(name: str, value: object, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; valid: {', '.join(valid)}")


def _guide_options(guide: str, given: Mapping[str, Any] | None) -> None:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"guide_options must be a dict of the rule's options, got {type(given).__name__}")
    own = GUIDE_OPTIONS[guide]
    for name, value in (given or {}).items():
        if name not in own:
            raise ValueError(f"unknown option {name!r} of guide {guide!r}; valid: {', '.join(own) or 'none'}")
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"guide option {name!r} must be a number, got {value!r}")
    if given:
        check_rule(**given)


def _known_parts(model: object, o: Options) -> None:
    """What scales a whole sample would move what fd.inpaint knows of it."""
    scaling = [(n, v, v0) for n, v, v0 in (("guide", o.guide, "cfg"), ("threshold", o.threshold, None)) if v != v0]
    if scaling and isinstance(model, torch.nn.Module) and any(getattr(m, "keeps_known", 0) for m in model.modules()):
        name, value, plain = scaling[0]
        raise ValueError(f"fd.inpaint goes with {name}={plain!r}: {name}={value!r} scales what is known too")


def _threshold(value: Any) -> tuple[float, float]:  # noqa: ANN401 - a pair of numbers
    try:
        quantile, maximum = map(float, value)
    except (TypeError, ValueError):
        raise TypeError(f"threshold must be None or (quantile, maximum), got {value!r}") from None
    check_threshold(quantile, maximum)
    return quantile, maximum


def _default_device() -> torch.device:
    return torch.empty(0).device  # a quarter of torch.get_default_device's time


def _device(asked: object) -> torch.device:
    """A device that holds numbers, as its tensors name it."""
    try:
        device = torch.device(asked)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be a device of torch, got {asked!r}") from None
    if device.type == "meta":
        raise ValueError("device must be one that holds numbers, got 'meta'")
    if device.type == "cpu" or device.index is not None:
        return device
    try:
        if device.type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.empty(0, device=device).device
    except (AssertionError, ImportError, RuntimeError) as error:
        raise ValueError(f"device {str(device)!r} is none of this torch: {str(error).splitlines()[0]}") from None


def _state(name: str, value: object, shape: tuple[int, ...], device: torch.device) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name} must have the shape asked for, {shape}, got {tuple(value.shape)}")
    if value.device.type != device.type:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def _plain(o: Options, plan: Plan) -> None:
    """Readouts of classes and bins take plain guidance of the model's outputs and no threshold."""
    if o.guide != "cfg" or o.guide_options:
        raise ValueError(f"plan {plan.name!r} is guided on the model's outputs by guide='cfg' only, got {o.guide!r}")
    if o.threshold is not None:
        raise ValueError(f"plan {plan.name!r} predicts classes or bins, which have no threshold; got {o.threshold!r}")


def _categorical(o: Options, plan: Plan, shape: tuple[int, ...], device: torch.device) -> None:
    """What a plan of classes takes otherwise than a plan of numbers."""
    if len(shape) < 2:
        raise ValueError(f"shape must be (B, *D), the classes asked for, without an axis of K logits; got {shape}")
    _plain(o, plan)
    if o.out_dtype not in (None, torch.int64):
        raise TypeError(f"plan {plan.name!r} gives classes, int64; got out_dtype={o.out_dtype}")
    _classes("x_init", o.x_init, plan.classes - 1, shape, device)
    if plan.readout in ORDERS:
        _classes("x_T", o.x_T, plan.classes - 1, shape, device, mask=plan.mask)
        if o.noise != "philox":
            raise ValueError(f"plan {plan.name!r} draws noise='philox' only, got noise={o.noise!r}")


def _classes(
    name: str, x: object, largest: int, shape: tuple[int, ...], device: torch.device, mask: int | None = None
) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor) or x.dtype != torch.int64:
        raise TypeError(f"{name} must be classes, an int64 Tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.shape != shape:
        raise ValueError(f"{name} must have the shape asked for, {shape}, got {tuple(x.shape)}")
    if x.device.type != device.type:
        raise ValueError(f"{name} must be on {device}, got {x.device}")
    x = x if mask is None else x[x != mask]
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) <= largest:
        besides = "" if mask is None else f", or the mask, {mask}"
        raise ValueError(f"{name} must be in 0..{largest}{besides}, got {int(x.min())}..{int(x.max())}")


def _guidance(o: Options, plan: Plan, batch: int) -> Tensor | None:
    value = plan.guidance[:, None] if o.guidance is None and plan.guidance is not None else o.guidance
    if o.uncond is None:
        if o.guidance is None and plan.guidance is not None and np.any(plan.guidance != 1):
            raise ValueError(
                f"plan {plan.name!r} has a column of guidance weights: give uncond, or guidance=1 for no guidance"
            )
        if o.guidance is not None and not ((w := _numbers(o.guidance)).ndim == 0 and w == 1):
            raise ValueError("guidance needs uncond, the model's arguments without the condition; got uncond=None")
        return None
    if value is None:
        raise ValueError("uncond was given without guidance; give guidance=w (1 is none)")
    w = _numbers(value)
    with np.errstate(over="ignore"):
        if not np.all(np.isfinite(w.astype(np.float32))):
            raise ValueError(f"guidance must be finite in float32, got {value!r}")
    if w.ndim == 0:
        return None if w == 1 else torch.full((1, 1), float(w), dtype=torch.float32, device="cpu")
    if w.ndim == 1 and w.shape == (batch,):
        return torch.from_numpy(w.astype(np.float32))[None]
    if w.ndim == 2 and w.shape in ((plan.nfe, 1), (plan.nfe, batch)):
        return torch.from_numpy(w.astype(np.float32))
    raise ValueError(
        f"guidance must be a number, ({batch},) per sample, ({plan.nfe}, 1) or ({plan.nfe}, {batch}) per row; "
        f"got shape {w.shape}"
    )


def _numbers(value: Any) -> np.ndarray:  # noqa: ANN401 - number, sequence, array or tensor
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    try:
        w = np.asarray(value)
        real = w.dtype.kind in "iuf"
    except ValueError:  # rows of different lengths
        real = False
    if not real:
        raise TypeError(f"guidance must be a number, or numbers a sample or a row, got {value!r}")
    return w


def _generators(o: Options, batch: int, device: torch.device) -> tuple[torch.Generator, ...]:
    if o.noise != "torch":
        if o.generator is not None:
            raise ValueError(f"generator is used with noise='torch' only, got noise={o.noise!r}")
        return ()
    if o.first != 0:
        raise ValueError(
            f"first goes with noise='philox': a generator's stream starts at its seed; got first={o.first}"
        )
    if o.generator is not None and not (o.seed is None and o.seeds is None):
        raise ValueError("give either a generator or seed and seeds, got both")
    if o.generator is None:
        seeds = [o.seed or 0] if o.seeds is None else [int(s) for s in o.seeds]
        given: list[Any] = [torch.Generator(device).manual_seed(s) for s in seeds]
    else:
        given = list(o.generator) if isinstance(o.generator, Sequence) else [o.generator]
    if not all(isinstance(g, torch.Generator) for g in given):
        raise TypeError(f"generator must be a torch.Generator or a list of them, got {o.generator!r}")
    if len(given) not in (1, batch):
        raise ValueError(f"generator must be one torch.Generator or {batch} (one a sample), got {len(given)}")
    return tuple(given)


def check_pair(model: object, plan: object) -> None:
    """Raises: TypeError for a model that cannot be called, and for a plan that is none."""
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t, **cond), got {type(model).__name__}")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a fastdiff.Plan (from fastdiff.solvers), got {type(plan).__name__}")


def resolve(model: object, plan: object, shape: object, options: Options) -> Request:
    """Checks a request and fills in what was left open.

    Raises: TypeError / ValueError that say what came and what is allowed; nothing has been computed by then.
    """
    o = options
    check_pair(model, plan)
    assert isinstance(plan, Plan)
    size = _shape(shape)
    batch, parameter = size[0], parameter_of(model)
    _one_of("mode", o.mode, MODES)
    _one_of("check_finite", o.check_finite, CHECK_FINITE)
    if not isinstance(o.batched_guidance, bool):
        raise TypeError(f"batched_guidance must be True or False, got {o.batched_guidance!r}")
    _one_of("guide", o.guide, RULES)
    if (o.guide != "cfg" or o.guide_options) and o.uncond is None:
        raise ValueError(f"guide={o.guide!r} needs uncond and guidance, got uncond=None")
    _guide_options(o.guide, o.guide_options)
    if o.threshold is not None:
        o = o.but(threshold=_threshold(o.threshold))
    _known_parts(model, o)
    if not callable(o.noise):
        _one_of("noise", o.noise, ("philox", "torch"))
    sources: list[Any] = [o.x_T, o.x_init, parameter]
    found = next((v.device for v in sources if isinstance(v, Tensor)), None) or _default_device()
    device = _device(found if o.device is None else o.device)
    given = parameter is not None and parameter.dtype.is_floating_point
    dtype = o.dtype or (parameter.dtype if given else torch.float32)  # type: ignore[union-attr]
    if plan.readout in ORDERS:
        dtype = torch.float32  # nothing is cast: the model sees ids
    out_dtype = o.out_dtype or (torch.int64 if plan.readout in CLASSES else torch.float32)
    if dtype not in MODEL_DTYPES:
        of = "" if o.dtype else " of its parameters: model.float(), or dtype= and a model that casts"
        raise TypeError(f"dtype, the model's input type, must be one of {MODEL_DTYPES}, got {dtype}{of}")
    if plan.readout not in CLASSES and not getattr(out_dtype, "is_floating_point", False):
        raise TypeError(f"out_dtype must be a floating point dtype, got {out_dtype}")
    if o.mode in ("step_graph", "loop_graph") and device.type not in GRAPH_DEVICES:
        raise ValueError(
            f"mode {o.mode!r} needs a CUDA device, this run is on {device}; use 'auto', 'eager' or 'compile'"
        )
    if o.mode == "loop_graph":
        for name in ("callback", "trajectory"):
            if getattr(o, name):
                raise ValueError(f"{name} cannot run inside mode 'loop_graph'; use 'step_graph' or 'eager'")
        if o.noise != "philox":
            raise ValueError(
                "mode 'loop_graph' draws its noise in the kernels: noise must be 'philox'; or use 'step_graph'"
            )
    if o.callback is not None and not callable(o.callback):
        raise TypeError(f"callback must be callable as callback(row, t, x, x0), got {type(o.callback).__name__}")
    if o.x_T is not None and o.x_init is not None:
        raise ValueError("give x_T (the state itself) or x_init (clean data to be noised), not both")
    state = size
    if plan.readout in CLASSES:
        state = size if plan.readout in ORDERS else (*size, channels(plan.classes))
        _categorical(o, plan, size, device)
    else:
        if plan.readout in BINNED:
            _plain(o, plan)
            if len(size) < 2:
                raise ValueError(f"shape must be (B, C, *): the model returns 2 C channels; got {size}")
        _state("x_init", o.x_init, size, device)
    if plan.readout not in ORDERS:
        _state("x_T", o.x_T, state, device)
    if o.x_init is not None and not np.isfinite(plan.alpha[0]):
        raise ValueError(f"plan {plan.name!r} does not record its alpha, so x_init cannot be noised; give x_T")
    if o.x_init is not None and plan.alpha[0] == 0:
        raise ValueError(f"x_init is lost where plan {plan.name!r} starts, knowing nothing; build it with start=k")
    if o.x_T is None and o.x_init is None and plan.init_scale == plan.init_noise == 0 and plan.alpha[0] != 0:
        what = "with some tokens known" if plan.readout in ORDERS else "from data, not from noise"
        raise ValueError(f"plan {plan.name!r} starts {what}: give x_init, or x_T, the state itself")
    for name in ("cond", "uncond"):
        value = getattr(o, name)
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dict of keyword arguments for the model, got {type(value).__name__}")
    keys, seeded = _keys(o, batch, device)
    weight = _guidance(o, plan, batch)
    if weight is not None:
        check_second(o.cond, o.uncond)
    return Request(o, size, state, device, dtype, out_dtype, keys, seeded, _generators(o, batch, device), weight)


def check_second(cond: Mapping[str, Any] | None, uncond: Mapping[str, Any] | None) -> None:
    """Refuses an uncond that leaves cond as it is: what it does not name is taken from there."""
    if cond and all(name in cond and value is cond[name] for name, value in (uncond or {}).items()):
        raise ValueError(
            f"uncond changes nothing in cond ({', '.join(cond)}), so guidance would do nothing: name what the model "
            "is given without the condition, None too"
        )


def _keys(
    o: Options, batch: int, device: torch.device
) -> tuple[Callable[[], tuple[Tensor, Tensor]], tuple[int, int] | None]:
    if o.seeds is not None:
        if o.seed is not None:
            raise ValueError("give either seed or seeds, got both")
        made = rng.keys(seeds=o.seeds, first=o.first, batch=batch, device=device)
        return lambda: made, None
    seed = rng.checked_seed(0 if o.seed is None else o.seed, o.first, batch)
    return partial(rng.keys, seed, first=o.first, batch=batch, device=device), (seed, o.first)
