"""Kernels that need not import their framework: one process a tab imports it, runs nothing, and forks for each lesson.

So a site of many lessons imports each framework once, and each lesson still begins in a process of its own in which nothing
has run: what another lesson did is not there. Where that cannot be promised, a kernel starts by itself: on other systems than
Linux (a fork of a framework may not work on macOS, and there is none on Windows), for plugins, whose import may do anything,
and for a lesson beside a module that has the name of one that was imported already.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kvattn

_START = """
import sys
sys.path = [each for each in sys.path if each]  # a folder beside which it began is no lesson's
import ipykernel.kernelapp
names, path = {{*sys.modules}}, [*sys.path]
sys.path.append({place!r})
from kvattn.lesson import forks
forks.serve({name!r}, {number}, path, names)
"""
KERNEL = "ipykernel_launcher"  # what `python -m` runs for a kernel
OURS = ("numpy", "torch", "tensorflow", "jax", "mxnet")  # whose imports leave nothing running that does not outlive a fork


class Forks:
    """The processes that fork, by tab; each begins when a lesson first needs it. A context manager: they end with it."""

    def __init__(self) -> None:
        self.parents: dict[str, _Parent | None] = {}

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def kernel(self, name: str, command: Sequence[str], folder: str, env: dict[str, str], errors: str) -> Forked | None:
        """A process that has become the kernel of this ``command``; None where it has to start by itself.

        ``errors``: the file that its stderr goes to.
        """
        if name not in self.parents:
            self.parents[name] = _Parent.of(name, command, env)
        parent = self.parents[name]
        return parent.fork(command, folder, env, errors) if parent else None

    def close(self) -> None:
        """End them, and what they forked."""
        for parent in self.parents.values():
            if parent is not None:
                parent.close()
        self.parents.clear()


class _Parent:
    """A process that has imported a tab, as its parent uses it: requests are lines of JSON."""

    def __init__(self, name: str, options: Sequence[str], env: dict[str, str]) -> None:
        place = str(Path(kvattn.__file__).parents[1])  # kvattn as this process has it
        read, write = os.pipe()
        self.process = subprocess.Popen(
            [*options, "-c", _START.format(place=place, name=name, number=write)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a kernel that starts by itself will say it again
            env=env,
            text=True,
            pass_fds=[write],
            start_new_session=True,  # Ctrl-C is for the one who waits for the lessons
        )
        os.close(write)
        self.answers = os.fdopen(read)

    @classmethod
    def of(cls, name: str, command: Sequence[str], env: dict[str, str]) -> _Parent | None:
        places = env.get("PYTHONPATH", "").split(os.pathsep) if env.get("PYTHONPATH") else []
        if name not in OURS or not hasattr(os, "pidfd_open") or KERNEL not in command or not all(map(os.path.isabs, places)):
            return None
        parent = cls(name, command[: command.index(KERNEL) - 1], env)  # Python, with its options before -m
        if parent.answer() is None:  # the tab does not import
            parent.close()
            return None
        return parent

    def answer(self) -> Any:
        """What it says next; None: it has ended."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.answers.readline())
        return None

    def fork(self, command: Sequence[str], folder: str, env: dict[str, str], errors: str) -> Forked | None:
        asked = {"arguments": command[command.index(KERNEL) + 1 :], "folder": folder, "env": env, "errors": errors}
        with contextlib.suppress(OSError):  # it has ended
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            if pid := self.answer():
                return Forked(pid, self.process.pid)
        return None

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.answers.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Forked:
    """A process that another one forked, as far as Jupyter asks one like subprocess.Popen."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int, parent: int) -> None:
        self.pid, self.parent = pid, parent
        self.ended = os.pidfd_open(pid)  # its parent takes note of its end only later, so that the number is still its own

    def poll(self) -> int | None:
        """None while it runs; with what it ended only its parent knows."""
        return 0 if select.select([self.ended], [], [], 0)[0] else None

    def wait(self) -> int:
        select.select([self.ended], [], [])
        return 0

    def send_signal(self, number: int) -> None:
        signal.pidfd_send_signal(self.ended, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        os.close(self.ended)


def provisioner(manager: Any, name: str, forks: Forks, errors: str) -> Any:
    """What starts the kernel of a Jupyter manager: a fork where there can be one, else as ever."""
    from jupyter_client.provisioning.local_provisioner import LocalProvisioner

    class Provisioner(LocalProvisioner):  # type: ignore[misc]
        async def launch_kernel(self, cmd: list[str], **options: Any) -> Any:
            env, folder = dict(options["env"]), str(options["cwd"])
            process = forks.kernel(name, cmd, folder, env, errors)
            if process is None:
                return await super().launch_kernel(cmd, **options)
            self.process, self.pid, self.pgid, self.cwd = process, process.pid, process.pid, folder
            return self.connection_info

    return Provisioner(kernel_id=manager.kernel_id, kernel_spec=manager.kernel_spec, parent=manager)


# ---- in the process that forks


def serve(name: str, number: int, path: list[str], names: set[str]) -> None:
    """Import a tab, and fork for each line that comes, until there are no more.

    ``path``: what sys.path was and will be in a kernel; ``names``: the modules that every kernel has.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children: list[int] = []
    with os.fdopen(number, "w") as answers:
        importlib.import_module("kvattn.tab")
        importlib.import_module("kvattn.lesson.watch")
        kvattn.registry.load(name)
        sys.path[:] = path
        gc.freeze()  # what is collected is written to, and no longer shared
        names = {each.partition(".")[0] for each in {*sys.modules} - names}
        _say(answers, True)
        for line in iter(sys.stdin.readline, ""):
            asked = json.loads(line)
            children = [pid for pid in children if os.waitpid(pid, os.WNOHANG) == (0, 0)]
            if names & _modules(asked["folder"]):
                _say(answers, None)
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there are threads: NumPy's and MXNet's, which expect to be forked
                pid = os.fork()
            if not pid:
                break
            children.append(pid)
        else:
            for pid in children:
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return
        parent = os.getppid()
        os.setsid()
        _say(answers, os.getpid())
    _become(asked, parent)


def _say(answers: Any, what: object) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


def _modules(folder: str) -> set[str]:
    """The names by which a lesson of this folder could import what lies beside it."""
    names = set()
    for path in Path(folder).iterdir():
        if path.suffix in (".py", ".so") or (path / "__init__.py").is_file():
            names.add(path.name.partition(".")[0])
    return names


def _become(asked: dict[str, Any], parent: int) -> None:
    """Be the kernel that was asked for, as `python -m ipykernel_launcher` is."""
    import numpy as np
    from ipykernel import kernelapp

    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["env"])
    for number, (path, flags) in enumerate([(os.devnull, os.O_RDONLY), (asked["errors"], os.O_WRONLY | os.O_APPEND)]):
        file = os.open(path, flags)
        os.dup2(file, 2 * number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    np.random.seed()  # else what is not seeded would be the same in all of them
    if "torch" in sys.modules:
        sys.modules["torch"].seed()
    sys.argv = [KERNEL, f"--IPKernelApp.parent_handle={parent}", *asked["arguments"]]
    kernelapp.launch_new_instance()
