"""MXNet: NumPy's kernels on views of its arrays, attention on Symbols, and what is put right in its operators."""
