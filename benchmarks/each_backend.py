"""The command line of the scripts here that time one call over another: each backend in a fresh process, rows as they come."""

import argparse
import sys

from kvattn import timing


def main(measure, line, rounds, small=False):
    """Run the script that called this.

    Args:
        measure: a function (backend, rounds) -> rows, dicts, asked in a process of that backend; where ``small`` is true it
            takes another argument, whether the arrays are to be small.
        line: how a row, with its backend, is printed: a format string of its keys.
        rounds: how many there are by default.
    """
    script = sys.modules["__main__"]
    parser = argparse.ArgumentParser(description=script.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="numpy,torch,tensorflow,jax,mxnet", help="which ones (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each call (default: %(default)s)")
    if small:
        parser.add_argument("--small", action="store_true", help="small arrays, to see that it runs")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        for row in measure(asked.backend, asked.rounds, *([asked.small] if small else [])):
            timing.print_row(row | {"backend": asked.backend})
        return
    rows = []
    for backend in asked.backend.split(","):
        command = [script.__file__, "--here", "--backend", backend, "--rounds", str(asked.rounds)]
        for row in timing.in_a_process(command + ["--small"] * (small and asked.small)):
            if "failed" in row:
                raise SystemExit(f"{backend}: {row['words']}")
            rows.append(row)
            print(line.format(**row))
    if asked.json:
        timing.write(asked.json, timing.machine(), rows=rows)
