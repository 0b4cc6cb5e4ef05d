"""Classes by a race of groups: probabilities, independence, temperatures at the ends; kernel, C++ and torch alike."""

from __future__ import annotations

import math

import pytest
import torch

from tests.test_unmask_step import B, run, table


@pytest.fixture
def device(device_of_loops: torch.device) -> torch.device:
    return device_of_loops


@pytest.mark.parametrize("K", [4, 37])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_probabilities(temperature: float, K: int, device: torch.device) -> None:
    """A share b becomes classes, of softmax(m / s); a share 1 - A of the others is masked. Four standard deviations."""
    length, keep, b = 4000, 0.9, 0.3
    tokens = torch.full((B, length), K)
    tokens[:, : length // 2] = 1
    m = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.5]).repeat(8)[:K].expand(B, length, K)
    got = run(device, tokens, m, table((keep, b, 0, temperature)), torch.tensor([0]), mask=K)
    again, fresh = got[:, : length // 2], got[:, length // 2 :]
    n = again.numel()

    def near(share: float, p: float, of: int) -> bool:
        return abs(share - p) <= 4 * math.sqrt(p * (1 - p) / of)

    assert near(float((again == K).float().mean()), 1 - keep, n)
    assert set(again.unique().tolist()) == {1, K}
    chosen = fresh[fresh != K]
    assert near(chosen.numel() / n, b, n)
    for k, p in enumerate(torch.softmax(m[0, 0] / temperature, 0).tolist()):
        assert near(float((chosen == k).float().mean()), p, chosen.numel())


def test_neighbours_are_drawn_apart(device: torch.device) -> None:
    """How often two neighbouring tokens, or a token in two rows, are the same class: sum p^2. Four deviations."""
    K, length = 20, 4000
    m = torch.linspace(-1.5, 1.5, K).expand(B, length, K)
    rows = table((1.0, 1.0, 0, 1.0), (1.0, 1.0, 0, 1.0))
    one, two = (run(device, torch.full((B, length), K), m, rows, torch.tensor([i]), mask=K) for i in (0, 1))
    p = torch.softmax(m[0, 0].double(), 0)
    same = float((p**2).sum())
    spread = math.sqrt(float((p**3).sum()) - same**2)  # neighbours share a token
    for a, b in ((one[:, 1:], one[:, :-1]), (one[1:], one[:-1]), (one, two)):
        share, n = float((a == b).double().mean()), a.numel()
        assert abs(share - same) <= 4 * math.sqrt((same * (1 - same) + 2 * spread**2) / n)


@pytest.mark.parametrize("temperature", [1e-39, 1e-12, 1e30])
def test_temperatures_at_the_ends(temperature: float, device: torch.device) -> None:
    """Almost none takes the largest of logits that differ in the last digit; at the other end -inf still forbids."""
    K = 40
    m = torch.full((B, 64, K), 30.0)
    m[:, :, 17], m[:, :, 3] = torch.nextafter(torch.tensor(30.0), torch.tensor(31.0)), -math.inf
    got = run(device, torch.full((B, 64), K), m, table((1.0, 1.0, 0, temperature)), torch.tensor([0]), mask=K)
    if temperature < 1:
        assert (got == 17).all()
    else:
        assert len(got.unique()) > 30 and not bool(((got == 3) | (got == K)).any())
