"""The benchmark command: that it times what is right, says what is not, and writes what it is told to. No times are judged."""

import io
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import chosen
from rich.console import Console

from kvattn import bench, cli, peers, registry, timing
from kvattn.peers import Problem


def measured(*extra, path, names=None):
    backends, few = ",".join(names or chosen()), ["--shapes", "tiny", "--quick", "--rounds", "2"]
    status = cli.main(["bench", "--backend", backends, *few, "--json", str(path), *extra])
    return status, json.loads(path.read_text())["rows"]


def test_every_backend_is_timed_and_right(tmp_path, capsys):
    """Those that compile programs in one kind of call: all of their calls are made in a test below."""
    flags, rows = ("--causal", "--valid", "--window", "--mask", "--bias", "--per-query"), []
    compiling = [name for name in chosen() if name in ("tensorflow", "jax")]
    for names, kinds, asked in (
        (compiling, ["full"], ()),
        ([name for name in chosen() if name not in compiling], bench.KINDS, flags),
    ):
        plot = ("--plot", str(tmp_path / "b.png")) if asked else ()
        status, found = measured(*asked, *plot, path=tmp_path / "b.json", names=names) if names else (0, [])
        assert status == 0
        assert {(row["what"], row["kind"]) for row in found} >= {(f"kvattn {name}", kind) for name in names for kind in kinds}
        rows += found
    assert all(row["right"] and row["seconds"] > 0 for row in rows)
    assert {row["device"] for row in rows} == {json.loads((tmp_path / "b.json").read_text())["device"]} == {"cpu"}
    assert (tmp_path / "b.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "kvattn numpy" in said
    assert "on cpu: time" in said  # and over what, where PyTorch is


@pytest.mark.parametrize("device", ["tpuu", "cuda:99"])
def test_a_device_that_is_not_there_is_an_error_that_says_what_is(device, capsys, monkeypatch, tmp_path):
    """Also where no backend is named: with PyTorch's kernel on the CPU beside it nothing would be measured that was asked."""
    flags = ["--device", device, "--shapes", "tiny", "--rounds", "1", "--json", str(tmp_path / "b.json")]
    for name in chosen() if device == "cuda:99" else chosen()[:1]:
        assert cli.main(["bench", "--backend", name, *flags]) == 2
        said = capsys.readouterr()
        assert f"backend '{name}' has no device '{device}' here; it has cpu" in said.err
        assert said.out == ""
    monkeypatch.setattr(registry, "available_backends", lambda: ("numpy",))
    assert cli.main(["bench", *flags]) == 2
    assert not (tmp_path / "b.json").exists()


def test_who_has_no_such_device_is_named_and_the_others_are_measured_on_theirs(capsys, monkeypatch, tmp_path):
    row = {"backend": "numpy", "what": "kvattn numpy", "shape": "S", "kind": "full", "device": "Card 3000"}
    row |= {"ratio": 1.0, "seconds": 1.0, "spread": [1, 1], "error": 0.0, "right": True}
    asked = []
    monkeypatch.setattr(registry, "available_backends", lambda: ("numpy", "torch"))
    monkeypatch.setattr(bench, "lacking", lambda names, device: {"torch": "backend 'torch' has no device 'card' here"})
    monkeypatch.setattr(bench, "run", lambda names, settings, _: asked.append((names, settings.device)) or [row])
    assert cli.main(["bench", "--device", "card", "--json", str(tmp_path / "b.json")]) == 0
    assert asked == [(["numpy"], "card")]
    said = capsys.readouterr().out
    assert "Not asked: backend 'torch' has no device 'card' here" in said
    assert "on Card 3000: time /" in said
    assert json.loads((tmp_path / "b.json").read_text())["device"] == "Card 3000"


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("layer", [False, True], ids=["attention", "layers"])
def test_kvattns_calls_and_those_of_the_framework_give_the_same_with_each_option(layer, grad):
    for backend, kind in itertools.product(chosen(), bench.OF_LAYERS if layer else bench.KINDS):
        problem = bench.problem("tiny", kind, grad=grad, layer=layer)
        calls = dict((peers.LAYERS if layer else peers.ATTENTION)[backend](problem))
        assert next(iter(calls)) == f"kvattn {backend}"
        assert len(calls) > 1 or (backend, kind) == ("torch", "full")  # where the yardstick is the framework's own
        for what, call in calls.items():
            assert bench._error(call(), problem) < 1e-5, (backend, what, kind)


def test_layers_in_training_are_timed_and_right_and_compared_with_the_frameworks_own(tmp_path, capsys):
    few = [name for name in chosen() if name not in ("tensorflow", "jax")]  # whose calls the test above makes
    status, rows = measured("--layers", "--valid", "--grad", path=tmp_path / "b.json", names=few)
    assert status == 0, rows
    assert all(row["right"] and row["layer"] for row in rows), rows
    ours = {(row["what"], row["kind"]): row["own"] for row in rows if row["what"].startswith("kvattn")}
    assert {*ours} == {(f"kvattn {name}", kind) for name in few for kind in ("full", "valid")}
    for own in ours.values():
        assert [figures["ratio"] > 0 for figures in own.values()] in ([True], [])
    said = capsys.readouterr().out
    assert "kvattn numpy / NumPy, naive" in said
    assert "torch MHA, all to all" in said or "torch" not in chosen()


def test_numpys_layer_by_hand_computes_what_a_step_in_training_does_and_nothing_twice(monkeypatch):
    """The output, for the loss; the gradients by the input and by all four matrices; the weights once."""
    from kvattn import numpy as kv

    given = bench.problem("tiny", "causal", "float64", grad=True, layer=True)
    x, back = given.cast(lambda x, dtype: x.astype(dtype))[0]
    matrices, made = [W.astype(float) for W in given.matrices], []
    weights = peers.naive_weights
    monkeypatch.setattr(peers, "naive_weights", lambda *args, **how: made.append(1) or weights(*args, **how))
    how = {"matrices": matrices, "heads": given.heads, "allowed": given.allowed()}
    found = peers.naive_layer(x, back, **how)
    layer = peers.weighted(kv.MultiHeadAttention(x.shape[-1], given.heads), given._replace(matrices=tuple(matrices)))
    output = layer(x, x, x, training=True, causal=True)
    by_input = sum(layer.backward(back))
    expected = [by_input, *(layer.grads[name] for name in ("W_q", "W_k", "W_v", "W_o")), output]
    assert len(made) == 1
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-12)
    np.testing.assert_array_equal(peers.naive_layer(x, **how), found[-1])


def test_a_wrong_answer_of_a_layer_is_told_from_a_right_one():
    for grad in (False, True):
        problem = bench.problem("tiny", "full", "float64", grad, layer=True)
        answer = dict(peers.LAYERS["numpy"](problem))["kvattn numpy"]()
        assert bench._error(answer, problem) < 1e-12
        assert bench._error(answer * 1.01, problem) > 1e-3
        assert bench._error(answer, bench.problem("tiny", "valid", "float64", grad, layer=True)) > 1e-3


def test_a_wrong_answer_is_told_from_a_right_one():
    arrays = [np.random.default_rng(0).standard_normal((1, 1, 8, 8)) for _ in range(4)]
    problem = Problem(arrays[:3], {}, "float64")
    answer = dict(peers.ATTENTION["numpy"](problem))["kvattn numpy"]()
    assert bench._error(answer, problem) < 1e-12
    assert bench._error(answer * 1.01, problem) > 1e-3
    other = {"mask": np.arange(8) < 5, "bias": np.ones((1, 1, 8, 8)) * np.arange(8), "valid_lens": np.arange(1, 9)[None]}
    for name, option in {"causal": True, "window": 2, **other}.items():
        assert bench._error(answer, problem._replace(options={name: option})) > 1e-3, name


@pytest.mark.skipif("torch" not in chosen(), reason="this run is without PyTorch")
@pytest.mark.parametrize("grad", [False, True])
def test_pytorch_is_given_a_mask_and_a_bias_as_one_and_as_two(grad):
    draw = np.random.default_rng(0)
    options = {"mask": draw.random((1, 1, 8, 8)) < 0.6, "bias": draw.standard_normal((1, 1, 8, 8))}
    problem = Problem([draw.standard_normal((1, 1, 8, 8)) for _ in range(3 + grad)], options, "float64", grad)
    calls = dict(peers.ATTENTION["torch"](problem))
    assert [*calls] == ["kvattn torch", "torch SDPA, masked", "torch SDPA, masked in each call"]
    for name, call in calls.items():
        assert bench._error(call(), problem) < 1e-12, name


def test_the_yardstick_is_given_its_threads_after_the_backend_is_loaded(monkeypatch):
    """Importing MXNet takes half of them away."""
    made = []

    def maker(name):
        return lambda problem: made.append(name) or {name: lambda: np.zeros((1, 1, 8, 8))}

    monkeypatch.setattr(bench, "_yardstick", lambda device: True)
    monkeypatch.setattr(peers, "sdpa", lambda problem: maker("torch SDPA")(problem)["torch SDPA"])
    monkeypatch.setitem(peers.ATTENTION, "numpy", maker("kvattn numpy"))
    rows = list(bench._measure("numpy", bench.problem("tiny", "full"), 1))
    assert made == ["kvattn numpy", "torch SDPA"]
    assert [row["what"] for row in rows] == ["kvattn numpy"]


def test_a_wrong_row_makes_the_command_fail(monkeypatch, capsys):
    row = {
        "backend": "numpy",
        "what": "kvattn numpy",
        "shape": "S",
        "kind": "full",
        "ratio": 1.0,
        "seconds": 1.0,
        "spread": [1, 1],
    }
    monkeypatch.setattr(bench, "run", lambda *args, **options: [{**row, "error": 0.5, "right": False}])
    assert cli.main(["bench", "--backend", "numpy"]) == 1
    assert "WRONG by 0.5" in capsys.readouterr().out


def test_a_backend_whose_process_fails_is_told(monkeypatch, capsys):
    monkeypatch.setattr(bench, "run", lambda *args, **options: [{"backend": "numpy", "failed": "ImportError: no"}])
    assert cli.main(["bench", "--backend", "numpy"]) == 1
    assert "numpy failed: ImportError: no" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--shapes", "Q"], "unknown shape 'Q'"),
        (["--rounds", "0"], "at least 1"),
        (["--layers", "--mask"], "--layers goes with --causal and --valid, not --mask"),
        (["--layers", "--shapes", "D"], "--layers is self-attention, and has no shape D"),
    ],
)
def test_a_wrong_command_is_refused(extra, message, capsys):
    assert cli.main(["bench", "--backend", "numpy", *extra]) == 2
    assert message in capsys.readouterr().err


def test_what_is_timed_follows_calls_of_its_own_and_is_their_median(monkeypatch):
    clock, took, first = 0.0, [], 40

    def call():  # slow at first, and now and then
        nonlocal clock
        took.append(0.01 if len(took) < first or len(took) % 3 == 0 else 0.004)
        clock += took[-1]

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    first = round(timing.WARM / 0.01)
    assert timing.looped(call) == pytest.approx(0.004)
    assert sum(took[:first]) == pytest.approx(timing.WARM)
    assert sum(took[first:-1]) < timing.TIMED <= sum(took[first:])
    clock, took, first = 0.0, [], 10**6  # one call takes longer than all that
    monkeypatch.setattr(timing, "WARM", 0.001)
    monkeypatch.setattr(timing, "TIMED", 0.001)
    assert timing.looped(call) == pytest.approx(0.01)
    assert len(took) == 2


def test_tables_hold_every_name_and_figure_however_many_shapes_and_however_narrow_the_console():
    row = {"what": "kvattn tensorflow", "kind": "causal", "right": True, "spread": [14.256, 160.4], "error": 0.0}
    rows = [row | {"shape": shape, "ratio": 9 + number / 8} for number, shape in enumerate(bench.SHAPES)]
    for width in (60, 80, 200):
        console = Console(width=width, file=io.StringIO())
        console.print(*bench.tables(rows, width))
        printed = console.file.getvalue()
        said = printed.split()
        assert said.count("causal") == printed.count("kvattn tensorflow") == {60: 3, 80: 2, 200: 1}[width]
        assert [x for x in said if x in bench.SHAPES] == [*bench.SHAPES]
        assert [x for x in said if x[0] in "19" and "." in x and "-" not in x] == [
            "9.00",
            "9.12",
            "9.25",
            "9.38",
            "9.50",
            "9.62",
        ]
        assert said.count("14.3-160") == len(rows)


def test_without_pytorch_the_table_is_headed_by_time_alone():
    row = {
        "backend": "numpy",
        "what": "kvattn numpy",
        "shape": "S",
        "kind": "full",
        "seconds": 0.1,
        "right": True,
        "error": 0.0,
    }
    rows = [row | {"spread": [0.1, 0.1], "ratio": None}]
    assert "SDPA" not in bench.tables(rows, 80)[0].title
    assert bench.tables([*rows, rows[0] | {"ratio": 1.0}], 80)[0].title.startswith("on cpu: time / torch SDPA")


# ---- the harness, and the scripts of benchmarks/ that use it


def test_who_comes_first_in_a_round_is_the_last_in_the_next():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    took = timing.rounds(calls, 4, timing.queued(1))
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in took.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_queue_is_timed_as_a_whole_and_what_goes_before_it_is_not():
    made, asked = [], []

    def clock(call, count):
        asked.append((len(made), count))
        return 10.0

    assert timing.queued(5, clock, before=2)(lambda: made.append(1)) == 2.0
    assert asked == [(2, 5)]


def test_a_ratio_is_taken_within_a_round():
    found = timing.ratio([1.0, 40.0, 3.0], [2.0, 80.0, 3.0])
    assert found == {"ratio": 0.5, "spread": [0.5, 0.75]}


def test_a_process_tells_its_rows_however_much_it_complains_and_what_it_said_if_it_fails():
    loud = "import json, sys; print('no row'); sys.stderr.write('w' * 10**6); print(json.dumps({'a': 1}))"
    assert list(timing.in_a_process(["-c", loud])) == [{"a": 1}]
    *rows, failed = timing.in_a_process(["-c", "print('{}'); raise ValueError('bad luck')"])
    assert rows == [{}]
    assert failed["failed"] == "ValueError: bad luck"
    assert failed["words"].startswith("Traceback")
    assert list(timing.in_a_process(["-c", "import sys; sys.exit(3)"])) == [{"failed": "exit status 3", "words": ""}]


def script(name, *flags):
    path = Path(__file__).parents[1] / "benchmarks" / name
    done = subprocess.run([sys.executable, path, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_curves_are_measured_and_written_as_the_page_of_speed_reads_them(tmp_path):
    flags = ["--kind", "full,window", "--sizes", "64,128", "--json", tmp_path / "c.json", "--plot", tmp_path / "c.png"]
    assert "n = 128" in script("curves.py", *flags)
    document = json.loads((tmp_path / "c.json").read_text())
    assert {(row["backend"], row["kind"], row["n"]) for row in document["rows"]} == {
        ("numpy", kind, n) for kind in ("full", "window") for n in (64, 128)
    }
    assert all(row["ms"] > 0 and row["MiB"] >= 0 and row["inputs MiB"] > 0 for row in document["rows"])
    assert document["processor"]
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_the_overhead_is_measured_and_written_as_the_page_of_speed_reads_it(tmp_path):
    said = script("overhead.py", "--backend", "numpy", "--rounds", "4", "--json", tmp_path / "o.json")
    assert "import kvattn, after NumPy" in said
    document = json.loads((tmp_path / "o.json").read_text())
    assert {"native plain", "tab causal", "api valid_lens", "checks"} <= document["calls"]["numpy"].keys()
    assert all(smallest <= median for median, smallest in document["calls"]["numpy"].values())
    assert document["import"] > 0
    assert document["processor"]


def test_an_import_is_timed_with_the_bytecode_that_users_have(monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    asked = []
    monkeypatch.setattr(timing, "in_a_process", lambda command: asked.append({**os.environ}) or [{"took": len(asked)}])
    importing = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "overhead.py"))["importing"]
    assert importing("kvattn") == 4000
    assert not any("PYTHONDONTWRITEBYTECODE" in each for each in asked)


def test_rotary_is_measured_beside_the_formula(tmp_path):
    said = script("rotary.py", "--backend", "numpy", "--rounds", "1", "--json", tmp_path / "r.json")
    assert "of the formula" in said
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["halves, at once", "interleaved, at once"]
    assert all(row["ratio"] > 0 and row["ms"] > 0 for row in rows)


def test_functions_of_positions_are_measured_beside_the_calls_they_stand_for(tmp_path):
    said = script("pairs.py", "--backend", "numpy", "--rounds", "1", "--small", "--json", tmp_path / "p.json")
    assert "of the whole call" in said
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert {row["beside"] for row in rows} == {
        "the whole call", "causal=", "window=", "the plain call", "the plain call's", "its array", "the same call",
    }  # fmt: skip
    assert all(row["ratio"] > 0 and row["ms"] > 0 for row in rows)


def test_a_backends_rows_of_the_page_join_those_of_others_measured_alike(tmp_path):
    add = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "page.py"))["add"]
    code = "import json, sys; about, name, _, path = sys.argv[1:]; rows = [{'backend': name}]; "
    code += "json.dump({'date': about, 'rows': rows}, open(path, 'w'))"
    for day, backend, expected in (
        ("1", "a", "a"), ("1", "b", "ab"), ("1", "a", "ba"), ("2", "b", "b"),  # figures of two days are not mixed
    ):  # fmt: skip
        add(tmp_path / "part.json", backend, [sys.executable, "-c", code, day, backend], 60)
        found = json.loads((tmp_path / "part.json").read_text())
        assert "".join(row["backend"] for row in found["rows"]) == expected
        assert found["date"] == day


def test_the_parts_of_the_page_are_measured_as_far_as_there_is_time(tmp_path):
    flags = ["--only", "rotary", "--backend", "numpy", "--folder", tmp_path]
    assert "rotary.json" in script("page.py", *flags)
    assert json.loads((tmp_path / "rotary.json").read_text())["rows"]
    path = Path(__file__).parents[1] / "benchmarks" / "page.py"
    late = subprocess.run([sys.executable, path, *flags, "--within", "0"], capture_output=True, text=True, check=False)
    assert late.returncode == 1
    assert "not measured:\nrotary" in late.stderr
