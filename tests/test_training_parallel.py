"""Training on two processes: noise belongs to the sample, not to the rank."""

import os
import socket

import pytest
import torch

from fastdiff import ops
from fastdiff.schedules import Betas, linear_betas

CHAIN = Betas(linear_betas(1000))


def _rank(rank, port, queue):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(6, 6))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))[2 * rank : 2 * rank + 2]
    t, seeds = (torch.tensor([1, 300, 600, 999]) + 0)[2 * rank : 2 * rank + 2], torch.arange(4)[2 * rank : 2 * rank + 2]
    x_t = ops.add_noise(x, t, CHAIN, seeds=seeds)
    ops.denoising_loss(net(x_t), None, t, CHAIN, seeds).mean().backward()
    if rank == 0:
        queue.put(net.module.weight.grad.numpy())
        queue.close()
        queue.join_thread()
    os._exit(0)  # leaving the group politely may wait for its timeout


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one():
    """DistributedDataParallel over gloo: noise belongs to the sample, so two ranks of 2 are one batch of 4."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(r, port, queue)) for r in range(2)]
    for p in processes:
        p.start()
    got = torch.from_numpy(queue.get(timeout=120))
    for p in processes:
        p.join(60)
        p.kill()
    torch.manual_seed(0)
    net, x = torch.nn.Linear(6, 6), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([1, 300, 600, 999])
    x_t = ops.add_noise(x, t, CHAIN, seeds=torch.arange(4))
    ops.denoising_loss(net(x_t), None, t, CHAIN, torch.arange(4)).mean().backward()
    torch.testing.assert_close(got, net.weight.grad, rtol=1e-5, atol=1e-7)
