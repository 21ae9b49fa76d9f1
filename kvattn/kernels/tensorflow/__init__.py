"""TensorFlow's kernels. The tab's `choose` says which serves a call.

- tiles: softmax of dot products on the CPU, in blocks of queries; plan: which queries and keys each block has.
- blocks: any score in blocks of queries. distances: a bias by distance. few_pairs: which of few pairs may attend.
- nonfinite: NaN and inf. dropout: the pairs that a seed keeps. quirks: arrays of many axes, and sizes that are not known.
"""
