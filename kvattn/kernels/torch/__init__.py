"""PyTorch's kernels. The tab's `choose` says which serves a call on a CPU, gpu's `choose` on a GPU.

- sdpa: scaled_dot_product_attention, with its gaps closed; plan: how a call is divided for it; sinks: a sink beside it.
- distances, segments: a bias by distance, and packed sequences. operators: what a program of torch.compile runs on a CPU.
- gpu: which kernel on a GPU; tiles: kernels in Triton; flash: how they are called.
- nonfinite: NaN and inf. dropout: the pairs that a seed keeps. traces: what a recorded program may know.
- ring, sharded: sequences that processes share, and DTensors.
"""
