"""The lessons run from top to bottom on NumPy; on all five tabs, their numbers compared, in `tox -e docs`."""

import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SLOW, pytest_ignore_collect
from packaging.version import Version

from kvattn import bench, cli, lesson, registry

DOCS = Path(__file__).parent.parent / "docs"
ROOT = DOCS.parent
LESSONS = sorted((DOCS / "lessons").glob("*.md"))
RATIO = {"backend": "numpy", "what": "kvattn numpy", "shape": "M", "kind": "full", "seconds": 0.5, "ratio": 0.91, "right": True}
RATIO |= {"spread": [0.905, 1.25], "error": 0.0}
MEMORY = {"backend": "numpy", "kind": "forward", "value": 1.5}


def test_there_are_lessons_for_five_frameworks():
    assert len(LESSONS) == 10
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
    assert "weekly = all, deep, torch-oldest, tensorflow-oldest, jax-oldest, py313" in tox
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    tools = {re.match(r"[\w-]+", each)[0] for which in ("dev", "test", "lint") for each in extras[which]}
    assert extras["dev"][0] == "kvattn[test,lint]"  # which tox installs too: tools are named once
    assert tools >= {"pytest", "ruff", "mypy", "tox", "pre-commit"}


def test_the_lowest_releases_that_are_claimed_are_those_that_tox_installs():
    """In the rooms of `oldest`, and the core's in that of MXNet."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    parts = ("torch", "tensorflow", "jax", "weights", "plot")
    claimed = dict(each.split(">=") for each in project["dependencies"] + [each for part in parts for each in extras[part]])
    installed = re.findall(
        r"^    (?:\S*mxnet|\S*oldest): ([\w-]+)==([\d.]+)$", (ROOT / "tox.ini").read_text(encoding="utf-8"), re.M
    )
    lowest = {name: min(Version(version) for each, version in installed if each == name) for name, _ in installed}
    assert lowest == {name: Version(version) for name, version in claimed.items()}


# ---- every command that README and CONTRIBUTING tell is run: here, or in the environment of tox.ini or the line of .ci/run
# that is named here, word for word or as an equal

PROGRAMS = r"(?:[A-Z_]+=\S+ )*(?:kvattn|pytest|tox|pre-commit|pip|python3?|ruff|mypy)(?: |$)"
RUN = {  # with what this stands for; on NumPy, as the command line has it
    "kvattn doctor": ["doctor"],
    "kvattn conform --html report.html": ["conform", "--html", "{tmp}/report.html", "--draws", "1"],
    "kvattn conform --draws 1000": ["conform", "--draws", "2"],
    "kvattn lesson run FILE --backend all": ["lesson", "run", "{tmp}/lesson.md", "--backend", "all"],
}
ELSEWHERE = {  # the file, and what stands there
    "python3 -m venv .venv": (".ci/run", "python3 -m venv .venv"),
    "pip install tox": (".ci/run", ".venv/bin/pip install --quiet tox tox-uv"),
    "tox run-parallel -p 2 -o --parallel-no-spinner": (".ci/run", ".venv/bin/tox run-parallel -p 2 -o --parallel-no-spinner"),
    "tox run-parallel -p 2": (".ci/run", ".venv/bin/tox run-parallel -p 2 "),
    "tox -e torch": ("tox.ini", "torch-!oldest: pytest"),
    "tox -m weekly": ("tox.ini", "    weekly = "),
    "pip install .": ("tox.ini", "package = wheel"),  # each environment has the wheel of the package, as this makes one
    "pip install '.[all]'": ("tox.ini", "all,deep: all"),
    "pip install '.[all]' -c constraints.txt": ("tox.ini", "PIP_CONSTRAINT = {tox_root}{/}constraints.txt"),
    "pip install --no-deps mxnet==1.9.1": ("tox.ini", "python -m pip install --quiet --no-deps mxnet==1.9.1"),
    "kvattn conform": ("tox.ini", "kvattn conform --backend numpy,torch,tensorflow,jax,mxnet"),
    "kvattn conform --backend yours": ("tests/test_howto.py", "add-a-backend"),
    "kvattn lesson site FOLDER -o OUT": ("tests/site/test_own_site.py", '"lesson", "site", "lessons", "-o", "out"'),
    "kvattn conform --text FILE": ("tests/test_cli.py", '"--text"'),
    "kvattn bench": ("tests/test_bench.py", '["bench", "--backend"'),
    "KVATTN_BACKEND=jax python script.py": ("tests/test_dispatch.py", 'setenv("KVATTN_BACKEND"'),
    "pytest --pyargs kvattn.conformance": ("tox.ini", "pytest --pyargs kvattn.conformance"),
    "pytest tests/test_mutants.py": (
        "tox.ini",
        "numpy: pytest {posargs:tests {[rooms]apart} ",
    ),  # which takes all files but a few
    "ruff check .": ("tox.ini", "ruff check ."),
    "ruff format .": ("tox.ini", "ruff format --check ."),
    "mypy": ("tox.ini", "\n    mypy\n"),
    # what is installed is what the environments install, part by part; the hooks call what `lint` calls
    "pip install -e '.[dev]'": ("tox.ini", "!lint: test"),
    "pre-commit install": (".pre-commit-config.yaml", "entry: ruff check --fix"),
}
COLLECTED = "pytest"  # the quick loop, which leaves out what takes long


def commands(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    told = [part for block in re.findall(r"```sh\n(.*?)```", text, re.S) for part in re.split(r" && |\n", block) if part]
    beside = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    told += [" ".join(part.split()) for part in beside if re.match(PROGRAMS, " ".join(part.split()))]
    return [part.removeprefix(".venv/bin/") for part in told]


def test_every_command_that_newcomers_and_contributors_are_told_is_run_somewhere():
    told = {command for page in ("README.md", "CONTRIBUTING.md") for command in commands(page)}
    assert told == {*RUN, *ELSEWHERE, COLLECTED}
    for command, (file, line) in ELSEWHERE.items():
        assert line in (ROOT / file).read_text(encoding="utf-8"), command


@pytest.mark.parametrize("command", RUN)
def test_a_command_that_newcomers_are_told_runs_on_numpy(command, tmp_path, capsys, monkeypatch):
    (tmp_path / "lesson.md").write_text("```{.python .input}\n%%tab numpy\nprint(1)\n```\n")
    flags = [part.format(tmp=tmp_path) for part in RUN[command]]
    if command not in ("kvattn doctor", "kvattn lesson run FILE --backend all"):
        flags += ["--backend", "numpy"]
    monkeypatch.setattr(registry, "available_backends", lambda: ("numpy",))
    assert cli.main(flags) == 0, capsys.readouterr()


def test_bare_pytest_takes_the_quick_tests_and_leaves_what_takes_long(monkeypatch):
    monkeypatch.delenv("KVATTN_CONFORMANCE", raising=False)
    tests = ROOT / "tests"
    left = {path.name for path in tests.iterdir() if pytest_ignore_collect(path, SimpleNamespace(args=[str(tests)]))}
    assert left == {"distributed", "integrations", "package", "site", *(f"test_{name}.py" for name in SLOW)}
    slow = tests / "test_mutants.py"
    assert pytest_ignore_collect(slow, SimpleNamespace(args=[str(slow)])) is None  # which was named
    monkeypatch.setenv("KVATTN_CONFORMANCE", "numpy")
    assert pytest_ignore_collect(slow, SimpleNamespace(args=[str(tests)])) is None


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda path: path.stem)
def test_the_command_line_takes_what_a_page_tells(page):
    """That the words are right; what needs a framework is run where it is."""
    for command in commands(page.relative_to(ROOT)):
        program, *words = shlex.split(command)
        if program == "kvattn" and words and "..." not in words:
            assert cli._parser().parse_args(words).command == words[0]


def test_the_code_of_the_lessons_fits_the_page():
    lines = [(path.name, line) for path in LESSONS for cell in lesson.read(path).cells for line in cell.code.splitlines()]
    assert [(name, line) for name, line in lines if len(line) > 88] == []


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_exercise_has_a_solution_that_is_folded(path):
    exercises, _, rest = path.read_text(encoding="utf-8").partition("\n## Exercises\n")[2].partition("\n## Solutions\n")
    solutions = rest.partition("\n## Sources\n")[0]
    asked = len(re.findall(r"^1\. ", exercises, re.MULTILINE))
    numbers = re.findall(r"^<details>\n<summary>(\d+)\. [^\n]+</summary>\n\n(?=\S)", solutions, re.MULTILINE)
    assert asked
    assert [int(number) for number in numbers] == [*range(1, asked + 1)]
    assert solutions.count("\n\n</details>\n") == asked


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_on_numpy(path, capsys):
    assert cli.main(["lesson", "run", str(path), "--backend", "numpy"]) == 0, capsys.readouterr().out


# ---- what was measured, as a part of a page


def module(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    spec.loader.exec_module(made := importlib.util.module_from_spec(spec))
    return made


@pytest.fixture(scope="module")
def measured():
    return module("measured")


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
    rows = [MEMORY | {"what": what, "n": n, "MiB": n * 2.0} for what in ("kvattn numpy", "naive") for n in (1024, 2048, 4096)]
    text = page(measured, tmp_path, rows, columns="n", value="MiB")
    assert "|  | 1024 | 2048 | 4096 |\n| --- | ---: | ---: | ---: |\n| kvattn numpy | 2048 | 4096 | 8192 |\n" in text
    assert (tmp_path / "pictures" / "cpu-forward.svg").is_file()
    assert "{image}" not in page(measured, tmp_path, rows[:2], columns="n", value="MiB")  # two points are no curve
    text = page(measured, tmp_path, [MEMORY | {"what": "numpy", "part": "tab", "us": 2.5}], columns="part", value="us")
    assert "|  | tab |\n| --- | ---: |\n| numpy | 2.5 |\n" in text
    assert "{image}" not in text


def test_options_stand_by_backend_beside_what_they_are_measured_over(measured, tmp_path):
    row = {"what": "sinks", "beside": "the plain call", "ratio": 1.03, "spread": [1.0, 1.25], "ms": 2.0}
    text = page(measured, tmp_path, [row | {"backend": name} for name in ("numpy", "torch")], columns="backend")
    ratio = "1.03<br><small>1.00–1.25</small>"
    assert f"|  | numpy | torch |\n| --- | ---: | ---: |\n| sinks, over the plain call | {ratio} | {ratio} |\n" in text
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


def test_a_page_begins_with_each_frameworks_ratios_to_its_own_call(measured, tmp_path):
    rows = [RATIO | {"shape": shape, "ratio": ratio} for shape, ratio in (("M", 0.5), ("L", 0.25), ("XL", 2.0), ("tiny", 3.0))]
    rows += [row | {"what": what, "ratio": by} for row in rows for what, by in (("naive", 1.0), ("slower", 4.0))]
    rows += [RATIO | {"backend": "jax", "what": "kvattn jax", "shape": "M"}]  # that has no other to compare with
    (tmp_path / "cpu.json").write_text(json.dumps({"rows": rows}))
    text = measured.summary(tmp_path / "cpu.json", tmp_path)
    assert "| numpy | 0.50 | 0.25 | 2.00 | 3.00 |\n" in text
    assert "jax" not in text
    assert (tmp_path / "cpu-summary.svg").read_text(encoding="utf-8").count("<svg") == 1


def test_the_first_picture_shows_the_documented_answer_beside_what_the_framework_gives(backend, tmp_path):
    agreement = module("agreement")
    ours, theirs = agreement.outputs(backend)
    query, key, value, mask = agreement.call()
    for i, row in enumerate(mask):  # a formula of its own: only the pairs that may attend
        weights = np.exp(key[row] @ query[i] / np.sqrt(6))
        expected = weights @ value[row] / weights.sum() if row.any() else np.zeros(6)
        np.testing.assert_allclose(ours[i], expected, rtol=0, atol=64 * np.finfo("float32").eps * np.abs(ours).max())
    assert np.isnan(theirs[:, 4:]).all()  # the padding's NaN
    assert not np.isnan(theirs[[0, 1, 3], :4]).any()
    assert agreement.draw([backend], tmp_path / "agreement.svg") == 0
    assert agreement.pixels([backend]) * 4 < agreement.pixels(agreement.NAMES) == 1000  # as high as that of all
    assert (tmp_path / "agreement.svg").read_text(encoding="utf-8").count("<svg") == 1


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
