"""Launches, host reads, peak memory and energy: against numbers one can count by hand."""

import sys
import time
import types

import pytest
import torch

import fastdiff as fd
from fastdiff_bench import energy, suite, tables, throughput
from fastdiff_bench.cases import Case
from fastdiff_bench.counts import counted, held_bytes, peak_bytes
from fastdiff_bench.energy import Meter, reasons, throttled

CPU = torch.device("cpu")


def test_outermost_operations_are_counted_views_are_not():
    x, w = torch.ones(4, 4), torch.ones(4, 4)

    def run():
        y = torch.nn.functional.linear(x, w)  # calls others inside: one
        y = y.view(16).add(1.0)
        return float(y.sum().item())  # sum, item

    assert counted(run, CPU) == {"launches": 4, "syncs": 1}


def test_peak_is_what_was_held_at_once():
    def run():
        a = torch.empty(1 << 20)
        b = torch.empty(1 << 20)
        del a
        c = torch.empty(1 << 19)
        return b, c

    assert peak_bytes(run, CPU) == 2 * 4 << 20


def test_what_a_sampler_keeps_is_counted_once():
    plan = fd.solvers.ddim(fd.schedules.VP(), 4)
    sampler = fd.Sampler(lambda x, t: x, plan, mode="eager")
    sampler((2, 1 << 16))
    small = 1 << 14  # times, tables, row numbers
    state = 4 * 2 << 16
    assert state <= held_bytes(sampler) - held_bytes(next(iter(sampler._runs.values())).run.noise) <= 3 * state + small
    slab = torch.zeros(3, 8)
    holder = types.SimpleNamespace(slab=slab, x=slab[0], network=torch.nn.Linear(99, 99))
    assert held_bytes([holder.slab, holder.x, holder.network]) == 3 * 8 * 4


def test_a_cast_that_changes_nothing_is_no_launch():
    x = torch.ones(8)
    assert counted(lambda: x.to(torch.float32).to(torch.bfloat16), CPU)["launches"] == 1


def test_without_a_gpu_columns_are_empty_and_say_why():
    meter = Meter(CPU)
    assert meter.state() == {"nvml": "energy, clocks and throttle reasons need an NVIDIA GPU; this run is on the CPU"}
    assert meter.energy(lambda: None) is None and meter.idle() == 0 and not throttled(meter.state())


def test_reasons_are_nvmls():
    pynvml = pytest.importorskip("pynvml")
    names = [n for n in dir(pynvml) if n.startswith("nvmlClocksEventReason") and not n.endswith(("None", "All"))]
    bits = {getattr(pynvml, n) for n in names}
    assert bits == set(energy.REASONS)
    assert throttled({"throttle_bits": pynvml.nvmlClocksEventReasonSwPowerCap})
    assert not throttled({"throttle_bits": pynvml.nvmlClocksEventReasonGpuIdle})
    assert reasons(0x24) == ["software power cap", "software thermal slowdown"] and reasons(1 << 12) == ["0x1000"]


class Board(types.ModuleType):
    """The documented calls of NVML on a board that burns 100 W idle and 400 J a call of `run`. Times are real.

    `cold`: until the first call it idles at 40 W.
    """

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, cold=False):
        super().__init__("pynvml")
        self.calls, self.began, self.cold, self.warm = 0, None, cold, None

    def nvmlInit(self):
        import time

        self.began = time.perf_counter()

    def nvmlDeviceGetHandleByIndex(self, index):
        return ("board", index)

    def nvmlDeviceGetHandleByUUID(self, uuid):
        raise RuntimeError("unknown")

    def nvmlSystemGetDriverVersion(self):
        return "999.1"

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {1: 1980, 2: 3201}[kind]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 700_000

    def nvmlDeviceGetPowerUsage(self, handle):
        raise RuntimeError("Not Supported")

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 41

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return 0x4

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        import time

        now = time.perf_counter()
        if self.calls and self.warm is None:
            self.warm = now
        cold = min(now, self.warm or now) - self.began if self.cold else 0.0
        return int(1000 * (100 * (now - self.began) - 60 * cold + 400 * self.calls))


@pytest.mark.parametrize("cold", [False, True])
def test_energy_is_the_counters_difference_less_the_idle_power_after_it(cold, monkeypatch):
    board = Board(cold)
    monkeypatch.setitem(sys.modules, "pynvml", board)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="u"))
    meter = Meter(torch.device("cuda", 0))
    assert meter.why == "" and meter.idle(0.2) == pytest.approx(40 if cold else 100, rel=0.02)
    state = meter.state()
    assert state["sm_clock_mhz"] == 1980 and state["power_limit_w"] == 700 and state["temperature_c"] == 41
    assert state["throttle_reasons"] == ["software power cap"] and throttled(state)
    assert state["not_readable"] == {"power_w": "Not Supported"}

    def run():
        import time

        board.calls += 1
        time.sleep(0.01)

    reading = meter.energy(run, 0.2)
    assert reading.joules == pytest.approx(400, rel=0.02) and reading.calls >= 5
    assert reading.watts > reading.idle_watts == pytest.approx(100, rel=0.02)


class Log:
    """A meter that writes down what it is asked for; a board that runs hot, or refuses."""

    nvml = object()

    def __init__(self, refuses=False, throttle_bits=0):
        self.refuses, self.bits, self.asked = refuses, throttle_bits, []

    def energy(self, run, seconds=5.0, prepare=lambda: None):
        self.asked.append("energy")
        if self.refuses:
            raise Refusal("Not\nSupported")
        run()
        return energy.Reading(3.0, 1.0, 1.0, 1, 1.0)

    def state(self):
        self.asked.append("state")
        return {"throttle_bits": self.bits}


class Refusal(Exception):
    """NVML's own error: no RuntimeError."""


def measured(meter, earlier=None, **settings):
    set_ = throughput.Settings(CPU, ("torch", "fastdiff eager"), rounds=5, seconds=0.01, meter=meter, **settings)
    return throughput.measure(Case("vp", "ddim", 3), (1, 4), "fp32", torch.float32, set_, earlier=earlier)


def test_the_clocks_are_read_right_after_the_rounds():
    meter = Log(throttle_bits=0x4)
    row = measured(meter)
    assert meter.asked == ["state", "energy", "energy"] and row["throttled"] is True
    assert row["joules"] == {"torch": 1.0, "fastdiff eager": 1.0}


def test_the_clocks_are_read_with_rows_whose_energy_is_not_measured():
    for settings in ({"joules": False}, {"details": False}):
        meter = Log()
        row = measured(meter, **settings)
        assert meter.asked == ["state"] and row["throttled"] is False
    hot = measured(Log(throttle_bits=0x4), details=False)
    assert measured(Log(), earlier=hot, details=False)["throttled"] is True  # one of its visits


def test_a_row_is_kept_before_its_energy_is_measured():
    class Interrupted(Log):
        def energy(self, run, seconds=5.0, prepare=lambda: None):
            raise KeyboardInterrupt

    kept = []
    with pytest.raises(KeyboardInterrupt):
        measured(Interrupted(), keep=kept.append)
    assert [set(row["us"]) for row in kept] == [{"torch", "fastdiff eager"}] and kept[0]["peak_mib"]


def test_the_hosts_time_is_of_whole_loops_each_prepared(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    us = throughput._host_us(lambda: time.sleep(0.002), lambda: calls.append("prepare"), 4)
    assert calls == ["prepare"] * throughput.HOST_RUNS and us >= 500


def test_what_a_graph_was_captured_of_is_a_note_and_a_samplers_name_is_not():
    row = measured(Log(), details=False) | {"names": {"torch graph": "of the eager rows", "diffusers": "DDIMScheduler"}}
    assert [line for line in tables.footnotes([row]) if "graph" in line] == ["torch graph: of the eager rows"]
    assert not any("DDIM" in line for line in tables.footnotes([row]))


def test_the_tenths_of_both_sides_are_in_the_table():
    row = measured(Log(), details=False)
    times = {"median": 2.0, "p10": 1.0, "p90": 3.456}, {"median": 20.0, "p10": 10.0, "p90": 34.56}
    row["us"] = dict(zip(("fastdiff eager", "torch"), times, strict=True))
    assert "| 1 to 3.46 / 10 to 34.6 |" in tables.details([row])


def test_a_board_that_refuses_its_energy_is_a_note():
    row = measured(Log(refuses=True))
    assert row["joules"] == {} and set(row["us"]) == {"torch", "fastdiff eager"}
    assert row["not_measured"]["joules of torch"] == "Refusal: Not Supported"
    assert any(
        "joules of torch" in line and line.endswith(": Refusal: Not Supported") for line in tables.footnotes([row])
    )


def test_every_row_of_a_quick_run_gets_the_meter(monkeypatch):
    given = []

    def measure(case, shape, dtype_name, dtype, set_, **rest):
        given.append((case.solver, set_.meter is not None, set_.joules))
        return {}

    monkeypatch.setattr(suite, "measure", measure)
    argv = ["--quick", "--device", "cpu", "--schedules", "scaled_linear_betas", "--solvers", "ddpm", "unipc"]
    asked = suite.Request(suite.options.parser().parse_args(argv))
    suite.fill({"method": {"copy_gb_s": 1.0}, "rows": []}, asked, Meter(CPU), say=lambda line: None)
    assert given == [("ddpm", True, True), ("unipc", True, False)]


def test_a_slow_machine_gets_shorter_visits(monkeypatch):
    """100 s planned last 110 s with what is not timed: in 55 s half of each, but a tenth at least, and never more."""
    assert suite.pace(110.1, 100) == suite.pace(1e6, 100) == 1
    assert suite.pace(55, 100) == pytest.approx(0.5)
    assert suite.pace(1, 100) == suite.pace(-50, 100) == 0.1
    timed: list[float] = []

    def watched(case, shape, name, dtype, settings, *, earlier=None):
        timed.append(settings.seconds)
        return {"times": {}, "solver": case.solver}

    monkeypatch.setattr(suite, "measure", watched)
    clock = iter([0.0, 0.0, 10.0, 18.0, 18.0, *[25.0] * 3, 26.0])
    monkeypatch.setattr(suite.time, "monotonic", lambda: next(clock))
    asked = suite.Request(
        suite.options.parser().parse_args("--schedules vp --solvers ddim euler --shapes 2x3 --device cpu".split())
    )
    suite.fill({"method": {"copy_gb_s": 1.0}, "rows": []}, asked, Meter(CPU), say=lambda line: None)
    # 26 s for two rows: 8 are left for six visits of 2 s after the first two, 1 for the last four
    assert timed == pytest.approx([2.0, 2.0, 2 * 8 / 13.2, 2 * 8 / 11.0, 2 * 1 / 8.8, 2 * 1 / 6.6, 2 * 1 / 4.4, 0.2])
