"""What is done with what comes from outside, by tests/test_fuzz.py and benchmarks/fuzz.py: read, and all that follows reading.

Each function returns if that went well, or was refused in the way that is promised; anything else it raises.
"""

import contextlib
import io

import kvattn
from kvattn import cli
from kvattn import numpy as kv
from kvattn.lesson import prose, reader
from kvattn.lesson.references import References
from kvattn.lesson.writer import notebook


@contextlib.contextmanager
def said(*errors):
    """One of these errors may be raised, with a message."""
    try:
        yield
    except errors as error:
        if not str(error).strip():
            raise AssertionError("an error that says nothing") from error


def weights(path):
    with said(ValueError, OSError):
        arrays = kvattn.weights.load_weights(path)
        assert all(x.nbytes <= 100_000_000 for x in arrays.values())
    with said(ValueError, OSError):
        kvattn.weights.load_weights(path, kv.MultiplicativeAttention(seed=0))
    with said(ValueError, OSError):
        kvattn.weights.load_weights(path, kv.MultiHeadAttention(4, 2), layout="llama", prefix="a")


def _follow(lesson):
    for name in lesson.tabs or ("numpy",):
        notebook(lesson, name, files=[])
    references = References(lesson, [])
    assert isinstance(references.lost, list)
    for part in lesson.parts:
        if isinstance(part, reader.Prose):
            prose.to_myst(part.text)
            prose.cited(part.text, references)


def markdown(text, path):
    with said(ValueError):
        _follow(reader.parse(text, path))


def file(path, content):
    path.write_bytes(content)
    with said(ValueError, OSError):
        _follow(reader.read(path))


def bibliography(text, folder):
    (folder / "a.bib").write_text(text, encoding="utf-8", newline="")
    keys = "k,l,a,b"
    lesson = reader.parse(f"# A\n:cite:`{keys}` :citet:`b`\n", folder / "lesson.md")
    references = References(lesson, [folder / "a.bib"])
    assert isinstance(references.entries, dict)
    references.bibliography()
    prose.cited(lesson.parts[0].text, references)
    notebook(lesson, "numpy", files=[folder / "a.bib"])


def environment():
    """Of KVATTN_BACKEND, whatever it is."""
    with said(ValueError, ImportError):
        kvattn.attention([[1.0]], [[1.0]], [[1.0]])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["doctor"]) in (0, 1)
    assert "\x1b" not in out.getvalue()
