"""The kernels without a file of their own: classes' noise and loss, guidance, thresholding, KL, the readout of bins."""

import pytest
import torch

from fastdiff_bench import kernels_categorical, kernels_samples
from fastdiff_bench.kernels import MAKERS

COLUMNS = ("torch", "torch.compile", "fastdiff eager", "fastdiff compiled")
NAMES = [n for n in (*kernels_categorical.__all__, *kernels_samples.__all__) if n != "categorical_step"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kernel(kernel, name):
    kernel(MAKERS[name], "any")
