"""TensorFlow: blocks of queries for dot products (tiles, plan) and for any score (blocks); NaN and inf (nonfinite); quirks."""
