"""TensorFlow: blocks of queries in a tf.function, for dot products and for any score."""
