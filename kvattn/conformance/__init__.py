"""One suite that judges any backend, ours or a third party's: cases are plain data, answers come from an independent oracle.

>>> from kvattn import conformance
>>> report = conformance.run("numpy", dtypes=["float64"])
>>> report.failures
[]
"""

from kvattn.conformance.cases import Case
from kvattn.conformance.check import Agreement, Report, Result, pairwise, run
from kvattn.conformance.suite import cases, version

__all__ = ["Agreement", "Case", "Report", "Result", "cases", "pairwise", "run", "version"]
