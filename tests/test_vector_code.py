"""The CPU's loops over a block are vector code, on machines with masks (AVX-512) and without (AVX2)."""

import os
import platform
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._inductor import config

from fastdiff import native

LOOP = re.compile(r"for \(int i = 0; i < (\w+\.)?(count|n); i\+\+\)")
ORDERED = "all += error[i]"  # a sum in fp64, in order
UNUSED = dict.fromkeys(("binned", "unmask"), "static_cast<T>(c * from[i])")  # what a file includes and does not call
FILES = ("binned", "categorical", "gaussian_kl", "guide", "noise", "step", "threshold", "unmask")


@pytest.mark.compiled
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other machines' compilers are not asked")
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None or "clang" in os.environ.get("CXX", ""),
    reason="g++ tells which loops it made vector code of",
)
def test_every_loop_over_a_block(tmp_path, monkeypatch):
    """A condition that becomes a branch leaves a loop scalar where there are no masks."""

    def missed(name):
        source, report = native.source(name), tmp_path / name
        native.compiled(source, "-march=x86-64-v3", f"-fopt-info-vec-optimized={report}")
        made = {int(line) for line in re.findall(r":(\d+):\d+: optimized: loop vectorized", report.read_text())}
        assert made
        loops = {at: line for at, line in enumerate(source.splitlines(), 1) if LOOP.search(line)}
        left = [line for at, line in loops.items() if not {at, at + 1} & made]
        return [line for line in left if ORDERED not in line and UNUSED.get(name, "\n") not in line]

    with config.patch({"cpp.simdlen": 256}), ThreadPoolExecutor(2) as pool:
        assert native.build() == list(FILES)
        found = dict(zip(FILES, pool.map(missed, FILES), strict=True))
    assert not any(found.values()), found
