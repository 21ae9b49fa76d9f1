"""``import kvattn.mxnet_compat``, and ``import mxnet`` works on today's NumPy: for scripts that import mxnet first."""

from kvattn.lend import lend

with lend():
    import mxnet  # noqa: F401
