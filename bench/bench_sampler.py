"""Whole loops by schedule: a model that does nothing, an MLP, a robot policy's U-Net, a small U-Net and DiT."""

import torch

from fastdiff_bench.cases import Case, make_cases
from fastdiff_bench.networks import NETWORKS, build
from fastdiff_bench.throughput import column_of

COLUMNS = ("torch", "torch.compile", "diffusers", "k-diffusion", "fastdiff eager", "fastdiff compiled",
           "fastdiff step_graph", "fastdiff loop_graph")  # fmt: skip
NULL = [c for c in make_cases(None, None, quick=True) if isinstance(c, Case)]
LOOPS = [("null", c) for c in NULL] + [(name, Case(n.schedule, n.solver, n.steps)) for name, n in NETWORKS.items()]


def test_sampler(timed, device, network, case, column):
    plan = case.plan()
    shape = case.state_shape(plan, NETWORKS[network].shape if network in NETWORKS else (1, 4, 64, 64))
    if plan.classes:
        shape = case.state_shape(plan, (8, 64))
    with torch.no_grad():
        if network == "null":
            out = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)

            def model(x, t):
                return out
        else:
            model = build(network, device)
        compiled = torch.compile(model, dynamic=False) if column == "torch.compile" and network != "null" else None
        found = column_of(column, case, plan, model, torch.float32, device, compiled)
        assert not isinstance(found, str), found
        x_T = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * plan.init_scale).to(device)

        def run():
            found.run(x_T, None)

        moved = float(plan.bytes_per_element().mean()) * x_T.numel()
        timed(run, group=f"{case.kind}: {network}, {case.solver}", units=plan.nfe, moved=moved,
              prepare=found.prepare)  # fmt: skip
