"""The lessons run from top to bottom on NumPy; on all five tabs, their numbers compared, in `tox -e docs`."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest

from kvattn import bench, cli, lesson

DOCS = Path(__file__).parent.parent / "docs"
LESSONS = sorted((DOCS / "lessons").glob("*.md"))
RATIO = {"backend": "numpy", "what": "kvattn numpy", "shape": "M", "kind": "full", "seconds": 0.5, "ratio": 0.91, "right": True}
RATIO |= {"spread": [0.905, 1.25], "error": 0.0}
MEMORY = {"backend": "numpy", "kind": "forward", "value": 1.5}


def test_there_are_lessons_for_five_frameworks():
    assert len(LESSONS) == 8
    for path in LESSONS:
        assert set(lesson.read(path).tabs) == {"numpy", "torch", "tensorflow", "jax", "mxnet"}, path.name


def test_what_contributors_are_told_of_is_there():
    root = DOCS.parent
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = re.findall(r"`((?:kvattn|tests|docs)/[\w./-]*|[\w-]+\.(?:md|ini))`", text) + re.findall(r"\]\((docs/[^)]+)\)", text)
    assert len(told) > 15
    assert [name for name in told if not (root / name).exists()] == []
    tox = (root / "tox.ini").read_text(encoding="utf-8")
    assert "torch" in tox.partition("env_list =")[2].partition("\n")[0]
    assert "weekly = oldest, deep" in tox
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    tools = {re.match(r"[\w-]+", each)[0] for each in extras["dev"]}
    assert tools >= {"pytest", "ruff", "mypy", "tox", "pre-commit"}


def test_the_code_of_the_lessons_fits_the_page():
    lines = [(path.name, line) for path in LESSONS for cell in lesson.read(path).cells for line in cell.code.splitlines()]
    assert [(name, line) for name, line in lines if len(line) > 88] == []


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_on_numpy(path, capsys):
    assert cli.main(["lesson", "run", str(path), "--backend", "numpy"]) == 0, capsys.readouterr().out


# ---- what was measured, as a part of a page


@pytest.fixture(scope="module")
def measured():
    spec = importlib.util.spec_from_file_location("measured", DOCS / "measured.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def page(measured, folder, rows, **options):
    (folder / "cpu.json").write_text(json.dumps({"kvattn": "0.1.0", "cores": 2, "rows": rows}))
    return measured.myst(folder / "cpu.json", folder / "pictures", **options)


def test_ratios_stand_in_a_table_for_each_kind_with_their_quartiles_and_are_drawn(measured, tmp_path):
    rows = [RATIO, RATIO | {"shape": "L", "ratio": 1.5}, RATIO | {"what": "naive"}, RATIO | {"kind": "causal", "ratio": 0.5}]
    text = page(measured, tmp_path, rows)
    full, causal = text.split("**Causal", 1)
    assert full.startswith("**All keys**\n\n|  | M | L |\n| --- | ---: | ---: |\n")
    small = "<br><small>0.91–1.25</small>"
    assert f"| kvattn numpy | 0.91{small} | 1.50{small} |\n| naive | 0.91{small} |  |\n" in full
    assert f"| kvattn numpy | 0.50{small} |\n" in causal
    assert text.endswith("*Measured with kvattn 0.1.0, cores 2.*\n")
    drawn = [Path(name) for name in re.findall(r"{image} (.*)", text)]
    assert [path.name for path in drawn] == ["cpu-full.svg", "cpu-causal.svg"]
    assert all(path.read_text(encoding="utf-8").count("<svg") == 1 for path in drawn)


def test_losses_failures_and_what_has_no_ratio_are_told(measured, tmp_path):
    rows = [RATIO | {"right": False, "error": 0.5}, RATIO | {"what": "alone", "ratio": None}]
    rows.append({"backend": "jax", "failed": "no GPU"})
    text = page(measured, tmp_path, rows)
    assert "| kvattn numpy | wrong by 0.5 |\n| alone | 500 ms |\n" in text
    assert "jax failed: `no GPU`" in text
    assert "{image}" not in text


def test_other_values_stand_by_any_column_and_are_drawn_where_it_is_a_number(measured, tmp_path):
    rows = [MEMORY | {"what": what, "n": n, "MiB": n * 2.0} for what in ("kvattn numpy", "naive") for n in (1024, 4096)]
    text = page(measured, tmp_path, rows, columns="n", value="MiB")
    assert "|  | 1024 | 4096 |\n| --- | ---: | ---: |\n| kvattn numpy | 2048 | 8192 |\n" in text
    assert (tmp_path / "pictures" / "cpu-forward.svg").is_file()
    text = page(measured, tmp_path, [MEMORY | {"what": "numpy", "part": "tab", "us": 2.5}], columns="part", value="us")
    assert "|  | tab |\n| --- | ---: |\n| numpy | 2.5 |\n" in text
    assert "{image}" not in text


def test_the_files_of_curves_and_overhead_are_read(measured, tmp_path):
    rows = [{"backend": "jax", "kind": "window", "n": n, "grad": False, "seconds": 0.25, "MiB": 0.0} for n in (1024, 4096)]
    text = page(measured, tmp_path, rows, columns="n", value="MiB")
    assert "**A window (`window`): 256 keys to each side; 32 in the curves below**\n\n|  | 1024 | 4096 |\n" in text
    assert "| kvattn jax | 0 | 0 |\n" in text
    calls = {"torch": {"native plain": [4.0, 3.0], "api plain": [5.5, 5.0], "dispatch": [0.5, 0.25]}}
    (tmp_path / "overhead.json").write_text(json.dumps({"calls": calls, "import": 12.34}))
    text = measured.myst(tmp_path / "overhead.json", tmp_path, columns="part", value="us")
    assert "**No options**\n\n|  | native | api |\n| --- | ---: | ---: |\n| kvattn torch | 4 | 5.5 |\n" in text
    assert "|  | dispatch |\n| --- | ---: |\n| kvattn torch | 0.5 |\n" in text
    assert text.endswith("`import kvattn` takes 12.3 ms, NumPy's own import not counted.\n")


def test_the_rows_of_a_gpu_name_what_they_are_measured_against_and_what_there_was_no_time_for(measured, tmp_path):
    row = {"framework": "torch", "shape": "BERT", "kind": "lengths", "dtype": "bfloat16", "grad": False, "ms": 0.1234}
    row |= {"best": "SDPA cudnn", "ratio": 0.85, "spread": [0.8, 0.9], "error": 1e-3, "right": True}
    rows = [row, row | {"grad": True, "best": None, "ratio": None}, row | {"framework": "jax", "right": False, "error": 0.5}]
    rows.append({name: row[name] for name in ("framework", "shape", "dtype", "grad")} | {"kind": "mask", "late": True})
    (tmp_path / "gpu.json").write_text(json.dumps({"device": "Card 3000", "torch": "2.11", "rows": rows}))
    text = measured.myst(tmp_path / "gpu.json", tmp_path)
    torch, jax = text.split("**JAX**")
    assert torch.startswith("**PyTorch**\n\n|  | forward | forward + backward |\n")
    cells = "0.85<br><small>0.123 ms; SDPA cudnn</small> | <small>0.123 ms; no native way</small>"
    assert f"| BERT: lengths, bfloat16 | {cells} |\n" in torch
    assert "| BERT: lengths, bfloat16 | wrong by 0.5 |\n" in jax
    assert "Not measured in PyTorch, for want of time: BERT: mask, bfloat16.\n" in jax
    assert text.endswith("*Measured with device Card 3000, torch 2.11.*\n")
    assert "{image}" not in text


def test_what_is_not_measured_is_said(measured, tmp_path):
    assert measured.myst(tmp_path / "memory.json", tmp_path) == "Not measured yet.\n"


@pytest.mark.parametrize("path", sorted((DOCS / "reference" / "speed").glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_measurement_is_one(measured, path, tmp_path):
    document = json.loads(path.read_text(encoding="utf-8"))
    assert {"date"} | ({"device"} if path.stem == "gpu" else {"processor", "cores", "numpy"}) <= document.keys()
    assert document.get("rows") or document["calls"]
    rows = document.get("rows", [])
    assert path.stem == "gpu" or {row["shape"] for row in rows if "shape" in row} <= set(bench.SHAPES)
    assert all(row.get("right", True) for row in rows)
