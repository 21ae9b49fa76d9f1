"""Lessons: one Markdown file, in the notation of d2l, for all frameworks. Run it, compare the tabs, convert it, render it."""

from typing import Any

from kvattn.lesson.page import render as render
from kvattn.lesson.prose import to_myst as to_myst
from kvattn.lesson.reader import Cell as Cell
from kvattn.lesson.reader import Lesson as Lesson
from kvattn.lesson.reader import Prose as Prose
from kvattn.lesson.reader import parse as parse
from kvattn.lesson.reader import read as read
from kvattn.lesson.references import References as References
from kvattn.lesson.runner import Ran as Ran
from kvattn.lesson.runner import Result as Result
from kvattn.lesson.runner import compare as compare
from kvattn.lesson.runner import run as run
from kvattn.lesson.runner import run_tab as run_tab
from kvattn.lesson.show import outcome as outcome
from kvattn.lesson.show import show as show
from kvattn.lesson.show import summary as summary
from kvattn.lesson.writer import convert as convert
from kvattn.lesson.writer import notebook as notebook


def setup(app: Any) -> dict[str, Any]:
    """What Sphinx calls for ``extensions = ["kvattn.lesson"]``."""
    from kvattn.lesson import extension

    return extension.setup(app)
