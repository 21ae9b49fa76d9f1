"""The first page's picture: one call on each framework, by kvattn and by the framework's own attention.

The call: four queries and five keys; the third query may attend to nothing, and the last key is padding, whose value is NaN in
two of its six features, as memory that nobody has written to may be.
"""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

import kvattn
from kvattn.peers import naive

NAMES = {"numpy": "NumPy", "torch": "PyTorch", "tensorflow": "TensorFlow", "jax": "JAX", "mxnet": "MXNet"}

HEIGHT = 3.9  # inches

ALT = "Outputs of one call as coloured matrices: alike by kvattn on each framework; with NaN, or other numbers, without it"


def call():
    """query (4, 6), key (5, 6), value (5, 6) and the mask (4, 5), in float32."""
    rng = np.random.default_rng(3)
    query, key, value = (rng.normal(size=size).astype("float32") for size in ((4, 6), (5, 6), (5, 6)))
    value[4, 4:] = np.nan
    mask = np.ones((4, 5), bool)
    mask[:, 4] = mask[2] = False
    return query, key, value, mask


def _numpy(query, key, value, mask):
    return naive(query, key, value, allowed=mask)


def _torch(*given):
    import torch

    query, key, value, mask = (torch.tensor(x)[None, None] for x in given)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)[0, 0]


def _tensorflow(query, key, value, mask):
    import keras
    import tensorflow as tf

    query, key, value = (tf.constant(x)[None, :, None] for x in (query, key, value))
    return keras.ops.dot_product_attention(query, key, value, mask=tf.constant(mask)[None, None])[0, :, 0]


def _jax(query, key, value, mask):
    import jax

    return jax.nn.dot_product_attention(query[:, None], key[:, None], value[:, None], mask=mask[None])[:, 0]


def _mxnet(*given):
    """As d2l's lesson: -1e6 where a query may not attend."""
    from mxnet import npx

    query, key, value, mask = (kvattn.asarray(x, backend="mxnet") for x in given)
    scores = query @ key.T / math.sqrt(query.shape[-1])
    return npx.softmax(scores * mask + (1 - mask.astype("float32")) * -1e6, axis=-1) @ value


CALLS = {
    "numpy": (_numpy, "softmax of -inf"),
    "torch": (_torch, "scaled_dot_product_attention"),
    "tensorflow": (_tensorflow, "keras.ops"),
    "jax": (_jax, "jax.nn"),
    "mxnet": (_mxnet, "d2l's formula"),
}


def outputs(backend):
    """(kvattn's output, that of the framework's own attention), each (4, 6), of NumPy."""
    query, key, value, mask = call()
    arrays = [kvattn.asarray(x, backend=backend) for x in (query, key, value, mask)]
    ours = kvattn.attention(*arrays[:3], mask=arrays[3], backend=backend)
    with np.errstate(invalid="ignore"):  # NumPy warns of -inf - -inf, the others do not
        theirs = CALLS[backend][0](query, key, value, mask)
    return kvattn.to_numpy(ours), kvattn.to_numpy(theirs)


def draw(backends, path):
    """The picture of these backends, written to ``path``; returns the largest difference of kvattn's outputs, in eps."""
    pairs = [outputs(backend) for backend in backends]
    largest = max(np.abs(ours).max() for ours, _ in pairs)
    spread = np.ptp([ours for ours, _ in pairs], axis=0).max() / np.finfo("float32").eps / largest
    figure = Figure(figsize=(_inches(backends), HEIGHT), layout="constrained")
    axes = figure.subplots(2, len(backends), squeeze=False)
    for column, (backend, pair) in enumerate(zip(backends, pairs, strict=True)):
        titles = (NAMES[backend], CALLS[backend][1])
        for row, (matrix, title) in enumerate(zip(pair, titles, strict=True)):
            _matrix(axes[row, column], matrix, title, largest, pair[0])
    axes[0, 0].set_ylabel("kvattn", fontsize=11, fontweight="bold")
    axes[1, 0].set_ylabel("without it", fontsize=11)
    key = [Patch(facecolor="#d62728", label="NaN"), Patch(facecolor="none", edgecolor="#d62728", label="another number")]
    figure.legend(handles=key, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    return float(spread)


def pixels(backends):
    """How wide the picture of these backends is on the page: with few of them it is narrower, not higher."""
    return round(1000 * _inches(backends) / _inches(NAMES))


def _inches(backends):
    return 1.85 * len(backends) + 0.5


def caption(eps):
    """The picture in words; ``eps``: what draw returned."""
    return (
        "The same call, computed as this page was built. The third query has nothing to attend to, and the last key is padding "
        f"that holds NaN. Above, kvattn: zeros, no NaN, and no two outputs differ by more than {eps:.1f} eps of the largest. "
        "Below, the framework's own attention with the same mask."
    )


def _matrix(axes, matrix, title, largest, expected):
    axes.imshow(matrix, cmap="PuOr", vmin=-largest, vmax=largest)
    axes.set_title(title, fontsize=11 if matrix is expected else 8)
    axes.set_xticks([])
    axes.set_yticks([])
    for i, j in np.ndindex(*matrix.shape):
        corner = (j - 0.5, i - 0.5)
        if np.isnan(matrix[i, j]):
            axes.add_patch(_cell(corner, facecolor="#d62728", edgecolor="white"))
            axes.text(j, i, "NaN", ha="center", va="center", color="white", fontsize=6.5)
        elif not math.isclose(matrix[i, j], expected[i, j], rel_tol=1e-4, abs_tol=1e-4):
            axes.add_patch(_cell((corner[0] + 0.06, corner[1] + 0.06), size=0.88, facecolor="none", edgecolor="#d62728"))


def _cell(corner, size=1.0, **how):
    return Rectangle(corner, size, size, linewidth=1.2, **how)
