"""JAX: tiles on the CPU, cuDNN on a GPU, any score in blocks; how functions are compiled."""
