"""Plan: a sampler as a frozen, validated table with one row per model evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from fastdiff.allocate import Allocation, allocate, liveness
from fastdiff.grid import Points
from fastdiff.lasting import lasting
from fastdiff.prediction import factored
from fastdiff.readout import BINNED, CATEGORICAL, CLASSES, ORDERS, check_readout, sentence

__all__ = ["MAX_SLOTS", "ROW_HEADER", "Plan", "row_width", "stays_small"]

ROW_HEADER = 8  # c_skip, c_ratio, lo, hi, c_in of the next row, has_noise, log_var_lo, log_var_hi
MAX_SLOTS = 6
END_TOLERANCE = 1e-9
LEARNED = ("log_var_lo", "log_var_hi")


def stays_small(own: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Is x, added to a coefficient of its own, still taken at most twice, or twice as often as before?"""
    return np.abs(own + x) <= 2 * np.maximum(np.abs(own), 1.0)


def row_width(slots: int) -> int:
    """Floats of a packed row with r slots: header, A [r, r], b, d, s, read, write [r], padded to 16 bytes."""
    return -(-(ROW_HEADER + slots * slots + 5 * slots) // 4) * 4


@dataclass(frozen=True, eq=False)
class Plan:
    """A sampler as a table: row i is one model evaluation and one affine update of r state slots.

        p  = clamp(c_skip S[0] + c_out m, lo, hi)                 m: the model's output (after guidance)
        S' = A @ S + b p + d m + s n                              n: standard normal noise
        S[0] at the start = init_scale n(stream 0, row 0) + init_noise n(stream 0, row 1); other slots are absent

    The model of row i sees c_in[i] * S[0] at times[i].
    Args (N rows, r slots, float64 on the host):
        name: for people. times: [N] int64 or float64, what the model receives as t. t: [N] schedule time.
        alpha, sigma: [N] noise level of the state at row i. c_in, c_skip, c_out, lo, hi: [N].
        A: [N, r, r]; b, d, s: [N, r]. draws: [N] int64, normal tensors the replaced sampler draws in this row
        (default 1 where s != 0; it is at least that). init_scale, init_noise: scale of the start. end: (alpha, sigma)
        after the last row.
        guidance: None or [N], the weight w of a row, used where sampling gives none.
        readout: how p comes from the model's output, affine as above or fastdiff.readout.READOUTS: p of K classes or
        bins; of tokens A, b, d, s, c_skip, c_out, hi mean what fastdiff.ops.unmask_step says. classes: K, 0 for affine.
        mask: the id of a masked token. last_readout: the last row's, default `readout`.
        log_var_lo, log_var_hi: None, or [N] for models that return a second plane v: n is then scaled by
        exp((f log_var_hi + (1 - f) log_var_lo) / 2), f = (v + 1) / 2.
    Raises: ValueError for wrong shapes, entries that are not finite, a start or end that is not clean where it must be.
    """

    name: str
    times: np.ndarray
    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    c_in: np.ndarray
    c_skip: np.ndarray
    c_out: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    A: np.ndarray
    b: np.ndarray
    d: np.ndarray
    s: np.ndarray
    init_scale: float = 1.0
    init_noise: float = 0.0
    end: tuple[float, float] = (1.0, 0.0)
    draws: np.ndarray = None  # type: ignore[assignment]  # filled in __post_init__
    guidance: np.ndarray | None = None
    readout: str = "affine"
    classes: int = 0
    last_readout: str = ""
    mask: int = -1
    log_var_lo: np.ndarray | None = None
    log_var_hi: np.ndarray | None = None
    _device_tables: dict[torch.device, torch.Tensor] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("t", "alpha", "sigma", "c_in", "c_skip", "c_out", "lo", "hi", "A", "b", "d", "s"):
            put(self, name, np.array(getattr(self, name), np.float64))
        times = np.array(self.times)
        put(self, "times", times.astype(np.int64 if np.issubdtype(times.dtype, np.integer) else np.float64))
        tokens = self.readout in ORDERS  # s is a temperature there
        draws = (self.s != 0).any(-1) & (not tokens) if self.draws is None else self.draws
        put(self, "draws", np.array(draws, np.int64))
        for name in ("guidance", "log_var_lo", "log_var_hi"):
            if getattr(self, name) is not None:
                put(self, name, np.array(getattr(self, name), np.float64))
        if (self.log_var_lo is None) != (self.log_var_hi is None):
            raise ValueError(f"plan {self.name!r}: log_var_lo and log_var_hi go together")
        put(self, "last_readout", self.last_readout or self.readout)
        self._check_shapes()
        self._check_values()
        check_readout(self)
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)

    def _check_shapes(self) -> None:
        if self.A.ndim != 3 or self.A.shape[0] < 1 or self.A.shape[1] != self.A.shape[2]:
            raise ValueError(f"plan {self.name!r}: A must be [N, r, r] with N >= 1, got shape {self.A.shape}")
        rows, slots = self.A.shape[:2]
        if not 1 <= slots <= MAX_SLOTS:
            raise ValueError(f"plan {self.name!r}: 1 to {MAX_SLOTS} slots are supported, got {slots}")
        vectors = ("times", "t", "alpha", "sigma", "c_in", "c_skip", "c_out", "lo", "hi", "draws", "guidance", *LEARNED)
        shapes = dict.fromkeys(vectors, (rows,)) | dict.fromkeys(("b", "d", "s"), (rows, slots))
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"plan {self.name!r}: {name} must have shape {shape}, got {value.shape}")

    def _check_values(self) -> None:
        scalars = ("init_scale", "init_noise", "guidance", *LEARNED)
        finite = ("times", "c_in", "c_skip", "c_out", "A", "b", "d", "s", *scalars)
        for name in finite:
            value = getattr(self, name)
            if value is not None and not np.all(np.isfinite(value)):
                bad = np.argwhere(~np.isfinite(np.atleast_1d(value)))[0]
                raise ValueError(f"plan {self.name!r}: {name} is not finite at row {int(bad[0])}")
        if np.any(np.isnan(self.lo) | np.isnan(self.hi)) or np.any(self.lo > self.hi):
            raise ValueError(f"plan {self.name!r}: every row needs lo <= hi")
        silent = self.draws < np.any(self.s != 0, axis=-1)
        if np.any(silent) and self.readout not in ORDERS:
            raise ValueError(f"plan {self.name!r}: row {int(np.argmax(silent))} adds noise (s), but draws none (draws)")
        if 0 not in self._need[-1] or self._need[0] != frozenset({0}):
            raise ValueError(
                f"plan {self.name!r}: the first row reads slots {sorted(self._need[0])}, only 0 exists there"
            )
        if self.end == (1.0, 0.0) and self.readout not in ORDERS:
            if self.s[-1, 0] != 0:
                raise ValueError(f"plan {self.name!r}: the last row adds noise ({self.s[-1, 0]:g}) to the clean sample")
            only_p = not np.any(self.A[-1, 0]) and self.d[-1, 0] == 0
            if only_p and abs(self.b[-1, 0] - 1) > END_TOLERANCE:
                raise ValueError(f"plan {self.name!r}: the last row must return x0 itself, but b = {self.b[-1, 0]!r}")

    @classmethod
    def of(
        cls,
        name: str,
        at: Points,
        A: np.ndarray,
        b: np.ndarray,
        *,
        d: np.ndarray | None = None,
        s: np.ndarray | None = None,
        end: tuple[float, float] = (1.0, 0.0),
        init_scale: float | None = None,
    ) -> Plan:
        """A plan evaluated at `at`; r = 1 coefficients may be [N]. init_scale defaults to the first sigma."""
        n = len(at.t)
        A = np.asarray(A, np.float64)
        r = 1 if A.ndim == 1 else A.shape[-1]
        b, d, s = (np.zeros((n, r)) if v is None else np.reshape(v, (n, r)) for v in (b, d, s))
        c = at.convert
        lo, hi = (np.full(n, v) for v in at.clip)
        return cls(
            name, at.times, at.t, at.alpha, at.sigma, c.c_in, c.c_skip, c.c_out, lo, hi, A.reshape(n, r, r), b, d, s,
            init_scale=float(at.sigma[0] if init_scale is None else init_scale), end=end,
        )  # fmt: skip

    @property
    def nfe(self) -> int:
        """Model evaluations: one per row."""
        return len(self.b)

    @property
    def slots(self) -> int:
        """r, the logical state slots."""
        return self.b.shape[1]

    @property
    def stochastic(self) -> bool:
        """Does any row add noise, or choose at random?"""
        chance = self.readout == "random" and np.any((self.b < 1) | (self.A[:, 0] < 1))
        shaken = self.readout in ORDERS and np.any(self.c_skip)
        return bool(np.any(self.s) or chance or shaken)

    @property
    def learned_variance(self) -> bool:
        """Does the model return a second plane that scales the noise?"""
        return self.log_var_lo is not None

    @property
    def beyond_table(self) -> str:
        """What rows do besides clamping and the affine map of x, m and n that their table is; "" where that is all."""
        if self.readout != "affine":
            return "unmasks tokens" if self.readout in ORDERS else "reads out classes or bins"
        return "learns its variance" if self.learned_variance else ""

    @property
    def clamped(self) -> bool:
        """Does any row clamp its prediction?"""
        return self.readout not in ORDERS and bool(np.any(np.isfinite(self.lo) | np.isfinite(self.hi)))

    @cached_property
    def _need(self) -> list[frozenset[int]]:
        return liveness(self.A)

    @property
    def entry_rows(self) -> list[int]:
        """Rows that read slot 0 alone: where an outside x can enter."""
        return [k for k in range(self.nfe) if self._need[k] <= {0}]

    @cached_property
    def _allocation(self) -> Allocation:
        return allocate(self.A, self.b, self.d, self.s, self._conversion[0], self._need)

    @property
    def _conversion(self) -> tuple[np.ndarray, np.ndarray]:
        """c_skip and c_out of the step: a readout of bins gives it p itself."""
        return (0 * self.c_skip, 1 + 0 * self.c_out) if self.readout in BINNED else (self.c_skip, self.c_out)

    def allocate(self) -> Allocation:
        """Liveness, slot renaming and physical indices: see fastdiff.allocate.Allocation."""
        return self._allocation

    def bytes_per_element(self, *, model_bytes: int = 4, guided: bool = False) -> np.ndarray:
        """[N] bytes a row must move per element of the sample.

        fp32 slots read and written plus the model's output (two of them when guided). The low-precision copy of the
        next model input is not counted, but for classes, whose input 2 theta - 1 is never the state itself. Bins are
        read out before the step (and guided before that). Of tokens an element is a logit, and those of tokens that a
        row can change are read.
        """
        if self.readout in ORDERS:
            blocks, block = self.d.max() + 1, self.d[:, 0]
            masked = self.sigma - (blocks - 1 - block) / blocks  # those of later blocks apart
            return model_bytes * (1 + guided) * masked * (self.b[:, 0] if self.readout == "random" else 1)
        a = self._allocation
        uses_m = np.any(self.d != 0, axis=1) | (np.any(self.b != 0, axis=1) & (self.c_out != 0))
        slots = np.sum(a.read >= 0, axis=1) + np.sum(a.write >= 0, axis=1)
        if self.readout in BINNED:  # the readout reads x and two planes and writes p, which the step reads
            return 4 * slots + 12 + model_bytes * (2 + 6 * guided)
        own_input = np.arange(self.nfe) < self.nfe - 1 if self.readout in CATEGORICAL else np.zeros(self.nfe, bool)
        second = self.learned_variance & np.any(self.s != 0, axis=1)
        return 4 * slots + model_bytes * ((1 + guided) * (uses_m.astype(np.int64) + own_input) + second)

    def sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A, b, d with b_i p = b_i (c_skip x + c_out m) put into A_i0 x + d_i m where that leaves x no larger.

        A derivative (x - p) / sigma is then m, in which nothing cancels. Where x would be taken many times, as of a
        noise prediction at the noisy end, p stays apart: x and m nearly cancel in it, and c_skip (x + c_ratio m) is
        accurate; what c_ratio leaves over joins d. A slot that is p alone stays so too, to be stored as it is.
        """
        c_skip, c_out = self._conversion
        free = np.isneginf(self.lo) & np.isposinf(self.hi) & (c_out != 0) & (self.readout not in CLASSES)
        alone = ~self.A.any(-1) & (self.d == 0) & (np.arange(self.slots) > 0)
        b = np.where(free[:, None] & ~alone, self.b, 0.0)
        own, x = self.A[:, :, 0], b * c_skip[:, None]
        small = stays_small(own, x)
        skip, c_ratio = factored(c_skip, c_out)
        rest = c_out - skip * c_ratio.astype(np.float32)
        A = self.A.copy()
        A[:, :, 0] += np.where(small, x, 0.0)
        return A, np.where(small, self.b - b, self.b), self.d + b * np.where(small, c_out[:, None], rest[:, None])

    def packed(self) -> np.ndarray:
        """The table the kernels read, [N, row_width(r)] float32, cast from float64 once.

        Raises: ValueError for a coefficient that float32 cannot hold.
        """
        n, r, a = self.nfe, self.slots, self._allocation
        noisy = np.any(self.s != 0, axis=1)
        c_in_next = np.append(self.c_in[1:], 1.0)
        learned = [0 * noisy if v is None else v for v in (self.log_var_lo, self.log_var_hi)]
        tokens = self.readout in ORDERS  # whose c_skip is no weight
        conversion = self._conversion if tokens else factored(*self._conversion)
        head = np.stack([*conversion, self.lo, self.hi, c_in_next, noisy, *learned], axis=1)
        A, b, d = self.sums()
        blocks = (head, A.reshape(n, r * r), b, d, self.s, a.read, a.write)
        table = np.concatenate([np.asarray(v, np.float64) for v in blocks], axis=1)
        table = np.pad(table, ((0, 0), (0, row_width(r) - table.shape[1])))
        with np.errstate(over="ignore"):
            rounded = table.astype(np.float32)
        beyond = np.isinf(rounded) & np.isfinite(table)
        if beyond.any():
            row = int(np.argmax(beyond.any(1)))
            raise ValueError(
                f"plan {self.name!r}: row {row}, at alpha = {self.alpha[row]:g}, has a coefficient beyond float32, "
                f"{np.abs(table[beyond]).max():g}: start where there is more signal"
            )
        return rounded

    def pack(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The packed fp32 table on a device, [N, row_width(r)]; made once per device."""
        device = torch.device(device)
        if device not in self._device_tables:
            with lasting():
                self._device_tables[device] = torch.from_numpy(self.packed()).to(device)
        return self._device_tables[device]

    def __repr__(self) -> str:
        noise = "stochastic" if self.stochastic else "deterministic"
        return f"Plan({self.name!r}, nfe={self.nfe}, slots={self.slots}, {noise}, end={self.end})"

    def __str__(self) -> str:
        return describe(self)


def _terms(plan: Plan, k: int, i: int) -> str:
    if plan.readout in ORDERS:
        terms = [f"{name} {getattr(plan, name)[k].item():.5g}" for name in "Abds"]
        return "  ".join([*terms, f"hi {plan.hi[k]:.5g}"] if np.isfinite(plan.hi[k]) else terms)
    parts = [(plan.A[k, i, j], f"S{j}") for j in range(plan.slots)]
    parts += [(plan.b[k, i], "p"), (plan.d[k, i], "m"), (plan.s[k, i], "n")]
    text = " ".join(f"{c:+.5g} {name}" if c != 1 else f"+ {name}" for c, name in parts if c != 0)
    return f"S{i} = {text or '0'}"


def describe(plan: Plan, *, most: int = 24) -> str:
    """The plan as a table for people: a header and a line a row; long plans show their first and last rows."""
    lines = [
        repr(plan),
        f"  start: {plan.init_scale:.6g} n0 + {plan.init_noise:.6g} n1;  "
        f"fp32 bytes/element {plan.bytes_per_element().mean():.1f};  physical slots {plan.allocate().physical}",
        f"  {'row':>4} {'t':>9} {'model t':>9} {'alpha':>9} {'sigma':>9} {'c_skip':>10} {'c_out':>10}  update",
    ]
    if plan.readout != "affine":
        lines.insert(1, f"  {sentence(plan)}")
    half = most // 2
    rows = range(plan.nfe) if plan.nfe <= most else [*range(half), -1, *range(plan.nfe - half, plan.nfe)]
    for k in rows:
        if k < 0:
            lines.append(f"  {'...':>4} ({plan.nfe - 2 * half} rows)")
            continue
        live = sorted(plan._need[k + 1])
        bounded = plan.readout not in ORDERS and (np.isfinite(plan.lo[k]) or np.isfinite(plan.hi[k]))
        clamp = f"  p in [{plan.lo[k]:g}, {plan.hi[k]:g}]" if bounded else ""
        update = "; ".join(_terms(plan, k, i) for i in live)
        lines.append(
            f"  {k:>4} {plan.t[k]:>9.4g} {plan.times[k]:>9.4g} {plan.alpha[k]:>9.4g} {plan.sigma[k]:>9.4g}"
            f" {plan.c_skip[k]:>10.4g} {plan.c_out[k]:>10.4g}  {update}{clamp}"
        )
    return "\n".join(lines)
