"""NumPy: softmax attention in tiles, its gradients, and those of every score."""
