"""What frameworks write to the terminal while they are imported, TensorFlow's log above all, kept from it: unless they fail."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block nothing reaches file descriptor 2, C++'s words neither; after an error it all does.

    >>> with quiet():
    ...     print("never seen", file=sys.__stderr__)
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as words:
        os.dup2(words.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            if failed:
                words.seek(0)
                os.write(2, words.read())
