"""--compare flags what is beyond 10 % and beyond both runs' intervals, and says what repeats."""

import json

import pytest

from fastdiff.cli import main
from fastdiff_bench import options
from fastdiff_bench.compare import compare, comparison_text

ENVIRONMENT = {"cpu": "a cpu", "commit": "abc"}


def result(*rows):
    return {"environment": ENVIRONMENT, "rows": [
        {"schedule": "vp", "solver": name, "shape": [1, 4], "dtype": "fp32", "steps": 5, "against": "torch",
         "us": {"fastdiff eager": {"median": 10.0, "p10": 8.0}, "torch": {"median": 20.0, "p10": quiet or 8.0 * m}},
         "times_faster": {"fastdiff eager": {"median": m, "p10": lo, "p90": hi}}}
        for name, m, lo, hi, quiet in ((*row, *[None] * (5 - len(row))) for row in rows)
    ]}  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "slower", "faster", "unstable"),
    [
        ((2.0, 1.95, 2.05), (1.72, 1.66, 1.78), 1, 0, 0),  # 14 % slower, apart
        ((2.0, 1.95, 2.05), (1.82, 1.80, 1.85), 0, 0, 0),  # 9 %
        ((2.0, 1.60, 2.40), (1.72, 1.66, 1.78), 0, 0, 0),  # within the first's interval
        ((2.0, 1.95, 2.05), (1.5, 1.40, 2.10), 0, 0, 1),  # within the second's: not a regression, but unstable
        ((2.0, 1.95, 2.05), (2.6, 2.50, 2.70), 0, 1, 1),
    ],
)
def test_flags(before, after, slower, faster, unstable):
    found = compare(result(("ddim", *before)), result(("ddim", *after)))
    assert (len(found["slower"]), len(found["faster"]), len(found["unstable"])) == (slower, faster, unstable)


def test_repeatability_is_the_median_change_and_the_share_within_15_percent():
    old = result(*((f"s{i}", 2.0, 1.9, 2.1) for i in range(4)))
    new = result(("s0", 2.0, 1.9, 2.1), ("s1", 2.04, 1.9, 2.1), ("s2", 1.92, 1.9, 2.1), ("s3", 3.0, 1.9, 3.1))
    found = compare(old, new)
    assert found["median_change"] == pytest.approx(0.03) and found["within"] == 0.75
    text = comparison_text(found)
    assert "median change 3.0 %, 75 % of them within 15 %" in text and "nothing is slower" in text
    assert "p10 of both sides): median change 3.0 %, 75 % of them within 15 %" in text
    assert "unstable" in text and "2.00 (1.90 to 2.10) times faster, now 3.00 (1.90 to 3.10)" in text


def test_rows_that_differ_in_size_or_peers_are_not_compared():
    old, new = result(("ddim", 2, 2, 2)), result(("ddim", 1, 1, 1))
    new["rows"][0]["shape"] = [1, 8]
    found = compare(old, new)
    assert found["columns"] == 0 and "no column in common" in comparison_text(found)
    both = ("ddim", 2, 2, 2), ("euler", 2, 2, 2)
    old, new = result(*both), result(*both)
    for row in new["rows"]:
        row["against"] = "torch, diffusers"
        row["us"]["diffusers"] = row["us"]["torch"]
    found = compare(old, new)
    assert found["columns"] == 0 and found["missing"] == []
    assert comparison_text(found).endswith("not compared:\n  2 rows: against torch, now torch, diffusers")


def test_what_is_gone_is_listed_and_not_slower():
    old, new = result(("ddim", 2, 2, 2), ("euler", 2, 2, 2), ("heun", 2, 2, 2)), result(("ddim", 2, 2, 2))
    new["rows"] += result(("euler", 2, 2, 2))["rows"]
    del new["rows"][1]["us"]["fastdiff eager"], new["rows"][1]["times_faster"]["fastdiff eager"]
    found = compare(old, new)
    assert found["columns"] == 1 and found["slower"] == []
    assert "not measured now:\n  vp heun 1x4 fp32\n  vp euler 1x4 fp32: fastdiff eager\n" in comparison_text(found)
    assert compare(new, old)["missing"] == []


def test_the_quiet_change_is_against_the_geometric_mean_of_the_others():
    old, new = (result(("ddim", m, m, m)) for m in (3.0, 6.0))
    for data, theirs in ((old, (4.0, 9.0)), (new, (16.0, 9.0))):  # means 6 and 12, against ours of 2
        row = data["rows"][0]
        row["against"] = "torch, diffusers"
        row["us"] = {"fastdiff eager": {"median": 2.5, "p10": 2.0}}
        row["us"] |= {n: {"median": 2 * v, "p10": v} for n, v in zip(("torch", "diffusers"), theirs, strict=True)}
    found = compare(old, new)
    assert found["quiet_median_change"] == pytest.approx(1.0)  # from 3 times faster to 6
    assert found["unstable"][0]["others_us"] == pytest.approx([12.0, 24.0])
    assert "+100 % (2.5 us, 2.5 us; the others 12.0 us, 24.0 us)" in comparison_text(found)


def test_a_stored_comparison_without_what_is_kept_now_still_reads():
    found = compare(result(("ddim", 2.0, 1.95, 2.05)), result(("ddim", 1.5, 1.45, 1.55)))
    line = "  vp ddim 1x4 fp32, fastdiff eager: 2.00 (1.95 to 2.05) times faster, now 1.50 (1.45 to 1.55): -25 % (10.0"
    assert f"{line} us, 10.0 us; the others 20.0 us, 20.0 us)" in comparison_text(found)
    del found["missing"], found["other_peers"], found["slower"][0]["others_us"]
    assert f"{line} us, 10.0 us)" in comparison_text(found)


def test_what_neighbours_add_is_not_in_the_quiet_change():
    old = result(("s0", 2.0, 1.9, 2.1, 16.0), ("s1", 2.0, 1.9, 2.1, 16.0))
    new = result(("s0", 3.0, 1.9, 3.1, 16.0), ("s1", 2.0, 1.9, 2.1, 16.16))  # the median moved, the quiet tenth did not
    found = compare(old, new)
    assert found["median_change"] == pytest.approx(0.25) and found["within"] == 0.5
    assert found["quiet_median_change"] == pytest.approx(0.005) and found["quiet_within"] == 1.0


ONE = result(("ddim", 2.0, 1.9, 2.1))
METHOD = {"model": options.NO_MODEL, "device": "cpu", "steps": 5}


@pytest.mark.parametrize(
    ("method", "more", "says"),
    [
        ({"model": "heavy.py:m"}, [], "is of model 'heavy.py:m', this run of 'returns a fixed tensor'"),
        ({}, ["--model", "mlp", "--solvers", "ddim"], "is of model 'returns a fixed tensor', this run of 'mlp'"),
        ({"device": "cuda:0"}, [], "is of device 'cuda', this run of 'cpu'"),
        ({"steps": 50}, [], "is of steps 50, this run of 5"),
        ({}, ["--roofline"], "--roofline does not read --steps, --compare: leave them out"),
        ({}, ["--codegen"], "--compare: leave them out"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_measured(method, more, says, tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(ONE | {"method": METHOD | method}))
    argv = ["bench", "--quick", "--device", "cpu", "--steps", "5", "--compare", str(path), *more]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and says in err


@pytest.mark.parametrize(
    ("data", "says"),
    [({"rows": []}, "is not a result of fastdiff bench"), (ONE, "is not a result"), ([], "is not a result"),
     (ONE | {"method": 3}, "is not a result"), (result() | {"method": METHOD}, "has no rows of the main table")],
)  # fmt: skip
def test_what_is_no_result_is_refused(data, says, tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data))
    assert main(["bench", "--quick", "--compare", str(path)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [{"shape": None}, {"us": None}, {"us": {"torch": 18.0, "fastdiff eager": 3}}, {"schedule": ["x"]},
     {"times_faster": {"fastdiff eager": 1.0}}],
    ids=str,
)  # fmt: skip
def test_a_damaged_result_is_refused_before_anything_is_measured(damage, tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(ONE | {"method": METHOD, "rows": [ONE["rows"][0] | damage]}))
    assert main(["bench", "--quick", "--device", "cpu", "--steps", "5", "--compare", str(path)]) == 2
    assert "is not a result of fastdiff bench" in capsys.readouterr().err
    path.write_text("[" * 100_000)
    assert main(["bench", "--quick", "--compare", str(path)]) == 2
    assert "is not JSON" in capsys.readouterr().err


def test_the_same_measurement_is_compared(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(ONE | {"method": METHOD}))
    argv = ["--device", "cpu", "--steps", "5", "--compare", str(path)]
    assert options.Request(options.parser().parse_args(argv)).stored["method"] == METHOD
