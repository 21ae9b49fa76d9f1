"""The known differences between backends: what one of them cannot do, and why. There are no other skips."""

from __future__ import annotations

from typing import NamedTuple


class Difference(NamedTuple):
    backend: str
    case: str  # "*" for every case, else a case's name or its group, or what no case can ask
    reason: str
    dtype: str = "*"  # for every dtype
    device: str = "*"  # "*" for every device, else a part of what the framework calls it: "cuda" of "cuda:0"


DIFFERENCES = (
    Difference(
        "mxnet",
        "dropout with an int rng in a hybridized block",
        "a graph holds what is no array, and would drop the same pairs at every run: a seed is refused there",
    ),
    Difference("numpy", "*", "NumPy has no bfloat16 of its own", "bfloat16"),
    Difference("mxnet", "*", "MXNet's NumPy interface has no bfloat16", "bfloat16"),
    Difference(
        "mxnet",
        "errors at trace time",
        "a hybridized block is traced with Symbols, of unknown shape and dtype: what is wrong with them is raised when it runs",
    ),
    Difference(
        "mxnet",
        "errors of your own functions in a hybridized block",
        "MXNet prints what an operator raises as it runs, and raises an MXNetError that does not name it",
    ),
    Difference(
        "mxnet",
        "gradients of your own functions",
        "backward crashes where np.where, npx.batch_dot or npx.fully_connected is scaled, then only compared: see the tab",
    ),
    Difference(
        "torch",
        "NaN and inf where values cannot be read",
        "on a GPU, compiled, traced or under torch.func, looking would wait, or cannot be: there NaN may reach the "
        "outputs of rows that may not see it, as in PyTorch's own attention; what no row of the batch entry sees is hidden",
    ),
    Difference(
        "torch",
        "NaN and inf in padding of a layer on a GPU",
        "a MultiHeadAttention that runs eagerly on a GPU leaves NaN that no query attends to where it is, and so in the "
        "gradients by its W_q, W_k and W_v: hiding it takes 5 to 15 % of a step; compiled, and as a function, it is hidden",
    ),
    Difference(
        "mxnet",
        "NaN and inf in padding of a hybridized layer",
        "a graph projects before its one operator of attention sees lengths and masks: NaN that no query attends to reaches "
        "the gradients by W_q, W_k and W_v",
    ),
    Difference(
        "mxnet",
        "NaN and inf in gradients of what NumPy does not serve",
        "with dropout, on another device and with functions of one's own, a loss of NaN at a row without keys and scores of "
        "-inf reach the gradients of others: MXNet's backward multiplies its zeros by them",
    ),
    Difference(
        "tensorflow",
        "NaN and inf in the blocks of a graph",
        "in a tf.function, calls that are worked through in blocks may carry NaN to rows that may not see it, and scores other "
        "than dot products to their gradients: a condition there breaks jacobians, vectorized_map and XLA",
    ),
    Difference(
        "jax",
        "NaN and inf where values cannot be read",
        "in what jit, vmap, checkpoint, shard_map or export trace, on a GPU, in arrays spread over devices, and under jax.grad "
        "of NaN that only the loss brings: there NaN may reach rows that may not see it; what no row of the batch entry sees "
        "is hidden",
    ),
    *(
        Difference(backend, "not finite", "NaN and inf may reach rows that may not see them: to look would wait", device="cuda")
        for backend in ("torch", "jax")
    ),
    *(
        Difference(
            backend,
            "sink: rounded once",
            "on a GPU half precision is rounded twice beside a sink: its kernels give the output in the arguments' dtype",
            device="cuda",
        )
        for backend in ("torch", "jax")
    ),
    *(
        Difference(
            "jax",
            group,
            "on a GPU projections give bfloat16, which cuDNN takes: in float32 a layer takes ten times as long",
            "bfloat16",
            "cuda",
        )
        for group in ("multi-head", "self-attention")
    ),
    *(
        Difference(
            "torch",
            f"rotary: {kind}, {scaling}",
            "on a GPU the largest position, by which it scales, would have to be waited for: an error asks for numbers",
            device="cuda",
        )
        for kind in ("halves", "interleaved")
        for scaling in ("dynamic", "longrope")
    ),
)


def difference(backend: str, dtype: str, case: str, group: str, device: str = "") -> Difference | None:
    """The row that excuses ``backend`` from this case in this dtype on this device, if there is one."""
    for row in DIFFERENCES:
        asked = row.backend == backend and row.dtype in ("*", dtype) and row.case in ("*", case, group)
        if asked and (row.device == "*" or row.device in device):
            return row
    return None
