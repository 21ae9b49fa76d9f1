"""The command: exit codes, the reports, the text, the doctor. NumPy and stand-ins only, so it runs everywhere."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from rich.console import Console

import kvattn
from kvattn import cli, conformance, dispatch, install, registry, report, terminal, text
from kvattn.backends import numpy as tab
from kvattn.conformance import Agreement, Report, Result

ROOT = Path(__file__).parent.parent
HOSTILE = "<script>alert('&')</script>\x1b[31m[red]"


class Plugin:
    """What importlib.metadata says of an installed plugin."""

    def __init__(self, load):
        self.load, self.value = load, "third_party:tab"


def breaks():
    raise OSError(f"libstranger.so: {HOSTILE}")


@pytest.fixture
def world(monkeypatch):
    """numpy, its twin and a plugin that fails at import are installed, one framework is not; two cases that both pass."""
    twin = SimpleNamespace(**{name: x for name, x in vars(tab).items() if not name.startswith("__")})
    monkeypatch.setattr(registry, "_plugins", lambda: {"twin": Plugin(lambda: twin), "wreck": Plugin(breaks)})
    monkeypatch.setattr(
        registry, "OURS", {"numpy": registry.OURS["numpy"], "no_such_framework": lambda: __import__("no_such_framework")}
    )
    monkeypatch.setattr(registry, "loaded", {})
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(cli, "_jobs", lambda: 1)  # what stands in for the suite here is not there in another process
    world = SimpleNamespace(failing={}, apart=0.5)

    def run(name, cases=None, dtypes=None, progress=None, device=None):
        version, card = dispatch.load(name).describe()
        card = card if device is None else dispatch.load(name).devices()[dispatch.device(dispatch.load(name), device)]
        results = []
        for case in cases:
            progress(case.name)
            failing = world.failing.get(name, ())
            results.append(Result(case.name, "group", "float32", "output", 0.25, 4.0, True))
            results.append(Result(case.name, "group", "float32", "grad_query", 0.75, 8.0, True))
            results.extend(Result(case.name, "group", "float32", "weights", *each) for each in failing)
        return Report(name, version, card, results)

    def pairwise(reports):
        pairs = [(a.backend, b.backend) for i, a in enumerate(reports) for b in reports[i + 1 :]]
        return {pair: Agreement(world.apart, 4.0, world.apart <= 4, 2, "") for pair in pairs}

    monkeypatch.setattr(
        conformance, "cases", lambda seed=0: [SimpleNamespace(name=f"case {i}", group="group") for i in range(2)]
    )
    monkeypatch.setattr(conformance, "run", run)
    monkeypatch.setattr(conformance, "pairwise", pairwise)
    return world


def run(capsys, *argv):
    status = cli.main(argv)
    return status, *capsys.readouterr()


# ---- exit codes


def test_without_arguments_it_helps(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    assert "doctor" in out
    assert "conform" in out


def test_the_module_is_the_command_and_help_loads_nothing_heavy():
    for module in ("kvattn", "kvattn.cli"):
        version = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
        assert version.stdout.startswith("kvattn ")
    code = (
        "import sys, kvattn.cli as c; c.main([]); assert not {'numpy', 'rich', 'torch'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_agreement_exits_0_and_closes_with_the_count(capsys, world):
    status, out, err = run(capsys, "conform", "--backend", "numpy,twin")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "4 passed, 0 failed"
    assert "numpy: 2 cases passed, 0 failed" in out  # the plain log
    assert "1 of 1 pairs agree: nearest the limit numpy and twin, 12% of it" in out
    assert "used: of an error's own limit, which grows with the scores" in out
    assert "A word's vector is made of a hash of it and of its place, not of its meaning" in " ".join(out.split())
    head, row = (next(line for line in out.splitlines() if word in line) for word in ("backend", "numpy  "))
    assert [word for word in head.split() if word != "┃"][3:] == ["cases", "used", "values", "grads", "time"]
    assert row.split("│")[5].strip() == "9%"
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 88


def test_a_failing_case_exits_1_and_is_listed(capsys, world):
    world.failing["twin"] = [(9.0, 4.0, False, HOSTILE), (float("inf"), 4.0, False, "case 0 float32: weights: is a list")]
    status, out, _ = run(capsys, "conform", "--backend", "numpy,twin")
    assert status == 1
    assert out.splitlines()[-1] == "2 passed, 2 failed"
    assert "twin case 0 float32: weights; error 9.00, 4.00 allowed; <script>" in out
    assert "twin case 0 float32: weights: is a list" in out
    assert "\x1b" not in out


def test_a_long_piped_run_says_that_it_goes_on(capsys, world, monkeypatch):
    monkeypatch.setattr(terminal, "SILENT", -1)
    status, out, _ = run(capsys, "conform", "--backend", "numpy,twin")
    assert status == 0
    assert out.splitlines()[:3] == ["numpy: 1 so far", "numpy: 2 so far", out.splitlines()[2]]
    monkeypatch.setattr(terminal, "SILENT", 20)
    assert "so far" not in run(capsys, "conform", "--backend", "numpy,twin")[1]


def test_what_a_framework_says_of_itself_at_import_is_not_shown_unless_it_fails(world, monkeypatch, capfd):
    twin = dispatch.load("twin")

    def says(fails):
        os.write(2, b"I0000 custom operations are on")
        if fails:
            raise OSError("no library")
        return twin

    for fails, shown in ((False, ""), (True, "I0000 custom operations are on")):
        monkeypatch.setattr(registry, "loaded", {})
        monkeypatch.setattr(registry, "_plugins", lambda fails=fails: {"twin": Plugin(lambda: says(fails))})
        assert cli.main(["doctor", "--backend", "twin"]) == 0
        assert capfd.readouterr().err == shown
        monkeypatch.setattr(registry, "loaded", {})
        assert cli.main(["conform", "--backend", "twin"]) == fails
        assert capfd.readouterr().err == shown


def test_many_failures_are_cut_and_counted(capsys, world):
    world.failing = {"numpy": [(9.0, 4.0, False, "")] * 30, "twin": [(8.0, 4.0, False, "")]}
    status, out, _ = run(capsys, "conform", "--backend", "numpy,twin")
    assert status == 1
    assert out.count("  numpy case") + out.count("  twin case") == report.LISTED
    assert "  twin case 0 float32" in out
    assert "and 42 more" in out


def test_a_disagreement_exits_1(capsys, world):
    world.apart = 99.0
    status, out, _ = run(capsys, "conform", "--backend", "numpy,twin")
    assert status == 1
    assert "2475% ✗" in out
    assert "numpy and twin: disagree; error 99.00, 4.00 allowed" in out
    assert out.splitlines()[-1] == "4 passed, 1 failed"


def test_a_disagreement_on_the_text_exits_1(capsys, world, monkeypatch):
    twin = dispatch.load("twin")
    monkeypatch.setattr(twin, "attention", lambda *a, **k: tuple(x + np.float32(0.01) for x in tab.attention(*a, **k)))
    status, out, _ = run(capsys, "conform", "--backend", "numpy,twin")
    assert status == 1
    assert "numpy and twin: disagree on the text" in out


def test_a_backend_that_cannot_attend_over_the_text_is_a_failure(capsys, world, monkeypatch):
    monkeypatch.setattr(dispatch.load("twin"), "attention", lambda *a, **k: 1 / 0)
    status, out, _ = run(capsys, "conform", "--backend", "numpy,twin")
    assert status == 1
    assert "twin: cannot attend over the text: ZeroDivisionError" in out


def test_a_backend_that_fails_to_import_is_a_row_not_a_crash(capsys, world, tmp_path):
    status, out, _ = run(capsys, "conform", "--backend", "numpy,twin,wreck", "--json", str(tmp_path / "r.json"))
    assert status == 1
    assert out.splitlines()[-1] == "4 passed, 1 failed"
    rows = {row["backend"]: row for row in json.loads((tmp_path / "r.json").read_text())["backends"]}
    assert list(rows) == ["numpy", "twin", "wreck"]
    assert "libstranger.so" in rows["wreck"]["error"]


def test_a_suite_that_stops_is_a_row_not_a_crash(capsys, world, monkeypatch):
    monkeypatch.setattr(conformance, "run", lambda *a, **k: 1 / 0)
    status, out, _ = run(capsys, "conform", "--backend", "numpy")
    assert status == 1
    assert "the suite stopped: ZeroDivisionError" in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("no_such_framework", f"is not installed: {install.line('no_such_framework')}"),
        ("numpy,nonesuch", "unknown backend 'nonesuch'; known: numpy, no_such_framework, twin, wreck"),
        (",", "names no backend"),
    ],
)
def test_a_backend_that_is_absent_or_unknown_exits_2_with_the_cure(capsys, world, given, said):
    status, out, err = run(capsys, "conform", "--backend", given)
    assert (status, out) == (2, "")
    assert said in err


def test_a_device_that_is_not_there_exits_2_and_says_what_is(capsys, world):
    for named in (("--backend", "numpy"), ("--backend", "numpy,twin"), ("--backend", "wreck,numpy")):
        status, out, err = run(capsys, "conform", "--device", "cuda", *named)
        assert (status, out) == (2, "")
        assert "backend 'numpy' has no device 'cuda' here; it has cpu" in err
    status, _, err = run(capsys, "conform", "--backend", "numpy", "--device", "tpuu", "--draws", "1")
    assert status == 2
    assert "has no device 'tpuu'" in err


def test_the_device_is_in_every_report_and_who_has_none_is_named(capsys, world, tmp_path, monkeypatch):
    twin, asked = dispatch.load("twin"), []
    monkeypatch.setattr(twin, "devices", lambda: {"cpu": "cpu", "cuda:0": "Card 3000"})
    monkeypatch.setattr(twin, "on", lambda device: asked.append(device) or tab.on("cpu"))
    paths = {kind: str(tmp_path / f"r.{kind}") for kind in ("json", "html")}
    monkeypatch.setattr(registry, "_plugins", dict)
    monkeypatch.setattr(registry, "OURS", registry.OURS | {"twin": lambda: twin})
    monkeypatch.setattr(registry, "available_backends", lambda: ("numpy", "twin"))
    status, out, _ = run(capsys, "conform", "--device", "cuda", "--json", paths["json"], "--html", paths["html"])
    assert status == 0
    assert asked == ["cuda:0"]  # of the text
    assert "Not asked: backend 'numpy' has no device 'cuda' here; it has cpu" in out
    for said in (out, *((tmp_path / f"r.{kind}").read_text() for kind in paths)):
        assert "Card 3000" in said
    rows = {row["backend"]: row["device"] for row in json.loads((tmp_path / "r.json").read_text())["backends"]}
    assert rows == {"twin": "Card 3000"}
    assert "cpu, Card 3000" in run(capsys, "doctor")[1]


def test_a_backend_that_bench_does_not_time_is_refused_and_not_left_out(capsys, world):
    for named in ("twin", "numpy,twin"):
        status, out, err = run(capsys, "bench", "--backend", named)
        assert (status, out) == (2, "")
        assert "backend 'twin' is not timed; those that are: numpy, torch" in err


def test_a_backend_of_the_environment_that_is_none_has_no_say_where_another_is_named(capsys, world, monkeypatch, tmp_path):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "nonsense")
    status, out, err = run(capsys, "conform", "--backend", "numpy,twin", "--text", str(words := tmp_path / "words.txt"))
    assert status == 2
    words.write_text("a dog")
    status, out, err = run(capsys, "conform", "--backend", "numpy,twin", "--text", str(words))
    assert (status, err) == (0, "")
    assert "cannot attend" not in out
    assert run(capsys, "doctor")[0] == 1
    with pytest.raises(ValueError, match=r"known: numpy.*'nonsense' was chosen by the environment variable KVATTN_BACKEND"):
        kvattn.softmax([0.0])


def test_aliases_name_backends(world):
    assert terminal.named_backends(" NumPy ,numpy") == ["numpy"]
    with pytest.raises(terminal.Refused, match="'torch'"):
        terminal.named_backends("pytorch")


# ---- the reports


def test_json_says_what_the_terminal_says(capsys, world, tmp_path):
    path = tmp_path / "r.json"
    world.failing["twin"] = [(float("inf"), 4.0, False, "case 0 float32: OSError: no")]
    assert run(capsys, "conform", "--backend", "numpy,twin", "--json", str(path))[0] == 1
    got = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
    jsonschema.validate(got, json.loads((ROOT / "docs/reference/report.schema.json").read_text()))
    assert (got["schema"], got["ok"], got["passed"], got["failed"]) == (report.SCHEMA, False, 2, 2)
    first, second = got["backends"]
    assert first | {"seconds": 0} == {
        "backend": "numpy", "version": np.__version__, "device": "cpu", "cases": 2, "passed": 2, "failed": 0, "error": None,
        "refused": 0, "not_offered": 0,
        "worst_value": 0.25, "worst_gradient": 0.75, "worst_share": 0.09375, "notes": [], "failures": [], "seconds": 0,
        "results": first["results"],
    }  # fmt: skip
    assert [each["what"] for each in first["results"]] == ["output", "grad_query"] * 2
    assert first["results"][0]["error"] == 0.25
    assert second["failures"][0]["error"] == "inf"
    assert got["pairs"] == [
        {"a": "numpy", "b": "twin", "error": 0.5, "allowed": 4.0, "passed": True, "compared": 2, "message": ""}
    ]
    assert got["text"]["tokens"] == text.tokenize(text.SENTENCE)
    assert np.allclose(np.sum(got["text"]["weights"], axis=-1), 1)
    assert os.listdir(tmp_path) == ["r.json"]


class Page(HTMLParser):
    """Collects what a page refers to, and checks that every element is closed in its turn."""

    VOID = ("meta",)

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.refers, self.scopes, self.labels = [], [], [], 0, []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.refers += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
        self.scopes += tag == "th" and dict(attributes)["scope"] in ("col", "row")
        self.labels += [dict(attributes)["aria-label"]] if tag == "svg" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_one_file_that_refers_to_nothing_and_escapes_all(capsys, world, tmp_path):
    path, words = tmp_path / "r.html", tmp_path / "<b>&.txt"
    words.write_text(f"dog {HOSTILE} <img src=x> & \"quotes\" 'n' 犬\n", encoding="utf-8")
    world.failing["twin"] = [(9.0, 4.0, False, HOSTILE)]
    status, _, _ = run(capsys, "conform", "--backend", "numpy,twin,wreck", "--html", str(path), "--text", str(words))
    assert status == 1
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.refers == []
    assert "http" not in html
    assert "url(" not in html
    assert "\x1b" not in html
    assert not {"script", "img", "b", "link"} & set(page.tags)
    assert "&lt;script&gt;" in html
    assert "犬" in html
    assert page.scopes == 8 + 2 + 1 + 2 * 3
    assert len(page.labels) == 2
    assert "Agreement" in page.labels[0]
    assert page.tags.count("details") == 2
    assert "<td>case 1</td><td>float32</td><td>output 0.25 of 4.00; grad_query 0.75 of 8.00; weights 9.00 of 4.00 ✗" in html
    cells = re.findall(r'fill-opacity="(.*?)".*\n<text.*>(.*)</text>', html)
    assert [cell for cell in cells if "%" in cell[1]] == [("0.11", "12%")] * 2  # the colour and the number tell one thing
    assert "Heat map" in page.labels[1]
    assert sorted(os.listdir(tmp_path)) == ["<b>&.txt", "r.html"]


def test_reports_survive_infinities_and_nan(capsys, world, tmp_path, monkeypatch):
    world.apart = float("nan")
    monkeypatch.setattr(dispatch.load("twin"), "attention", lambda *a, **k: tuple(x * np.nan for x in tab.attention(*a, **k)))
    paths = {kind: str(tmp_path / f"r.{kind}") for kind in ("json", "html")}
    status, out, _ = run(capsys, "conform", "--backend", "twin,numpy", "--json", paths["json"], "--html", paths["html"])
    assert status == 1
    assert "twin and numpy: disagree" in out
    assert json.loads((tmp_path / "r.json").read_text())["pairs"][0]["error"] == "nan"


@pytest.mark.parametrize("name", ["", "a\0b"])
@pytest.mark.parametrize("given", [("conform", "--json"), ("conform", "--html"), ("bench", "--json"), ("bench", "--plot")])
def test_what_is_no_name_of_a_file_exits_2(capsys, world, given, name):
    status, out, err = run(capsys, *given, name, "--backend", "numpy")
    assert (status, out) == (2, "")
    assert "it is no name of a file" in err


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_report_that_cannot_be_written_is_refused_before_the_suite_runs(capsys, world, tmp_path, option):
    for path, said in ((tmp_path, "is a directory"), (tmp_path / "none" / "r", "there is no directory")):
        status, out, err = run(capsys, "conform", "--backend", "numpy", option, str(path))
        assert (status, out) == (2, "")
        assert said in err


# ---- the text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read the text file"),
        (b"", "has no words in it"),
        (b" \n\t ", "has no words in it"),
        (b"caf\xe9 noir", "is not UTF-8 (byte 0xe9 at 3)"),
        (b"cut \xe7\x8a", "is not UTF-8"),
    ],
)
def test_a_text_that_cannot_be_used_exits_2(capsys, world, tmp_path, content, said):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    status, out, err = run(capsys, "conform", "--backend", "numpy", "--text", str(path))
    assert (status, out) == (2, "")
    assert said in err
    assert "words.txt" in err


def test_a_folder_is_no_text(capsys, world, tmp_path):
    assert run(capsys, "conform", "--backend", "numpy", "--text", str(tmp_path))[0] == 2


def test_a_long_text_is_used_up_to_512_tokens_and_drawn_up_to_40(capsys, world, tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"the quick brown fox " * 80_000)  # a mark of byte order, and more than is read
    status, out, _ = run(capsys, "conform", "--backend", "numpy", "--text", str(path), "--json", str(tmp_path / "r.json"))
    assert status == 0
    assert "512 tokens" in out
    assert "the first 40 tokens" in out
    got = json.loads((tmp_path / "r.json").read_text())["text"]
    assert (len(got["tokens"]), len(got["weights"])) == (512, 40)
    assert got["tokens"][0] == "the"


def test_the_embedding_is_the_same_everywhere():
    x = text.embed(["Dog", "dog"])
    assert x.dtype == np.float32
    golden = [-0.6875, 0.8125, 0.3125, -0.0625, -0.3125, -0.1875, 0.9375, 0.8125]
    assert x[0, :8].tolist() == golden
    assert (x * 16 == np.round(x * 16)).all()
    assert np.abs(x).max() < 1.5


def test_scores_of_the_text_are_exact_in_float32():
    x = text.embed(text.tokenize(text.SENTENCE) * 30)
    wide = x.astype(np.float64)
    assert ((x @ x.T) / np.float32(4) == wide @ wide.T / 4).all()


def test_no_token_is_a_control_character():
    assert text.tokenize("a\x1b[31mb\x00\u202ec it's\n") == ["a", "[", "31mb", "c", "it's"]


@pytest.mark.parametrize("width", [10, 24, 80, 200])
@pytest.mark.parametrize("words", [["when", "he", "saw"], ["狗", "e\u0301", "🐕", "hund"], ["word"] * 40])
def test_the_heat_map_fits_the_terminal(width, words):
    console = Console(width=width, color_system=None)
    picture = report.heat(words, np.full((len(words),) * 2, 1 / len(words)).tolist(), console)
    lines = picture.plain.splitlines()[:-1]
    assert all(line.cell_len <= width for line in picture.split()[: len(lines)])
    assert any("█" in line for line in lines)


def test_the_heat_map_shades_without_colour_and_colours_with_it():
    weights = [[1.0, 0.0], [0.3, 0.7]]
    plain = report.heat(["a", "b"], weights, Console(width=80, color_system=None))
    assert plain.plain.splitlines()[1:3] == ["a ███   ", "b ░░░▓▓▓"]
    coloured = report.heat(
        ["a", "b"], weights, Console(width=80, force_terminal=True, color_system="truecolor", no_color=False)
    )
    assert {str(span.style) for span in coloured.spans} >= {"on #fde725", "on #440154"}


# ---- the doctor


def test_the_doctor_says_what_works_and_what_to_install(capsys, world):
    status, out, _ = run(capsys, "doctor", "--backend", "twin,wreck")
    assert status == 0
    state = {cells[1].strip(): cells[2].strip() for cells in (line.split("│") for line in out.splitlines()) if len(cells) > 3}
    assert state == {"numpy": "works", "twin": "works", "wreck": "broken", "no_such_framework": "not installed"}
    assert "A call with NumPy arrays is served by numpy: chosen by the default." in out
    assert install.line("no_such_framework") in out
    assert "wreck is broken: ImportError" in out
    assert "libstranger.so" in out
    assert "\x1b" not in out


def test_plugins_are_listed_and_loaded_where_they_are_named(capsys, world, monkeypatch):
    loaded = []
    plugin = SimpleNamespace(load=lambda: loaded.append("twin") or SimpleNamespace(**vars(tab)), value="[red]third_party:tab")
    monkeypatch.setattr(registry, "_plugins", lambda: {"twin": plugin})
    for command, said in (("doctor", "Plugins that are loaded where --backend names them: "), ("conform", "Not asked, since ")):
        status, out, _ = run(capsys, command)
        assert status == 0
        assert said in out
        assert "twin (the plugin [red]third_party:tab)" in out
        assert not loaded
    assert "twin" in kvattn.available_backends()
    assert not loaded
    assert run(capsys, "doctor", "--backend", "twin")[0] == 0
    assert loaded == ["twin"]


@pytest.mark.parametrize(
    ("chosen", "status", "said"),
    [
        ("twin", 0, "served by twin: chosen by the environment variable KVATTN_BACKEND."),
        ("NUMPY", 0, "served by numpy: chosen by the environment variable KVATTN_BACKEND."),
        ("wreck", 1, "But it is broken"),
        ("no_such_framework", 1, "But it is not installed"),
        ("nonesuch", 1, "But there is no such backend; known: numpy"),
    ],
)
def test_the_doctor_says_which_backend_serves_and_why(capsys, world, monkeypatch, chosen, status, said):
    monkeypatch.setenv(dispatch.ENVIRONMENT, chosen)
    got, out, _ = run(capsys, "doctor")
    assert got == status
    assert said in out


def test_a_lesson_without_an_action_is_told_the_three(capsys):
    with pytest.raises(SystemExit):
        cli.main(["lesson"])
    assert "required: {run,convert,site}" in capsys.readouterr().err
