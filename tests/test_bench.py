"""fastdiff bench: what is timed computes the same, tables and files are right, bad input is one line."""

import json
import math
import re
import statistics
import time

import pytest
import torch

import fastdiff as fd
from fastdiff.cli import main
from fastdiff.reference import reference_sample
from fastdiff_bench import cases, options, page, stock, suite, tables, throughput, timing
from fastdiff_bench.cases import Case
from fastdiff_bench.counts import counted
from fastdiff_bench.textbook import Textbook
from fastdiff_bench.textbook_tokens import TokensTextbook

CPU = torch.device("cpu")
SHAPE = (2, 3, 5)
ROWS = [c for c in cases.default_cases(False, steps=10) if c.kind not in cases.DISCRETE]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def probe(x, t):
    return 0.2 * torch.tanh(x) + 0.1


def start(plan, shape=SHAPE):
    return torch.randn(shape, generator=generator(1)) * plan.init_scale


def gap(got, want):
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@pytest.mark.parametrize("case", ROWS, ids=lambda c: f"{c.schedule}-{c.solver}")
def test_the_textbook_loop_is_the_plan(case):
    plan = case.plan()
    draws = generator(3)
    want = reference_sample(
        lambda x, t: probe(x, t),
        plan,
        start(plan).double(),
        lambda k, like: torch.randn(SHAPE, generator=draws).double(),
    )
    x = start(plan)
    got = Textbook(plan, probe)(x, generator(3))
    assert gap(got, want) < 2e-5  # fp32 against float64
    assert torch.equal(x, start(plan))  # the caller's


STOCK = [(c, make) for c in ROWS for make in (stock.diffusers_loop, stock.k_diffusion_loop)
         if (make is stock.diffusers_loop and (c.kind, c.solver) in stock.DIFFUSERS)
         or (make is stock.k_diffusion_loop and c.kind == "edm" and c.solver in stock.K_DIFFUSION)]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "make"), STOCK, ids=lambda v: f"{v.schedule}-{v.solver}" if isinstance(v, Case) else ""
)
def test_the_peers_compute_the_same(case, make):
    plan = case.plan()
    found = make(case, plan, probe, torch.float32, CPU)
    found.prepare()
    got = found.loop(start(plan), generator(3))
    want = fd.sample(probe, plan, SHAPE, x_T=start(plan), noise="torch", generator=generator(3), mode="eager")
    assert gap(got, want) < 2e-5


@pytest.mark.compiled
def test_the_compiled_textbook_is_the_eager_one():
    plan = Case("scaled_linear_betas", "dpmpp_2m", 4).plan()
    x = start(plan, (1, 64))
    compiled = Textbook(plan, probe, compiled=True)
    assert gap(compiled(x), Textbook(plan, probe)(x)) < 1e-6
    noisy = Case("scaled_linear_betas", "ddpm", 3).plan()
    got, want = (Textbook(noisy, probe, compiled=c)(start(noisy, (1, 64)), generator(4)) for c in (True, False))
    assert gap(got, want) < 1e-6
    before = len(Textbook.cache)
    compiled(x)
    assert len(Textbook.cache) == before <= 6  # first, middle, last but one, last; noisy and not


@pytest.mark.parametrize(("schedule", "solver", "operations"), [
    ("scaled_linear_betas", "ddim", 2),  # A x + d m, p multiplied out
    ("flow", "euler", 1),  # x + d m
    ("flow", "dpmpp_2m", 4),  # p = x + c m is kept: 1; A x + b p + b' p'
    ("scaled_linear_betas", "ddpm", 6),  # p, clamped: 3; A x + b p + s n, drawn outside: 3
    ("scaled_linear_betas", "dpmpp_2m", 5),  # p is kept: 2; A x + b p + b' p'
])  # fmt: skip
def test_the_textbook_does_the_least_work(schedule, solver, operations):
    plan = Case(schedule, solver, 8).plan()
    out = torch.randn(1, 64)
    loop, x = Textbook(plan, lambda x, t: out), start(plan, (1, 64))
    loop(x)
    rows = [counted(lambda k=k: loop.row(k, [x] * plan.slots, out, out), CPU)["launches"] for k in range(2, 6)]
    assert rows == [operations] * 4


@pytest.mark.parametrize(("schedule", "first", "second"), [("scaled_linear_betas", 2, 2), ("flow", 1, 2)])
def test_the_textbooks_heun_keeps_the_output_itself(schedule, first, second):
    """The derivative is the output: kept by reference; A x + d m, or x + d m, then x + d m + d' m'."""
    plan = Case(schedule, "heun", 8).plan()
    out = torch.randn(1, 64)
    loop, x = Textbook(plan, lambda x, t: out), start(plan, (1, 64))
    loop(x)
    counts = [counted(lambda k=k: loop.row(k, [x] * plan.slots, out, out), CPU)["launches"] for k in range(2, 6)]
    assert counts == [first, second, first, second] and loop.row(2, [x] * plan.slots, out, None)[1][1] is out


def test_large_numbers_that_cancel_are_not_multiplied_out():
    plan = Case("cosine_betas", "ddim", 20).plan()
    loop = Textbook(plan, probe)
    kept = [("p", 0) in row.slots[0] for row in loop.rows]
    assert kept[0] and not any(kept[2:-1])  # the last row is p
    x = start(plan)
    want = reference_sample(probe, plan, x.double(), lambda k, like: torch.zeros(SHAPE).double())
    assert gap(loop(x), want) < 2e-6


def test_classes_of_the_textbook_agree_without_noise():
    plan = fd.solvers.bfn_discrete(fd.schedules.BFNDiscrete(3.0, 5), 6, readout="argmax")
    x = torch.randn(4, 9, 5, generator=generator(0))
    logits = torch.randn(4, 9, 5, generator=generator(1))

    def model(x, t):
        return logits + x

    want = fd.sample(model, plan, (4, 9), x_T=x, noise="torch", generator=generator(2), mode="eager")
    assert torch.equal(Textbook(plan, model)(x, generator(2)), want)


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
def test_tokens_of_the_textbook_agree_without_noise(order):
    schedule = fd.schedules.Masked(5, 2, "cosine")
    plan = fd.solvers.unmask(schedule, 6, order=order, temperature=0.0)
    out = torch.randn(4, 9, 5, generator=generator(1))

    def model(x, t):
        return out + torch.sin(x.roll(1, -1) + t[:, None])[..., None] * out.roll(1, -1)

    got = TokensTextbook(plan, model)(torch.full((4, 9), 2))
    assert torch.equal(got, fd.sample(model, plan, (4, 9)))


def test_tokens_of_the_textbook_in_any_order_have_their_shares():
    plan = fd.solvers.unmask(fd.schedules.Masked(3), 4, temperature=0.5, remask=0.5)
    p = torch.tensor([0.2, 0.3, 0.5])
    seen = []

    def model(x, t):
        seen.append(float((x == 3).float().mean()))
        return p.log().expand(*x.shape, 3)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        got = TokensTextbook(plan, model)(torch.full((100, 200), 3))
    assert seen[0] == 1 and all(abs(s - g) < 0.015 for s, g in zip(seen, plan.sigma, strict=True))  # 4 sd
    want = p**2 / (p**2).sum()
    assert all(abs(float((got == k).float().mean()) - float(want[k])) < 0.015 for k in range(3))


def test_interleaving_alternates_the_order_and_pairs_rounds():
    seen = []

    def run(name):
        seen.append(name)
        time.sleep(0.002)  # longer than a sample must be: one call a round

    spent = timing.interleave({n: (lambda n=n: run(n)) for n in "ab"}, rounds=6, seconds=100, device=CPU)
    assert {len(v) for v in spent.values()} == {6}
    assert "".join(seen[-12:]) in ("abbaabbaabba", "baabbaabbaab")
    assert timing.paired([2.0, 4.0, 6.0], [1.0, 2.0, 2.0]) == {"median": 2.0, "p10": 2.0, "p90": 3.0}
    assert timing.summary(range(11)) == {"median": 5, "p10": 1, "p90": 9}


def test_rotated_sets_exceed_the_cache_several_times():
    cache = min(timing.cache_bytes(CPU), timing.MOST_CACHE)
    count = timing.rotation(cache // 2, CPU)
    assert count * (cache // 2) > 4 * cache
    assert timing.rotation(10**12, CPU) == 2


def test_a_copy_moves_each_byte_twice(monkeypatch):
    def interleave(runs, **kwargs):
        return {name: [2.0] * 21 for name in runs}  # seconds of two copies

    monkeypatch.setattr(timing, "interleave", interleave)
    assert timing.copy_bandwidth(CPU, 1 << 20) == pytest.approx(2 * 4 * 2**20 / 1e9)  # fp32, read and written


def options_of(*argv):
    return options.Request(options.parser().parse_args(list(argv)))


def test_a_row_says_what_was_measured():
    set_ = throughput.Settings(CPU, ("torch", "diffusers", "fastdiff eager"), rounds=5, seconds=0.05, copy_gb_s=10.0)
    row = throughput.measure(Case("scaled_linear_betas", "ddim", 5), (1, 64), "fp32", torch.float32, set_)
    assert row["nfe"] == 5 and row["bytes_per_element"] == 12  # reads x and the output, writes x
    us = row["us"]["fastdiff eager"]["median"]
    assert row["gb_s"] == pytest.approx(12 * 64 / us / 1e3) and row["of_copy"] == pytest.approx(row["gb_s"] / 10)
    assert row["steps_per_s"]["torch"] == pytest.approx(1e6 / row["us"]["torch"]["median"])
    assert row["differs"]["torch"] < 1e-5 and row["differs"]["diffusers"] < 1e-5
    assert row["launches"]["diffusers"] > row["launches"]["fastdiff eager"] > 0
    assert row["names"] == {"diffusers": "DDIMScheduler"} and row["against"] == "torch, diffusers"
    rounds = zip(*(row["times"][n] for n in ("torch", "diffusers", "fastdiff eager")), strict=True)
    ratios = [math.sqrt(a * b) / c for a, b, c in rounds]  # the geometric mean of both, in the same round
    assert row["times_faster"]["fastdiff eager"]["median"] == pytest.approx(statistics.median(ratios))


def test_a_column_that_computes_something_else_is_not_timed(monkeypatch):
    other = ("DDIMScheduler", {"clip_sample": True})
    monkeypatch.setitem(stock.DIFFUSERS, ("scaled_linear_betas", "ddim"), other)
    set_ = throughput.Settings(CPU, ("torch", "diffusers", "fastdiff eager"), rounds=5, seconds=0.05, details=False)
    row = throughput.measure(Case("scaled_linear_betas", "ddim", 5), (1, 64), "fp32", torch.float32, set_)
    assert "diffusers" not in row["us"] and "not the same computation" in row["skipped"]["diffusers"]


def test_a_column_that_ends_in_nan_is_not_timed(monkeypatch):
    loop = stock.diffusers_loop

    def broken(*args):
        found = loop(*args)
        return found._replace(loop=lambda x, generator: found.loop(x, generator) * math.nan)

    monkeypatch.setattr(throughput, "diffusers_loop", broken)
    set_ = throughput.Settings(CPU, ("torch", "diffusers", "fastdiff eager"), rounds=5, seconds=0.05, details=False)
    row = throughput.measure(Case("scaled_linear_betas", "ddim", 5), (1, 64), "fp32", torch.float32, set_)
    assert set(row["us"]) == {"torch", "fastdiff eager"}
    assert row["skipped"]["diffusers"] == "its result differs by nan: not the same computation, not timed"


def test_a_library_that_is_not_installed_is_skipped_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(stock.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(stock, "k_diffusion_sampling", lambda: None)
    for schedule, name in (("scaled_linear_betas", "diffusers"), ("edm", "k-diffusion")):
        case = Case(schedule, "euler", 3)
        why = throughput.column_of(name, case, case.plan(), probe, torch.float32, CPU)
        assert f"{name} is not installed: pip install" in why


def test_bf16_models_are_compared_and_counted():
    set_ = throughput.Settings(CPU, ("torch", "fastdiff eager"), rounds=5, seconds=0.05, details=False)
    row = throughput.measure(Case("vp", "dpmpp_2m", 5), (1, 64), "bf16", torch.bfloat16, set_)
    plan = Case("vp", "dpmpp_2m", 5).plan()
    assert row["bytes_per_element"] == plan.bytes_per_element(model_bytes=2).mean() + 2  # and the model's next input
    assert set(row["us"]) == {"torch", "fastdiff eager"}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(suite, "copy_bandwidth", lambda device: timing.copy_bandwidth(device, 1 << 18))


SMALL = ["--quick", "--no-compile", "--schedules", "scaled_linear_betas", "--solvers", "ddim", "--steps", "4"]


def test_a_full_run_visits_every_row_four_times_and_pools_the_rounds(small, monkeypatch, tmp_path, capsys):
    visits = []
    once = suite.measure

    def measure(case, *args, **kwargs):
        visits.append(case.solver)
        return once(case, *args, **kwargs)

    monkeypatch.setattr(suite, "measure", measure)
    monkeypatch.setattr(suite, "FULL_S", 1e-9)  # the least rounds a visit
    stored = tmp_path / "a.json"
    at = SMALL.index("ddim") + 1
    full = [*SMALL[1:at], "ddpm", *SMALL[at:], "--shapes", "1x32"]
    assert suite.main([*full, "--peers", "torch", "--json", str(stored)]) == 0
    rows = json.loads(stored.read_text())["rows"]
    assert visits == ["ddim", "ddpm"] * 4 and [r["solver"] for r in rows] == ["ddim", "ddpm"]
    for row in rows:
        assert row["rounds"] == timing.LEAST_ROUNDS + 3 * throughput.LEAST_AGAIN and "times" not in row
        assert row["launches"]["torch"] > 0 and row["us"]["torch"]["p10"] < row["us"]["torch"]["p90"]


def test_a_run_prints_writes_compares_and_draws(small, tmp_path, capsys):
    stored, plots = tmp_path / "deep" / "a.json", tmp_path / "plots"
    assert suite.main([*SMALL, "--shapes", "1x32", "--json", str(stored)]) == 0
    out = capsys.readouterr().out
    data = json.loads(stored.read_text())
    assert data["complete"] is True and len(data["rows"]) == 1
    assert data["environment"]["torch"] == torch.__version__ and data["method"]["malloc_thresholds"] in (True, False)
    assert data["seconds"] > 0 and out.splitlines()[-1] == f"it took {data['seconds']:.0f} s"
    assert "| scaled_linear_betas | ddim" in out and "CUDA graphs need a GPU" in out and "joules, clocks: energy" in out
    assert suite.main([*SMALL, "--shapes", "1x32", "--json", str(stored), "--plot", str(plots)]) == 0
    html = (plots / "report.html").read_text()
    assert html.count("data:image/png;base64,") == len(list(plots.glob("*.png"))) == 1
    assert not re.search(r"(src|href)=.?https?:", html) and "<script" not in html


def test_html_escapes_and_says_when_it_was_interrupted():
    environment = {"cpu": "<b>cpu", "cores": 2, "python": "3", "commit": "abc"}
    text = page.page({"environment": environment, "method": {"model": "x"}, "rows": [], "complete": False}, [])
    assert "&lt;b&gt;cpu" in text and "<b>cpu" not in text and "interrupted" in text


def test_a_given_network_is_moved_and_put_into_evaluation():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = torch.nn.Parameter(torch.ones(4)), set()

        def forward(self, x, t):
            self.seen.add((self.training, self.weight.dtype, x.dtype))
            return x * self.weight

    network = Network()
    set_ = throughput.Settings(CPU, ("torch", "fastdiff eager"), rounds=5, seconds=0.01, model=network, details=False)
    throughput.measure(Case("vp", "ddim", 2), (1, 4), "bf16", torch.bfloat16, set_)
    assert network.seen == {(False, torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_peer_that_raises_is_a_note_of_its_row(stochastic, monkeypatch):
    def broken(*args):
        def loop(x, generator):
            raise UnboundLocalError("no\nh")

        return stock.Stock("broken", lambda: None, loop)

    monkeypatch.setattr(throughput, "diffusers_loop", broken)
    set_ = throughput.Settings(CPU, ("torch", "diffusers", "fastdiff eager"), rounds=5, seconds=0.01, details=False)
    case = Case("scaled_linear_betas", "ddpm" if stochastic else "ddim", 3)
    row = throughput.measure(case, (1, 4), "fp32", torch.float32, set_)
    assert set(row["us"]) == {"torch", "fastdiff eager"}
    assert row["skipped"] == {"diffusers": "it failed: UnboundLocalError: no h"}


def test_names_are_separated_by_spaces_or_commas():
    request = options_of("--schedules", "edm:sigma_min=0.1,rho=3,vp", "--solvers", "euler,heun", "--dtype", "fp32,bf16")
    assert [(c.schedule, c.solver) for c in request.cases] == [
        ("edm:sigma_min=0.1,rho=3", "euler"), ("edm:sigma_min=0.1,rho=3", "heun"), ("vp", "euler"), ("vp", "heun"),
    ]  # fmt: skip
    assert list(request.dtypes) == ["fp32", "bf16"]
    again = options.as_arguments(options.parser().parse_args(["--quick", "--shapes", "1x2", "--steps", "3"]))
    assert again == ["--quick", "--shapes", "1x2", "--steps", "3"]


def test_a_pair_the_solver_refuses_is_said_in_its_words():
    request = options_of("--schedules", "vp", "bfncontinuous", "--solvers", "bfn_continuous")
    assert [c.schedule for c in request.cases] == ["bfncontinuous"]
    assert [r.case.schedule for r in request.refused] == ["vp"] and request.refused[0].why


def test_losing_rows_are_printed_and_marked():
    timed = {"median": 2.0, "p10": 2.0, "p90": 2.0}
    row = {"schedule": "vp", "solver": "ddim", "shape": [1, 2], "dtype": "fp32", "steps_per_s": {"fastdiff eager": 5e5},
           "us": {"torch": {**timed, "median": 1.0}, "fastdiff eager": timed}, "skipped": {}}  # fmt: skip
    assert "0.5 (slower)" in tables.throughput([row])


def test_command_runs_in_a_process_of_its_own(tmp_path, capfd, monkeypatch):
    out = tmp_path / "r.json"
    assert main(["bench", *SMALL, "--shapes", "1x8", "--peers", "torch", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["method"]["malloc_thresholds"] is True
    assert "fastdiff eager" in capfd.readouterr().out


@pytest.mark.compiled
def test_codegen_compiles_for_a_gpu_that_is_not_here(capfd, tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "codegen.json"
    assert main(["bench", "--codegen", "--quick", "--kernels", "posterior", "--json", str(out)]) == 0
    reports = json.loads(out.read_text())["reports"]
    assert {r["target"] for r in reports} == {"sm_90"} and {r["case"].split("/")[0] for r in reports} == {"posterior"}
    assert f"{len(reports)} kernels, 0 over budget" in capfd.readouterr().out


@pytest.mark.parametrize("command", ["bench", "profile"])
def test_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"fastdiff {command}" in capsys.readouterr().out
