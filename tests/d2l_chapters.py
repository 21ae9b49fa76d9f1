"""The attention chapters of Dive into Deep Learning, from a clone of it, on kvattn's namespaces: which run, and how long.

    git clone --depth 1 https://github.com/d2l-ai/d2l-en
    python tests/d2l_chapters.py d2l-en --framework torch

Their text is as it is in the clone: `from d2l import torch as d2l` gives kvattn's namespace. Nothing is downloaded; sentences
to translate and pictures are made on the spot. Each chapter runs in a Python of its own, and a cell that fails ends it. The
table tells the cells run, the seconds, what the chapter printed of BLEU, and the error. Exit status 1 if a chapter failed.
Chapter `transformer` needs pandas, as in d2l. tests/test_scaffold.py calls the same names in the same order, without a clone.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER = "chapter_attention-mechanisms-and-transformers"
CHAPTERS = (
    "queries-keys-values", "attention-pooling", "attention-scoring-functions", "bahdanau-attention", "multihead-attention",
    "self-attention-and-positional-encoding", "transformer", "vision-transformer",
)  # fmt: skip
FRAMEWORKS = ("torch", "mxnet", "jax", "tensorflow")


def run(file: Path, framework: str) -> dict[str, object]:
    """Run one chapter here, and say what came of it."""
    os.environ["MPLBACKEND"] = "agg"
    import kvattn
    from kvattn import lesson, tab

    kvattn.set_backend(framework)
    sys.modules["d2l"] = kvattn
    cells = [cell for cell in lesson.read(file).cells if cell.on(framework) and not cell.setup]
    told, names, start = io.StringIO(), {"tab": tab, "__name__": "__main__"}, time.perf_counter()
    done, error = 0, None
    for cell in cells:
        began = time.perf_counter()
        try:
            with contextlib.redirect_stdout(told):
                exec(compile("\n" * (cell.line - 1) + cell.code, file.name, "exec"), names)
        except BaseException as problem:
            import traceback

            line = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == file.name]
            error = f"line {line[-1] if line else cell.line}: {type(problem).__name__}: {problem}"
            break
        done += 1
        if time.perf_counter() - began > 1:
            print(f"{file.stem}, {framework}, line {cell.line}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    bleu = [float(line.rpartition(",")[2]) for line in told.getvalue().splitlines() if ", bleu," in line]
    return {"cells": done, "of": len(cells), "seconds": time.perf_counter() - start, "bleu": bleu, "error": error}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="a clone of d2l-en")
    parser.add_argument("--framework", default=",".join(FRAMEWORKS), help="names, separated by commas (default: %(default)s)")
    parser.add_argument("--chapter", default=",".join(CHAPTERS), help="names, separated by commas (default: all)")
    parser.add_argument("--here", action="store_true", help="one chapter, one framework, in this process; JSON")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(run(given.clone / FOLDER / f"{given.chapter}.md", given.framework)))
        return 0
    failed = False
    print(f"{'chapter':<40}{'framework':<12}{'cells':>7}{'seconds':>9}  BLEU")
    for chapter in given.chapter.split(","):
        for framework in given.framework.split(","):
            command = [sys.executable, __file__, str(given.clone), "--here", "--chapter", chapter, "--framework", framework]
            ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if ended.returncode:
                print(f"{chapter:<40}{framework:<12} ended with {ended.returncode}", flush=True)
                failed = True
                continue
            found = json.loads(ended.stdout.splitlines()[-1])
            if not found["of"]:
                print(f"{chapter:<40}{framework:<12} has no cells", flush=True)
                continue
            cells, bleu = f"{found['cells']}/{found['of']}", " ".join(f"{x:.2f}" for x in found["bleu"])
            print(f"{chapter:<40}{framework:<12}{cells:>7}{found['seconds']:>9.1f}  {bleu}", flush=True)
            if found["error"]:
                print(f"    {found['error'][:600]}", flush=True)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
