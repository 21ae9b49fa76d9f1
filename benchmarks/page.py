"""The figures of the options on the documentation's page of speed, on the CPU, one part after another.

    python benchmarks/page.py

Each part has a file of docs/reference/speed/, to which each backend's rows are added once they are whole. What is not done
within the time is stopped, and named; what is done stays, and the rest may follow on the same day:
``--only masks-forward,layers --backend jax``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvattn import timing

HERE = Path(__file__).parent
BENCH = ("-m", "kvattn", "bench", "--rounds", "3", "--shapes", "S,M")
MASKS = (*BENCH, "--mask", "--per-query", "--bias")
PARTS = {  # what matters most comes first
    "options": (str(HERE / "pairs.py"), "--rounds", "3"),
    "masks-forward": MASKS,
    "layers-training": (*BENCH, "--layers", "--valid", "--grad"),
    "dropout": (str(HERE / "dropout.py"), "--rounds", "3"),
    "rotary": (str(HERE / "rotary.py"), "--rounds", "3"),
    "masks-forward-backward": (*MASKS, "--grad"),
    "layers": (*BENCH, "--layers", "--valid"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="which parts (default: %(default)s)")
    parser.add_argument("--backend", default="numpy,torch,tensorflow,jax,mxnet", help="which ones (default: %(default)s)")
    parser.add_argument("--within", type=float, default=10, help="minutes for all (default: %(default)s)")
    parser.add_argument("--folder", default=HERE.parent / "docs" / "reference" / "speed", help="where the files go", type=Path)
    asked = parser.parse_args()
    end, late = time.monotonic() + 60 * asked.within, []
    for part in asked.only.split(","):
        for backend in asked.backend.split(","):
            start, file = time.monotonic(), asked.folder / f"{part}.json"
            try:
                add(file, backend, [sys.executable, *PARTS[part], "--backend", backend], max(0, end - start))
            except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
                late.append(f"{part}, {backend}: {error}")
                continue
            print(f"{file}, {backend}: {time.monotonic() - start:.0f} s", flush=True)
    raise SystemExit("\n".join(["not measured:", *late]) if late else 0)


def add(file, backend, command, seconds):
    """Put the rows that the command writes into the file, beside those of other backends if all else is the same."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "rows.json"
        subprocess.run([*command, "--json", str(written)], check=True, stdout=subprocess.DEVNULL, timeout=seconds)
        about = json.loads(written.read_text())
    rows, before = about.pop("rows"), json.loads(file.read_text()) if file.exists() else {"rows": []}
    others = [row for row in before.pop("rows") if row["backend"] != backend]
    timing.write(str(file), about, rows=others + rows if before == about else rows)


if __name__ == "__main__":
    main()
