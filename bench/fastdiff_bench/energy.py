"""What NVML knows of the GPU: energy of a run by counter difference, clocks, power limit, temperature, throttling."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

__all__ = ["Meter", "Reading", "throttled"]

SECONDS = 5.0  # the counter advances in steps of tens of ms, and sensors sample a part of the time: long windows
# bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h)
REASONS = {
    0x1: "idle",
    0x2: "application clocks setting",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clock setting",
}
HARMLESS = 0x1 | 0x2 | 0x100


class Reading(NamedTuple):
    """Energy of one call beyond the idle baseline, and the power while it ran."""

    joules: float
    watts: float
    idle_watts: float
    calls: int
    seconds: float


def reasons(bits: int) -> list[str]:
    """The throttle reasons of a bit mask, in words."""
    return [name for bit, name in REASONS.items() if bits & bit] + ([hex(bits)] if bits & ~sum(REASONS) else [])


def throttled(state: dict[str, Any]) -> bool:
    """Did something hold the clocks down (idling and set clocks are not that)?"""
    return bool(state.get("throttle_bits", 0) & ~HARMLESS)


class Meter:
    """NVML of the device torch uses; `why` says why there is none.

    Every method works without a driver: state() is then {"nvml": why} and energy() is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.why, self.idle_watts, self.has_baseline = device, "", 0.0, False
        self.nvml: Any = None
        if device.type != "cuda":
            self.why = "energy, clocks and throttle reasons need an NVIDIA GPU; this run is on the CPU"
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self.handle = _handle(pynvml, device)
            self.nvml = pynvml
        except Exception as error:  # no module, no driver, no permission: one answer
            self.why = f"NVML is not readable ({type(error).__name__}: {error}); pip install nvidia-ml-py"

    def state(self) -> dict[str, Any]:
        """Clocks in MHz, power limit in W, temperature in C, throttle reasons; what the driver refuses is left out."""
        if self.nvml is None:
            return {"nvml": self.why}
        n, h = self.nvml, self.handle
        event_reasons = getattr(n, "nvmlDeviceGetCurrentClocksEventReasons", None)
        fields: dict[str, Callable[[], Any]] = {
            "sm_clock_mhz": lambda: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_MEM),
            "power_limit_w": lambda: n.nvmlDeviceGetEnforcedPowerLimit(h) / 1000,
            "power_w": lambda: n.nvmlDeviceGetPowerUsage(h) / 1000,
            "temperature_c": lambda: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU),
            "throttle_bits": lambda: (event_reasons or n.nvmlDeviceGetCurrentClocksThrottleReasons)(h),
            "driver": n.nvmlSystemGetDriverVersion,
        }
        out: dict[str, Any] = {}
        for name, read in fields.items():
            try:
                out[name] = read()
            except Exception as error:  # not supported on this board
                out.setdefault("not_readable", {})[name] = str(error)
        if "throttle_bits" in out:
            out["throttle_reasons"] = reasons(out["throttle_bits"])
        return out

    def _millijoules(self) -> int:
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)

    def idle(self, seconds: float = SECONDS) -> float:
        """Watts while nothing runs, kept as the baseline."""
        if self.nvml is not None:
            torch.cuda.synchronize(self.device)
            before, begin = self._millijoules(), time.perf_counter()
            time.sleep(seconds)
            self.idle_watts = (self._millijoules() - before) / 1000 / (time.perf_counter() - begin)
        return self.idle_watts

    def energy(
        self, run: Callable[[], object], seconds: float = SECONDS, prepare: Callable[[], object] = lambda: None
    ) -> Reading | None:
        """Energy of one call, from the counter over at least `seconds` of calls, less the idle power.

        The idle power is measured once, right after the first window of calls and as long. A baseline of the beginning
        is another one: an H200 draws 76 W before its first kernel and 121 W after a copy, and small loops add less than
        that difference.

        Args: prepare: called before every call; what the board burns in it beyond the idle power counts.
        """
        if self.nvml is None:
            return None
        prepare()
        run()
        torch.cuda.synchronize(self.device)
        before, begin, calls = self._millijoules(), time.perf_counter(), 0
        while (spent := time.perf_counter() - begin) < seconds:
            prepare()
            run()
            torch.cuda.synchronize(self.device)  # else the queue runs ahead of the clock
            calls += 1
        joules = (self._millijoules() - before) / 1000
        watts = joules / spent
        if not self.has_baseline:
            self.idle(seconds)
            self.has_baseline = True
        return Reading((joules - self.idle_watts * spent) / calls, watts, self.idle_watts, calls, spent)


def _handle(pynvml: Any, device: torch.device) -> Any:  # noqa: ANN401 - NVML's opaque handle
    """NVML's handle of torch's device: by UUID, since CUDA_VISIBLE_DEVICES renumbers torch's."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is not None:
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except Exception:  # MIG instances have UUIDs of another kind
            pass
    return pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
