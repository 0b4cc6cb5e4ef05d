"""Runs kernels on the GPU where there is one, in Triton's interpreter elsewhere."""

import os
from collections.abc import Iterator
from contextlib import nullcontext, suppress

import pytest
import torch

from tests.kernel_runs import on_kernels

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel module is imported
    with suppress(ImportError):  # and when triton itself is: a test that sets it otherwise must not be the first
        import triton  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # else the threads of one worker wait for the cores that another one's have
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels-only", action="store_true", help="only what runs a kernel, not its references on a CPU")
    parser.addoption("--part", default="1/1", metavar="I/N", help="only every N-th of the tests, from the I-th on")


def _runs_a_kernel(item: pytest.Item) -> bool:
    params = getattr(item, "callspec", None)
    chosen = params is not None and any(isinstance(v, str) and v == "kernel" for v in params.params.values())
    return chosen or "gpu" in item.keywords or "kernel_device" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--kernels-only"):
        others = [item for item in items if not _runs_a_kernel(item)]
        items[:] = [item for item in items if _runs_a_kernel(item)]
        config.hook.pytest_deselected(items=others)
    part, parts = map(int, config.getoption("--part").split("/"))
    config.hook.pytest_deselected(items=[item for at, item in enumerate(items) if (at - part + 1) % parts])
    items[:] = items[part - 1 :: parts]
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(params=["ref", "kernel"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of a test that runs once on plain torch and once on the kernels (GPU, else interpreter)."""
    on_gpu = request.param == "kernel" and torch.cuda.is_available()
    with on_kernels() if request.param == "kernel" else nullcontext():
        yield torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture
def kernel_device() -> Iterator[torch.device]:
    """The device of a test that runs on the kernels only."""
    with on_kernels():
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def cpp_loops():
    """The CPU's C++ loops: skips where there is no compiler, fails where there is one and they do not build."""
    from fastdiff import native
    from fastdiff.doctor import _compiler

    if not (native.available() and native._library("step")):
        assert _compiler() is None, "the C++ loops do not build: see the warning"
        pytest.skip("no C++ compiler")


@pytest.fixture(params=["loop", "kernel", "eager"])
def device_of_loops(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """For operations that are C++ loops on a CPU: those, the kernels (GPU, else interpreter) and eager torch."""
    from fastdiff import ops

    if request.param == "loop":
        request.getfixturevalue("cpp_loops")
    on_gpu = request.param == "kernel" and torch.cuda.is_available()
    with on_kernels() if request.param == "kernel" else ops.cpu_compiler(request.param == "loop"):
        yield torch.device("cuda" if on_gpu else "cpu")
