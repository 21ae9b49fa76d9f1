"""JAX's kernels. The tab's `choose` says which serves a call on a CPU, gpu's `choose` on a GPU.

- tiles: softmax of dot products on the CPU, in tiles; plans: which calls, and of which sizes, in plain integers.
- blocks: any score in blocks of queries. distances: a bias by distance.
- gpu: cuDNN, and where it does not serve; decoding: one query beside many keys.
- nonfinite: NaN and inf. dropout: the pairs that a seed keeps.
- programs: how functions are compiled; placement: one of two programs, by the devices. ring: sequences that devices share.
"""
