"""``import kvattn.mxnet_compat``, and ``import mxnet`` works on today's NumPy: for scripts that import mxnet first."""

from kvattn.old_numpy import old_names

with old_names():
    import mxnet  # noqa: F401
