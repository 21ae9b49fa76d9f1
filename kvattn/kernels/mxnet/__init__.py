"""MXNet's kernels. The tab's `choose` says which serves a call.

- views: NumPy's kernels on views of arrays on the CPU. dropout: the pairs that a seed keeps.
- quirks: what MXNet's own operators do otherwise than NumPy's, put right.
"""
