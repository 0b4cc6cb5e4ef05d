"""fastdiff profile: where each microsecond of a step goes, and a trace to look at."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

import fastdiff as fd
from fastdiff.commands.options import add_plan_options, device, failed, make_plan, print_json, shape, writable
from fastdiff.names import load_model, solver_names
from fastdiff.request import MODES

__all__ = ["add_profile", "run_profile"]

NULL = "null"


def add_profile(commands: Any) -> None:  # noqa: ANN401 - argparse's own type is private
    """The parser of the command."""
    from fastdiff_bench.networks import NETWORKS

    about = "Profile one sampling run: a table of a step's time, counts, and a Chrome / Perfetto trace."
    profile = commands.add_parser("profile", help="where each microsecond of a step goes", description=about)
    models = f"a callable model(x, t) of yours, or one of {', '.join((NULL, *NETWORKS))}; default {NULL}"
    profile.add_argument("--model", default=NULL, metavar="FILE.py:NAME", help=models)
    profile.add_argument(
        "--solver", default="ddim", metavar="NAME", help=f"default %(default)s; {', '.join(solver_names())}"
    )
    add_plan_options(profile, required=False)
    profile.add_argument("--shape", type=shape, metavar="B,N,...", help="of the samples; default the network's")
    profile.add_argument("--mode", choices=MODES, default="eager", help="how to run; default %(default)s")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    profile.add_argument("--device", type=device, default=here, help="torch device; default %(default)s")
    profile.add_argument("--trace", metavar="FILE.json", help="write the trace here")
    profile.add_argument("--nvtx", action="store_true", help="mark the ranges for Nsight Systems too (CUDA)")
    profile.add_argument("--json", action="store_true", help="report as JSON on stdout")
    profile.set_defaults(run=run_profile)


def _model(
    name: str, plan: fd.Plan, size: tuple[int, ...] | None, on: torch.device
) -> tuple[Callable[..., Any], tuple[int, ...]]:
    """The model, and the shape it samples."""
    from fastdiff_bench.cases import input_shape, output_shape
    from fastdiff_bench.networks import NETWORKS, build

    if name in NETWORKS:
        return build(name, on), size or NETWORKS[name].shape
    size = size or (1, 4, 64, 64)
    if name == NULL:
        shape = output_shape(plan, input_shape(plan, size))
        out = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(on)
        return lambda x, t: out, size
    model = load_model(name)
    if isinstance(model, torch.nn.Module):
        model = model.to(on).eval()
    return model, size


def run_profile(args: argparse.Namespace) -> int:
    """fastdiff profile; whatever fails is one line and exit code 2."""
    from fastdiff_bench.profiling import profile_run, table

    try:
        plan = make_plan(args)
        model, size = _model(args.model, plan, args.shape, args.device)
        trace = writable("--trace", args.trace)
        with torch.no_grad():
            result = profile_run(model, plan, size, mode=args.mode, device=args.device, trace=trace, nvtx=args.nvtx)
    except (Exception, KeyboardInterrupt) as error:
        return failed("profile", error)
    print_json(result) if args.json else print(table(result))
    return 0
