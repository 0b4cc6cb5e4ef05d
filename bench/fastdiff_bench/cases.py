"""What is benchmarked: schedules with solvers, shapes, and the options under which other libraries compute the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

import fastdiff as fd
from fastdiff.names import make_schedule, pick, schedule_names, solver_names
from fastdiff.readout import BINNED, CATEGORICAL, ORDERS

__all__ = [
    "COLUMNS",
    "DTYPES",
    "FULL",
    "GPU_PEERS",
    "GRAPHS",
    "KERNELS",
    "PEERS",
    "QUICK",
    "SHAPES",
    "STEPS",
    "TEXT",
    "Case",
    "Refused",
    "default_cases",
    "dtype_of",
    "input_shape",
    "make_cases",
    "output_shape",
    "parse_shape",
]

STEPS = 50
MOST_ELEMENTS = 1 << 40
PEERS = ("torch", "torch.compile", "torch graph", "diffusers", "k-diffusion")
GPU_PEERS = ("torch graph",)
GRAPHS = ("step_graph", "loop_graph")
COLUMNS = (*PEERS, *(f"fastdiff {mode}" for mode in ("eager", "compiled", *GRAPHS)))
KERNELS = (
    "affine_step", "add_noise", "add_noise_flow", "posterior", "categorical_step", "unmask_step", "denoising_loss",
    "categorical_noise", "categorical_loss", "guide", "threshold", "gaussian_kl", "binned", "binned_mean",
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"policy": (1, 16, 7), "latent": (1, 4, 64, 64), "batch": (16, 4, 128, 128)}
CLASSES = 27
TEXT = (8, 64)  # tokens: (B, D), K = 27
DISCRETE = ("bfndiscrete", "masked")  # schedules of classes

# schedule -> solvers; the quick list is what most people run
QUICK: dict[str, tuple[str, ...]] = {
    "scaled_linear_betas": ("ddim", "ddpm", "dpmpp_2m", "unipc", "dpmpp_2m_sde"),
    "edm": ("euler", "heun"),
    "flow": ("euler",),
    "vp": ("euler_maruyama",),
    "bfndiscrete": ("bfn_discrete",),
}
FULL: dict[str, tuple[str, ...]] = {
    "scaled_linear_betas": (
        "ddim", "ddpm", "euler", "euler_ancestral", "heun", "dpm2", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc",
        "deis", "lms", "plms", "ipndm", "sa_solver", "lcm",
    ),
    "cosine_betas": ("ddpm", "ddim"),
    "vp": ("euler_maruyama", "probability_flow", "dpmpp_2m"),
    "subvp": ("euler_maruyama",),
    "ve": ("ancestral", "reverse_diffusion"),
    "cosine": ("ddim",),
    "edm": (
        "euler", "euler_ancestral", "heun", "dpm2", "dpmpp_2s_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde",
        "lms",
    ),
    "edm_network": ("euler", "dpmpp_2m"),
    "cosine_v": ("ipndm",),
    "flow": ("euler", "heun", "dpmpp_2m"),
    "bfncontinuous": ("bfn_continuous",),
    "bfndiscrete": ("bfn_discrete",),
    "masked": ("unmask",),
}  # fmt: skip
# what is not a schedule of that name on the command line
SCHEDULES = {
    "edm_network": "edm",  # the raw network: c_in, c_skip and c_out are the sampler's work
    "cosine_v": "cosine",
    "bfncontinuous": "bfncontinuous:sigma_1=0.02",
    "bfndiscrete": f"bfndiscrete:beta_1=3.0,num_classes={CLASSES}",
    "masked": f"masked:num_classes={CLASSES}",
}
PREDICTION = {"edm": "x0", "edm_network": "edm", "cosine_v": "v", "flow": "flow"}
# options of the plan that say what the stock samplers do, of `steps` where they depend on it
OPTIONS: dict[tuple[str, str], dict[str, Any] | Callable[[int], dict[str, Any]]] = {
    ("scaled_linear_betas", "ddpm"): {"clip": (-1.0, 1.0)},
    ("cosine_betas", "ddpm"): {"clip": (-1.0, 1.0)},
    ("scaled_linear_betas", "unipc"): {"order": 2},
    ("scaled_linear_betas", "deis"): {"order": 2, "final": "min"},
    ("scaled_linear_betas", "sa_solver"): {"few_steps": True, "final": "min"},
    ("cosine_v", "ipndm"): {"t_start": 0.98},  # at t = 1 stock multiplies the first prediction's x0 by 0
    ("flow", "dpmpp_2m"): lambda steps: {"t_start": 0.999, "t_end": 0.999 / steps},
    ("flow", "euler"): {"t_end": 1e-3},
    ("flow", "heun"): {"t_end": 1e-3},
    ("bfncontinuous", "bfn_discretised"): {"bins": 16},
}


class Case(NamedTuple):
    """A plan to time."""

    schedule: str  # as on the command line, "edm:sigma_max=20"
    solver: str
    steps: int = STEPS

    @property
    def kind(self) -> str:
        return self.schedule.partition(":")[0]

    def plan(self) -> fd.Plan:
        """The plan of `steps` intervals; ValueError where the solver refuses the schedule."""
        schedule = make_schedule(SCHEDULES.get(self.schedule, self.schedule))
        solve = getattr(fd.solvers, self.solver)
        prediction = {"prediction": PREDICTION[self.kind]} if self.kind in PREDICTION else {}
        found = OPTIONS.get((self.kind, self.solver), {})
        return solve(schedule, self.steps, **prediction, **(found(self.steps) if callable(found) else found))

    def state_shape(self, plan: fd.Plan, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the model's input for samples of a shape."""
        return input_shape(plan, shape)


def input_shape(plan: fd.Plan, shape: Sequence[int]) -> tuple[int, ...]:
    """Of samples of a shape what the model sees: of classes [B, D, K], of two classes [B, D, 1]."""
    if plan.readout in CATEGORICAL:
        return (*shape, 1 if plan.classes == 2 else plan.classes)
    return tuple(shape)


def output_shape(plan: fd.Plan, seen: Sequence[int]) -> tuple[int, ...]:
    """What a model that sees this must return: of tokens logits, of bins or a learned variance 2 C planes."""
    if plan.readout in ORDERS:
        return (*seen, plan.classes)
    if plan.readout in BINNED or plan.learned_variance:
        return (seen[0], 2 * seen[1], *seen[2:])
    return tuple(seen)


class Refused(NamedTuple):
    """A pair that does not exist, in the solver's words."""

    case: Case
    why: str


def default_cases(quick: bool, steps: int = STEPS) -> list[Case]:
    """The rows of the main table."""
    return [Case(schedule, solver, steps) for schedule, names in (QUICK if quick else FULL).items() for solver in names]


def make_cases(
    schedules: Sequence[str] | None, solvers: Sequence[str] | None, *, quick: bool, steps: int = STEPS
) -> Iterator[Case | Refused]:
    """What was asked for: the default rows, those of a schedule or a solver, or all pairs of both that exist.

    Yields: a Case, or Refused for a pair the solver refuses.
    Raises: ValueError: an unknown schedule or solver.
    """
    for text in schedules or ():
        make_schedule(SCHEDULES.get(text, text))
    for name in solvers or ():
        pick("solver", name, solver_names())
    known = FULL if schedules or solvers else QUICK if quick else FULL
    listed = {name for names in known.values() for name in names}
    if unlisted := [] if schedules else [name for name in solvers or () if name not in listed]:
        raise ValueError(f"{', '.join(unlisted)} is in no row by default: name --schedules too")
    for schedule in schedules or known:
        names = solvers or known.get(schedule.partition(":")[0]) or QUICK["scaled_linear_betas"]
        for solver in names:
            if not schedules and solvers and solver not in known[schedule]:
                continue
            case = Case(schedule, solver, steps)
            try:
                case.plan()
            except (TypeError, ValueError) as error:
                yield Refused(case, " ".join(str(error).split()))
                continue
            yield case


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of fp32, bf16 or fp16."""
    return DTYPES[pick("dtype", name, list(DTYPES))]


def parse_shape(text: str) -> tuple[int, ...]:
    """A shape from its name (policy, latent, batch) or from "16x4x128x128"."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        shape = tuple(int(n) for n in text.split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1 or math.prod(shape) >= MOST_ELEMENTS:
        raise ValueError(
            f"unknown shape {text!r}; valid: {', '.join(SHAPES)}, or sizes >= 1 such as 16x4x128x128, in all < 2^40"
        )
    return shape


def schedules_text() -> str:
    """The schedules there are, for help texts."""
    return ", ".join(schedule_names())
