"""The figures of the options on the documentation's page of speed, on the CPU, one part after another.

    python benchmarks/page.py

Each part writes a file of docs/reference/speed/ once it is whole. All take about ten minutes on a machine that does nothing
else; what is not done within the time is stopped, and named: ``--only masks-forward,layers`` measures some parts.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

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
        start, file = time.monotonic(), asked.folder / f"{part}.json"
        command = [sys.executable, *PARTS[part], "--backend", asked.backend, "--json", str(file)]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=max(0, end - start))
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            late.append(f"{part}: {error}")
            continue
        print(f"{file}: {time.monotonic() - start:.0f} s", flush=True)
    raise SystemExit("\n".join(["not measured:", *late]) if late else 0)


if __name__ == "__main__":
    main()
