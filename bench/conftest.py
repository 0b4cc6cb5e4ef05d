"""Options and facts shared by the bench_*.py files: pytest bench/bench_*.py [pytest-benchmark's options]."""

import pytest
import torch

from fastdiff_bench.energy import Meter, throttled
from fastdiff_bench.environment import environment
from fastdiff_bench.stock import INSTALL, installed, offers
from fastdiff_bench.throughput import TOLERANCE
from fastdiff_bench.timing import captured, copy_bandwidth, malloc_is_set

NO_STEP = ("diffusers", "bench_affine_step")


def pytest_addoption(parser):
    parser.addoption("--exponents", default="18", help="log2 of the sizes of the kernels' benchmarks")
    parser.addoption("--with-compile", action="store_true", help="the torch.compile columns too")


def pytest_configure(config):
    if not malloc_is_set():
        print("MALLOC_MMAP_THRESHOLD_ is not set: page faults are on the clock; `make bench` sets it")


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def facts(device):
    """Where this is measured, and what a copy reaches."""
    return {**environment(device), "copy_gb_s": copy_bandwidth(device), "malloc_thresholds": malloc_is_set()}


@pytest.fixture
def timed(benchmark, device, facts):
    """timed(run, units, moved): benchmarks run, which does `units` steps or calls of `moved` bytes each."""
    meter = Meter(device)

    def call(run):
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def measure(run, *, group, units=1, moved=None, prepare=lambda: None):
        benchmark.group = group
        prepare()
        call(run)  # compiled, captured, allocated
        benchmark.pedantic(call, (run,), setup=prepare, rounds=5, warmup_rounds=1, iterations=1)
        benchmark.extra_info |= {**facts, **meter.state()}
        benchmark.extra_info["throttled"] = throttled(meter.state())
        if benchmark.stats is not None:
            seconds = benchmark.stats.stats.median / units
            benchmark.extra_info["us_per_step"] = 1e6 * seconds
            if moved is not None:
                benchmark.extra_info["gb_s"] = moved / seconds / 1e9
                benchmark.extra_info["of_copy"] = moved / seconds / 1e9 / facts["copy_gb_s"]

    return measure


@pytest.fixture
def kernel(timed, device, exponent, dtype, column):
    """kernel(make, schedule, **options): benchmarks a column of a kernel's work; on a GPU as replays of a graph."""

    def measure(make, schedule, **options):
        with torch.no_grad():
            work = make(schedule, 1 << exponent, dtype, device, (column, "fastdiff eager"), **options)
            assert column in work.columns, work.skipped
            assert all(off <= TOLERANCE[dtype] for off in work.differs.values()), work.differs
            run = work.run(column)
            if device.type == "cuda":
                try:
                    run = captured([run]).replay
                except RuntimeError as error:
                    print(f"{column} is timed by the clock, it cannot be captured: {error}")
            timed(
                run, group=f"{work.kernel} {schedule} 2^{exponent} {str(dtype)[6:]}", units=len(work.sets) * work.units,
                moved=work.bytes_per_element * work.elements, prepare=work.prepare.get(column, lambda: None),
            )  # fmt: skip

    return measure


def pytest_generate_tests(metafunc):
    if "exponent" in metafunc.fixturenames:
        metafunc.parametrize("exponent", [int(e) for e in metafunc.config.getoption("--exponents").split(",")])
    if "column" in metafunc.fixturenames:
        names = getattr(metafunc.module, "COLUMNS", ())
        if not metafunc.config.getoption("--with-compile"):
            names = [n for n in names if n != "torch.compile"]
        kernel, cuda = "exponent" in metafunc.fixturenames, torch.cuda.is_available()
        names = [n for n in names if (cuda or not n.endswith("_graph")) and (n not in INSTALL or installed(n))]
        if cuda and kernel:  # a kernel is a kernel; diffusers has no single step to time there
            names = [n for n in names if n != "fastdiff compiled" and (n, metafunc.module.__name__) != NO_STEP]
        if kernel:
            metafunc.parametrize("column", names)
        else:
            loops = [(n, c, k) for n, c in metafunc.module.LOOPS for k in names if k not in INSTALL or offers(k, c)]
            ids = [f"{n}-{c.kind}-{c.solver}-{k}" for n, c, k in loops]
            metafunc.parametrize(("network", "case", "column"), loops, ids=ids)
