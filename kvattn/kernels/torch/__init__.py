"""PyTorch: scaled_dot_product_attention and what closes its gaps; what a GPU is served by."""
