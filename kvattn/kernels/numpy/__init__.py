"""NumPy's kernels. The tab's `choose` says which serves a call.

- few: calls of few scores, and their gradients.
- tiled, tiled_grad: softmax of dot products in tiles, also in a window, and its gradients; tiles: how a call is cut for both.
- memory: the formula in blocks of queries or keys, for any score.
- gradients: of every score, normaliser and layer's step, by hand.
- threads: how several share a call's work. dropout: the pairs that a seed keeps.
"""
