"""A coverage-guided fuzz of what reads outside data, by hand: `pip install atheris`, then

    python benchmarks/fuzz.py markdown -max_total_time=300

The targets: weights, markdown, notebook, bibliography, cells. What fails is written to a file, whose name the last lines
tell. The same functions are asked by hypothesis at every test run: tests/test_fuzz.py.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

with atheris.instrument_imports(include=["kvattn", "jupytext", "nbformat", "fuzz"]):
    import fuzz

FOLDER = Path(tempfile.mkdtemp(prefix="kvattn-fuzz-"))


def _text(data):
    return data.decode("utf-8", "replace")


def weights(data):
    path = FOLDER / "weights.safetensors"
    path.write_bytes(data)
    fuzz.weights(path)


TARGETS = {
    "weights": weights,
    "markdown": lambda data: fuzz.markdown(_text(data), FOLDER / "lesson.md"),
    "notebook": lambda data: fuzz.file(FOLDER / "lesson.ipynb", data),
    "bibliography": lambda data: fuzz.bibliography(_text(data), FOLDER),
    "cells": lambda data: fuzz.markdown(f"```python\n{_text(data)}\n```\n", FOLDER / "lesson.md"),
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"{__doc__}\nsay which target: {', '.join(TARGETS)}")
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
