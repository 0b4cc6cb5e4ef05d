"""The README's results are what the stored measurements say."""

from __future__ import annotations

import json
from pathlib import Path

from fastdiff_bench import report, tables


def test_readme_is_generated() -> None:
    assert report.main(["--check"]) == 0


CPU = {"cpu": "a cpu", "cores": 2, "python": "3", "torch": "2", "commit": "abc"}
GPU = {**CPU, "gpu": "a card"}


def store(path: Path, environment: dict[str, object], **data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment, "rows": [], **data}))


def row(times: dict[str, float], **more: object) -> dict[str, object]:
    return {
        "schedule": "scaled_linear_betas", "solver": "ddim", "shape": [1, 4, 64, 64], "dtype": "fp32", "skipped": {},
        "us": {name: {"median": v, "p10": v, "p90": v} for name, v in times.items()}, "bytes_per_element": 12.0,
        "steps_per_s": {name: 1e6 / v for name, v in times.items()}, "gb_s": 15.7, "of_copy": 0.5, "against": "torch",
        **more,
    }  # fmt: skip


def points(kernel: str, exponent: int, **us: float) -> list[dict[str, object]]:
    return [
        {"kernel": kernel, "dtype": "fp32", "elements": 1 << exponent, "column": column.replace("_", " "),
         "us": {"median": v}, "gb_s": 1.0, "bytes_per_element": 8}
        for column, v in us.items()
    ]  # fmt: skip


def test_times_that_miss_what_was_asked_are_marked(tmp_path: Path) -> None:
    times = {"torch": 40.0, "fastdiff eager": 25.0, "fastdiff step_graph": 8.004, "fastdiff loop_graph": 3.2}
    folder = tmp_path / "bench" / "results" / "card" / "2026-01-01"
    method = {"copy_gb_s": 4000.0, "device": "cuda"}
    store(folder / "throughput.json", GPU, method=method, rows=[row(times)])
    text = report.render(tmp_path)
    assert "| fp32 | 40 | 25 | 8 (missed) | 3.2 (missed) | 312500 | 12.5 |" in text
    assert "; asked: fastdiff eager <= 25, fastdiff step_graph <= 8, fastdiff loop_graph <= 3:" in text


def test_a_cpu_measured_beside_a_gpu_is_in_the_cpus_table(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results" / "card" / "2026-01-01"
    rows = [row({"torch": 40.0, "fastdiff eager": 26.0})]
    store(folder / "throughput.json", GPU, method={"copy_gb_s": 31.4, "device": "cpu"}, rows=rows)
    text = report.render(tmp_path)
    assert "us a step on a CPU" in text and "\na cpu, 2 cores; Python 3" in text and "GPU: not measured yet" in text
    assert "a card" not in text + report.page(folder) and "missed" not in text


def test_where_another_is_faster_is_said(tmp_path: Path) -> None:
    machine = tmp_path / "bench" / "results" / "machine"
    method = {"copy_gb_s": 31.4, "launch_floor_us": 1.0, "device": "cpu"}
    measured = {
        "2026-01-01/roofline": [
            *points("guide", 10, torch=1.0, fastdiff_eager=9.0),  # measured again later
            *points("posterior", 10, torch=7.0, torch_graph=5.0, fastdiff_eager=8.0, fastdiff_compiled=6.0),
            *points("posterior", 20, torch=7.0, fastdiff_eager=8.0, fastdiff_compiled=6.0),
        ],
        "2026-01-01/roofline-guide": [
            *points("guide", 10, torch=3.0, fastdiff_eager=2.0),
            *points("guide", 20, torch=30.0, torch_compile=20.0, fastdiff_eager=25.0),
            *points("guide", 18, fastdiff_eager=25.0),  # nobody to compare with
        ],
    }  # fmt: skip
    for name, found in measured.items():
        store(machine / f"{name}.json", CPU, method=method, roofline=found)
    store(machine / "2026-01-02" / "throughput.json", CPU, method=method)
    line = "Another is faster at 2 of [4 sizes of kernels](bench/results/machine); at the largest: guide fp32 2^20 "
    assert f"\n{line}25 us (torch compile 20).\n" in report.render(tmp_path)
    page = report.page(machine / "2026-01-01")
    assert "Another is faster at 1 of 2 sizes; at the largest:\n" in page  # of roofline-guide.json
    assert "| guide | fp32 | 2^20 | 25 | torch compile | 20 |" in page
    assert "Another is faster at 2 of 3 sizes; at the largest:\n" in page  # of roofline.json
    assert "| guide | fp32 | 2^10 | 9 | torch | 1 |" in page and "| posterior | fp32 | 2^20 | 6 | torch" not in page
    store(
        machine / "2026-01-03" / "roofline.json",
        CPU,
        method=method,
        roofline=points("guide", 20, torch=3.0, fastdiff_eager=2.0),
    )
    assert "faster at 1 of [3 sizes of kernels](bench/results/machine); at the largest: nowhere." in report.render(
        tmp_path
    )


def test_a_policy_networks_loop_is_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results" / "card" / "2026-01-01"
    method = {"copy_gb_s": 4000.0, "device": "cuda", "model": "unet1d"}
    loop = row({"torch.compile": 1200.0, "diffusers": 5000.0, "fastdiff loop_graph": 1000.0}, steps=100, nfe=100)
    store(folder / "throughput.json", GPU, method=method)
    store(folder / "loop-unet1d.json", GPU, method=method, rows=[loop])
    line = (
        "A policy network's loop (unet1d, ddim, 100 steps, 1x4x64x64, fp32) on a card, the model included: fastdiff "
        "loop_graph 100.00 ms; times faster than diffusers 5 (asked 4), than torch.compile 1.2 (missed) (asked 1.5)."
    )
    assert line in report.render(tmp_path) and line in report.page(folder)
    us = loop["us"]
    assert isinstance(us, dict) and us.pop("diffusers")
    store(folder / "loop-unet1d.json", GPU, method=method, rows=[loop])
    assert "times faster than diffusers not measured (asked 4), than torch.compile 1.2" in report.render(tmp_path)


def test_the_kernels_of_a_gpu_are_printed_beside_a_copy_and_plain_torch(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results" / "card" / "2026-01-03"
    folder.mkdir(parents=True)
    environment = {"gpu": "a card", "python": "3", "torch": "2", "commit": "abc"}
    store(folder / "throughput.json", environment, method={"copy_gb_s": 4000.0})
    large = {"elements": 1 << 26, "us": 200.0, "gb_s": 3600.0, "of_copy": 0.9}
    rows = [
        {"what": "copy", "elements": 1 << 26, "gb_s": 4000.0, "of_copy": 1.0},
        {"what": "step ddim float32", **large, "of_same_copy": 1.4},
        {"what": "step ddim float32", **large, "elements": 1 << 16},
        {"what": "categorical step K=2", **large, "throttled": True},
        {"what": "plain step K=2 torch.compile", "elements": 1 << 27, "us": 2560.0},
    ]
    (folder / "gpu.json").write_text(json.dumps({"environment": environment, "rows": rows}))
    assert "pipeline" not in report.render(tmp_path)
    loop = {"name": "Sampler, loop_graph", "ms": 62.5, "ratio": 8.0, "steps": 100, "batch": 1}
    store(folder / "loops.json", environment, rows=[loop])
    assert "| Sampler, loop_graph | 62.5 | 8.00 |\n\na card; Python 3" in report.page(folder)
    store(folder / "loops.json", environment, rows=[loop], skipped={"stock, reduce-overhead": "it differs"})
    assert "\n\nstock, reduce-overhead: it differs.\n" in report.page(folder)
    text = report.render(tmp_path)
    assert "on a card, DDPM over a small UNet, 100 steps, batch 1, the model included, ms: Sampler, loop_graph" in text
    assert "on a card: GB/s of the bytes they must move, beside a copy's 4000" in text
    assert "| step ddim float32 | 67108864 | 200.0 | 3600 | 90 % |  |  |" in text and "140 %" not in text
    assert "| categorical step K=2 | 67108864 | 200.0 | 3600 | 90 % (throttled) |  | 2560 |" in text
    assert "65536" not in text  # inside the cache
    assert "beside the categorical steps plain torch in fp32, Graves et al.'s algorithm 9:" in text
    rows[-1]["equal_work"] = True
    (folder / "gpu.json").write_text(json.dumps({"environment": environment, "rows": rows}))
    assert "plain torch's same row on the same bf16 buffers:" in report.render(tmp_path)


def test_a_schedules_options_are_shown() -> None:
    rows = [{"schedule": s, "solver": "euler", "shape": [1, 2], "dtype": "fp32"} for s in ("edm", "edm:sigma_max=20")]
    assert [tables.label(r)[0] for r in rows] == ["edm", "edm:sigma_max=20"]
    notes = tables.footnotes([{**rows[0], "us": {}, "skipped": {}}, {**rows[1], "us": {}, "skipped": {"torch": "why"}}])
    assert notes == ["torch: why (edm:sigma_max=20 euler)"]


def test_the_main_table_is_printed_with_what_was_lost_and_all_rows_beside_the_result(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results" / "machine" / "2026-01-02"
    folder.mkdir(parents=True)
    times = {"torch": 10.0, "diffusers": 40.0, "fastdiff eager": 20.0, "fastdiff compiled": 12.5}
    first = row(times, launches={"torch": 4.0, "fastdiff compiled": 0.1})
    rows = [first, {**first, "shape": [1, 16, 7]}, {**first, "solver": "lms"}]
    data = {"environment": CPU, "method": {"copy_gb_s": 31.4}, "rows": rows}
    (folder / "throughput.json").write_text(json.dumps(data))
    text = report.render(tmp_path)
    assert (
        text.count("| scaled_linear_betas | ddim | 1x4x64x64 | fp32 | 10 | 40 | 20 | 12.5 | 80000 | 0.8 (slower) |")
        == 1
    )
    assert "lms" not in text and "1x16x7" not in text  # all rows: on the page beside
    assert "copy 31.4 GB/s" in text and "bench/results/machine/2026-01-02/README.md" in text
    ((path, page),) = report.pages(tmp_path).items()
    assert path == folder / "README.md" and "| lms |" in page and "1x16x7" in page and "0.1 / 4" in page
    assert "[all 3 rows](" in text and "interrupted" not in text + page
    (folder / "throughput.json").write_text(json.dumps(data | {"complete": False}))
    assert "[interrupted: 3 rows](" in report.render(tmp_path) and "all 3 rows" not in report.render(tmp_path)
    assert "\ninterrupted: 3 rows.\n" in report.pages(tmp_path)[path]
    (folder / "throughput.json").write_text(json.dumps(data))
    # a roofline of the same day joins the page; a day that has nothing else has a page too
    point = {"kernel": "add_noise", "dtype": "bf16", "elements": 1024, "column": "fastdiff eager", "gb_s": 3.14,
             "us": {"median": 7.5}, "bytes_per_element": 4}  # fmt: skip
    floors = {"environment": CPU, "method": {"copy_gb_s": 31.4, "launch_floor_us": 0.75}, "rows": []}
    alone = folder.with_name("2026-01-04")
    alone.mkdir()
    for place in (folder, alone):
        (place / "roofline.json").write_text(json.dumps({**floors, "roofline": [point]}))
    (alone / "roofline.png").write_bytes(b"")
    both = report.pages(tmp_path)
    assert "interrupted" not in "".join(both.values())
    (alone / "roofline.json").write_text(json.dumps({**floors, "roofline": [point], "complete": False}))
    assert "\ninterrupted: 1 points.\n" in report.pages(tmp_path)[alone / "README.md"]
    line = "| add_noise | bf16 | 2^10 | 7.5 | 3.14 | 10 % |"
    assert line in both[folder / "README.md"] and "| lms |" in both[folder / "README.md"]
    assert line in both[alone / "README.md"] and "](roofline.png)" in both[alone / "README.md"]
    assert "](roofline.png)" not in both[folder / "README.md"] and "launch floor 0.75 us" in both[alone / "README.md"]
    # the GPU's stands beside the CPU's
    other = tmp_path / "bench" / "results" / "board" / "2026-01-03"
    other.mkdir(parents=True)
    gpu = {**data, "environment": {**CPU, "gpu": "a board"}}
    (other / "throughput.json").write_text(json.dumps(gpu))
    text = report.render(tmp_path)
    assert "on a CPU" in text and "on a GPU" in text and "a board; Python 3" in text and "not measured" not in text
