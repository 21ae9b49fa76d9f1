"""The line that installs what an extra of kvattn names, for this Python, from wherever this kvattn came."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path


def line(extra: str) -> str:
    """What to type for ``kvattn[extra]``: from the index, folder, archive or repository that kvattn was installed from."""
    pip = shutil.which("pip")
    own = pip is not None and Path(pip).parent == Path(sys.executable).parent
    return f"{'pip' if own else f'{shlex.quote(sys.executable)} -m pip'} install {_source(extra)}"


def _source(extra: str) -> str:
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"-e {_quoted(f'{checkout}[{extra}]')}"
    try:
        found = json.loads(metadata.distribution("kvattn").read_text("direct_url.json") or "{}")  # none: it came from an index
    except metadata.PackageNotFoundError:  # a folder on the path
        found = {}
    url = found.get("url", "")
    if url.startswith("file://") and "dir_info" in found:
        return _quoted(f"{url.removeprefix('file://')}[{extra}]")
    url = f"{found['vcs_info']['vcs']}+{url}" if "vcs_info" in found else url
    return _quoted(f"kvattn[{extra}] @ {url}" if url else f"kvattn[{extra}]")


def _quoted(words: str) -> str:
    return f"'{words}'" if "'" not in words else shlex.quote(words)
