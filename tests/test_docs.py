"""The lessons of the documentation run from top to bottom; on all five tabs, with their numbers compared:
`kvattn lesson run FILE --backend all`.
"""

from pathlib import Path

import pytest

from kvattn import cli, lesson

LESSONS = sorted((Path(__file__).parent.parent / "docs" / "lessons").glob("*.md"))


def test_there_are_lessons_for_five_frameworks():
    assert len(LESSONS) == 8
    for path in LESSONS:
        assert set(lesson.read(path).tabs) == {"numpy", "torch", "tensorflow", "jax", "mxnet"}, path.name


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_on_numpy(path, capsys):
    assert cli.main(["lesson", "run", str(path), "--backend", "numpy"]) == 0, capsys.readouterr().out
