"""Drop-in loops of float64 samples: their coefficients are float64 too, and no draw is taken for another."""

from __future__ import annotations

import pytest
import torch

from fastdiff.integrations import k_diffusion as ours
from fastdiff_bench.peers import k_diffusion_sampling
from tests.accelerate_cases import ALL, accelerated, exact, far, loop, make, start

pytest.importorskip("diffusers")
theirs = k_diffusion_sampling()


NAMES = ["ddim-clip", "euler-eps", "dpmsolver++-3m", "unipc-3-bh2", "heun-clip", "lms", "plms"]


@pytest.mark.parametrize("name", NAMES)
def test_accelerated_steps(name):
    case = ALL[name]
    x = start(make(case)).double()
    mine = loop(accelerated(case), case, x)
    for got, want in zip(mine.x, exact(case, x, follow=mine).x, strict=True):
        assert got.dtype == torch.float64
        assert far(got, want) <= 1e-11


def denoiser(x, sigma):
    return torch.tanh(x / (1 + sigma.reshape(-1, 1, 1)))


@pytest.mark.parametrize("name", ["lms", "dpmpp_2m", "dpmpp_3m_sde"])
def test_levels_that_nearly_repeat(name):
    """Weights of 1 / h cancel: in float32 five digits are lost there."""
    sigmas = torch.tensor([9.0, 4.0, 1.12, 1.117, 0.9, 0.3, 0.0], dtype=torch.float64)
    x = 9 * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"eta": 0.0} if "sde" in name else {}
    want = getattr(theirs, f"sample_{name}")(denoiser, x, sigmas, disable=True, **options)
    got = ours.SAMPLERS[name](denoiser, x, sigmas, disable=True, **options)
    assert far(got, want) <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [0.5, 1.0])
def test_dpmpp_sde_of_draws_that_know_no_path(r, dtype):
    """At r = 1 both of its intervals are one: a tree repeats the draw, any other sampler draws again."""
    sigmas = torch.tensor([9.0, 4.0, 1.0, 0.3, 0.0], dtype=dtype)
    x = 9 * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    results = []
    for sample in (theirs.sample_dpmpp_sde, ours.sample_dpmpp_sde):
        source = torch.Generator().manual_seed(1)
        draw = lambda a, b, g=source: torch.randn(x.shape, generator=g, dtype=dtype)  # noqa: E731
        results.append(sample(denoiser, x, sigmas, disable=True, noise_sampler=draw, r=r))
    assert far(results[1], results[0]) <= {torch.float32: 2e-6, torch.float64: 1e-8}[dtype]
