"""Attention with one semantics on NumPy, PyTorch, TensorFlow, JAX and MXNet. Importing it loads no framework."""

from kvattn.api import *  # noqa: F403
from kvattn.api import __all__ as __all__

__version__ = "0.2.0"
