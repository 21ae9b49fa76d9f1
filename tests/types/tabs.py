"""For the type checker alone: each of kvattn's tabs, and the example of a third party's, is what kvattn.backends says it is."""

import kvattn_mlx

from kvattn.backends import Backend, Devices, Functions, Tab, jax, mxnet, numpy, tensorflow, torch

tabs: list[Tab] = [numpy, torch, tensorflow, jax, mxnet]
required: Backend = kvattn_mlx
places: Devices = kvattn_mlx
functions: Functions = kvattn_mlx
