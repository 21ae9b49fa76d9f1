"""A site while its lessons are written: served to this machine alone, an open page is loaded again when it changes."""

from __future__ import annotations

import http.server
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kvattn.lesson.site import _goes_into

_EVENTS = "/.kvattn/changes"
_SCRIPT = f'<script>new EventSource("{_EVENTS}").onmessage = () => location.reload()</script>'.encode()
PAUSE = 0.3  # seconds between two looks at the files


class Server:
    """The folder of a site at http://127.0.0.1:port; port 0: a free one. Raises OSError for one that is taken."""

    def __init__(self, folder: Path, port: int) -> None:
        self.changed, self.open = threading.Condition(), True
        handler = partial(_Handler, self, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reload(self) -> None:
        """Let the pages that are open be loaded again."""
        with self.changed:
            self.changed.notify_all()

    def close(self) -> None:
        self.open = False
        self.reload()
        self.server.shutdown()
        self.server.server_close()


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, owner: Server, *args: Any, **options: Any) -> None:
        self.owner = owner
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() and self.path.endswith("/") else path
        try:
            if self.path == _EVENTS:
                self._events()
            elif path.suffix == ".html" and path.is_file():
                self._page(path.read_bytes())
            else:
                super().do_GET()
        except (BrokenPipeError, ConnectionResetError):  # the reader went elsewhere
            return

    def _page(self, content: bytes) -> None:
        content = content.replace(b"</body>", _SCRIPT + b"</body>")
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        while self.owner.open:
            with self.owner.changed:
                changed = self.owner.changed.wait(timeout=10)
            self.wfile.write(b"data: changed\n\n" if changed else b": still here\n\n")
            self.wfile.flush()

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def changes(folder: Path, pause: Callable[[], object] = lambda: time.sleep(PAUSE)) -> Iterator[list[Path]]:
    """The files of a folder that were changed, added or taken away, each time that some were; for ever."""
    known = _state(folder)
    while True:
        pause()
        now = _state(folder)
        if differ := [path for path in {**known, **now} if known.get(path) != now.get(path)]:
            yield differ
        known = now


def _state(folder: Path) -> dict[Path, tuple[int, int]]:
    state = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if _goes_into(Path(root, each))]
        for each in files:
            try:
                found = os.stat(path := Path(root, each))
            except OSError:  # gone meanwhile
                continue
            if each[0] != ".":
                state[path] = (found.st_mtime_ns, found.st_size)
    return state
