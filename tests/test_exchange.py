"""Arrays as they come from elsewhere: laid out in other ways, subclassed, of no numbers, exchanged by DLPack, without values.

Each has the answer that docs/reference/semantics.md gives, or an error that names the argument and the cure.
"""

import subprocess
import sys
import tempfile
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import chosen

import kvattn

rng = np.random.default_rng(0)
QUERY, KEY, VALUE = (rng.standard_normal(shape) for shape in ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6)))


class Sub(np.ndarray):
    def __matmul__(self, other):
        raise AssertionError("its own product")


class Exchanged:
    """What has DLPack's two methods and nothing else."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


class Read:
    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return self.x


class Described:
    def __init__(self, x):
        self.x = x
        self.__array_interface__ = x.__array_interface__


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def backwards(x):
    return np.ascontiguousarray(x[::-1, :, ::-1, ::-1])[::-1, :, ::-1, ::-1]


def unaligned(x):
    made = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    made[...] = x
    return made


def on_disk(x):
    with tempfile.TemporaryFile() as file:
        made = np.memmap(file, dtype=x.dtype, mode="w+", shape=x.shape)
    made[...] = x
    return made


TAKEN = {
    "read-only": read_only,
    "negative strides": backwards,
    "Fortran's order": np.asfortranarray,
    "every other one": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "unaligned": unaligned,
    "big-endian": lambda x: x.astype(">f8"),
    "memmap": on_disk,
    "a subclass": lambda x: x.view(Sub),
    "DLPack": Exchanged,
    "__array__": Read,
    "__array_interface__": Described,
}


def plain(x, like):
    """Whether ``x`` is just such an array as ``like``: of its class, and of the byte order of this machine."""
    return type(x) is type(like) and x.dtype == like.dtype and getattr(x.dtype, "isnative", True)


@pytest.mark.parametrize("kind", TAKEN)
def test_taken_as_the_numbers_that_they_hold(backend, kind):
    made = [TAKEN[kind](x) for x in (QUERY, KEY, VALUE)]
    expected = kvattn.attention(QUERY, KEY, VALUE, backend=backend)
    found = kvattn.attention(*made, backend=backend)
    assert plain(found, expected)
    np.testing.assert_allclose(kvattn.to_numpy(found), kvattn.to_numpy(expected), rtol=1e-12, atol=1e-14)
    beside = kvattn.attention(QUERY, made[1], VALUE, backend=backend)
    np.testing.assert_allclose(kvattn.to_numpy(beside), kvattn.to_numpy(expected), rtol=1e-12, atol=1e-14)
    grad = np.ones((2, 2, 3, 6))
    for x, y in zip(
        kvattn.attention_grad(*made, TAKEN[kind](grad), backend=backend),
        kvattn.attention_grad(QUERY, KEY, VALUE, grad, backend=backend),
        strict=True,
    ):
        assert plain(x, y)
        np.testing.assert_allclose(kvattn.to_numpy(x), kvattn.to_numpy(y), rtol=1e-12, atol=1e-14)
    own = kvattn.asarray(made[0], backend=backend)
    assert plain(own, kvattn.asarray(QUERY, backend=backend))
    np.testing.assert_array_equal(kvattn.to_numpy(own), QUERY)
    np.testing.assert_array_equal(kvattn.to_numpy(made[0]), QUERY)
    np.testing.assert_array_equal(kvattn.to_numpy(kvattn.softmax(made[0], backend=backend)).sum(-1).round(9), 1)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_matrix_is_an_array_of_two_axes(backend):
    two = [x[0, 0] for x in (QUERY, KEY, VALUE)]
    expected = kvattn.attention(*two, bias=np.ones((3, 5)), mask=np.eye(3, 5) < 1, backend=backend)
    found = kvattn.attention(
        *map(np.asmatrix, two), bias=np.asmatrix(np.ones((3, 5))), mask=np.asmatrix(np.eye(3, 5) < 1), backend=backend
    )
    assert plain(found, expected)
    np.testing.assert_allclose(kvattn.to_numpy(found), kvattn.to_numpy(expected), rtol=1e-12)


def test_options_of_another_byte_order(backend):
    given = {
        "mask": np.arange(5) < 4, "bias": np.arange(5.0) * np.ones((3, 1)), "valid_lens": np.array([2, 5]),
        "query_offset": np.array([1, 2]), "positions": np.array([[0, 4]] * 3), "sink": np.array([1.0, 2.0]),
    }  # fmt: skip
    for name, x in given.items():
        expected = kvattn.attention(QUERY, KEY, VALUE, **{name: x}, causal=name == "query_offset", backend=backend)
        other = x.astype(x.dtype.newbyteorder("S"))
        other.flags.writeable = False
        found = kvattn.attention(QUERY, KEY, VALUE, **{name: other}, causal=name == "query_offset", backend=backend)
        np.testing.assert_array_equal(kvattn.to_numpy(found), kvattn.to_numpy(expected), err_msg=name)


REFUSED = {  # what: (how it is made, words of the error)
    "masked": (lambda x: np.ma.masked_array(x, mask=x > 1), ["is a masked array", ".filled(0.0)", "mask="]),
    "masked, nothing of it": (np.ma.masked_array, ["is a masked array", ".filled(0.0)"]),
    "objects": (lambda x: x.astype(object), ["object", "astype('float32')"]),
    "structured": (lambda x: x.view([("a", float), ("b", float)]), ["is a structured array", "['a']"]),
    "a record array": (lambda x: x.view([("a", float), ("b", float)]).view(np.recarray), ["is a structured array", "['a']"]),
    "text": (lambda x: x.astype(str), ["<U32", "astype('float32')"]),
    "dates": (lambda x: np.zeros(x.shape, "M8[s]"), ["datetime64", "astype"]),
    "bytes without a meaning": (lambda x: np.zeros(x.shape, "V8"), ["V8|void64"]),
    "a dict": (lambda x: {"x": x}, ["must be an array, not dict"]),
    "a set": (lambda x: {1.0}, ["must be an array, not set"]),
    "a generator": (iter, ["must be an array, not", "iterator"]),
    "lists of nothing": (lambda x: [[None]], ["must be an array, not list"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_hides_numbers_or_holds_none_is_refused_by_name(backend, kind):
    make, words = REFUSED[kind]
    x = make(KEY)
    for call in (
        lambda: kvattn.attention(QUERY, x, VALUE, backend=backend),
        lambda: kvattn.attention_grad(QUERY, x, VALUE, np.ones((2, 2, 3, 6)), backend=backend),
        lambda: kvattn.explain(QUERY, x, VALUE, backend=backend),
    ):
        with pytest.raises(TypeError, match=r"^key ") as caught:
            call()
        assert [w for w in words if not any(each in str(caught.value) for each in w.split("|"))] == [], str(caught.value)


MASKED = {
    "mask": np.ones((3, 5), bool),
    "bias": np.ones((3, 5)),
    "valid_lens": np.array([2, 5]),
    "query_offset": np.array([1, 2]),
    "positions": np.zeros((3, 2), int),
    "segments": np.zeros((2, 5), int),
    "sink": np.array([1.0, 2.0]),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_options_are_refused_by_name(backend, name):
    masked = np.ma.masked_array(MASKED[name], mask=MASKED[name] == 1)
    masked = (np.zeros((2, 3), int), masked) if name == "segments" else masked
    with pytest.raises(TypeError, match=rf"^{name}.* is a masked array.*filled"):
        kvattn.attention(QUERY, KEY, VALUE, **{name: masked}, backend=backend)


def test_masked_arrays_are_refused_elsewhere(backend):
    masked, W = np.ma.masked_array(KEY[:, 0], mask=KEY[:, 0] > 1), np.eye(4)
    for call, name in (
        (lambda: kvattn.asarray(masked, backend=backend), "x"),
        (lambda: kvattn.convert(masked, backend), "x"),
        (lambda: kvattn.softmax(masked, backend=backend), "scores"),
        (lambda: kvattn.dot_score(masked, masked, backend=backend), "query"),
        (lambda: kvattn.rotary(masked, backend=backend), "x"),
        (lambda: kvattn.self_attention(masked, W, W, W, backend=backend), "x"),
        (lambda: kvattn.self_attention(KEY[:, 0], W, np.ma.masked_array(W), W, backend=backend), "W_k"),
    ):
        with pytest.raises(TypeError, match=rf"^{name} is a masked array"):
            call()


def test_no_axes_and_no_entries(backend):
    for x in (np.array(1.0), np.float64(1.0), 1.0):
        with pytest.raises(ValueError, match=r"key has shape \(\); expected at least 2 axes"):
            kvattn.attention(QUERY, x, VALUE, backend=backend)
    scale = kvattn.attention(QUERY, KEY, VALUE, scale=np.array(0.5), backend=backend)
    np.testing.assert_array_equal(
        kvattn.to_numpy(scale), kvattn.to_numpy(kvattn.attention(QUERY, KEY, VALUE, scale=0.5, backend=backend))
    )
    for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        x = np.zeros(shape, ">f4")[..., ::-1]
        found = kvattn.attention(x, x, x, backend=backend)
        assert tuple(found.shape) == shape
        assert kvattn.to_numpy(found).dtype == "float32"


BFLOAT16 = {"mxnet"} if find_spec("ml_dtypes") else {"mxnet", "numpy"}  # the backends that have none
DTYPES = ("float64", "float32", "float16", "int64", "bool", "bfloat16")


@pytest.mark.parametrize(
    ("here", "there", "dtype"),
    [(a, b, x) for a in chosen() for b in chosen() for x in DTYPES if x != "bfloat16" or not BFLOAT16 & {a, b}],
)
def test_convert_there_and_back(here, there, dtype):
    if dtype == "bfloat16" and find_spec("ml_dtypes"):
        import ml_dtypes  # noqa: F401 (teaches NumPy)
    values = QUERY > 0 if dtype == "bool" else (QUERY * 4).round() / 4
    x = kvattn.asarray(values, dtype=dtype, backend=here)
    y = kvattn.convert(x, there)
    assert kvattn.dispatch.home(y) in (there, None)
    assert kvattn.conversion.dtype_name(y).rstrip("_") == dtype
    back = kvattn.convert(y, here)
    assert plain(back, x)
    np.testing.assert_array_equal(kvattn.to_numpy(back), kvattn.to_numpy(x))


def test_a_dtype_that_is_not_there_is_told():
    """In a process of its own, where nobody has taught NumPy bfloat16."""
    code = "import kvattn\ntry: kvattn.asarray([1.0], dtype='bfloat16')\nexcept TypeError as error: print(error)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "numpy has no bfloat16 here" in said
    assert "import ml_dtypes" in said
    with pytest.raises(TypeError, match=r"dtype must be one of float64, .*, not 'flot32'"):
        kvattn.asarray([1.0], dtype="flot32")


def _numpy(x):
    return np.from_dlpack(x)


def _tensorflow(x):
    import tensorflow as tf

    return tf.experimental.dlpack.from_dlpack(tf.experimental.dlpack.to_dlpack(x))


def _mxnet(x):
    import mxnet as mx

    return mx.nd.from_dlpack(x.to_dlpack_for_read()).as_np_ndarray()


def _torch(x):
    import torch

    return torch.from_dlpack(x)


def _jax(x):
    import jax

    return jax.dlpack.from_dlpack(x, copy=True)


def test_results_leave_by_dlpack(backend):
    result = kvattn.attention(*(kvattn.asarray(x, dtype="float32", backend=backend) for x in (QUERY, KEY, VALUE)))
    expected = kvattn.to_numpy(result)
    own = {"numpy": _numpy, "torch": _torch, "tensorflow": _tensorflow, "jax": _jax, "mxnet": _mxnet}[backend]
    np.testing.assert_array_equal(kvattn.to_numpy(own(result)), expected)
    if hasattr(type(result), "__dlpack__"):  # which MXNet and TensorFlow 2.18 lack: they have functions of their own
        np.testing.assert_array_equal(np.from_dlpack(result), expected)
        np.testing.assert_array_equal(kvattn.to_numpy(kvattn.asarray(Exchanged(result), backend=backend)), expected)


def test_dlpack_that_fails_is_told(backend):
    class Away(Exchanged):
        def __dlpack_device__(self):
            return (2, 0)

        def __dlpack__(self, **options):
            raise BufferError("on a GPU")

    with pytest.raises(TypeError, match=r"^key must be an array, not Away: "):
        kvattn.attention(QUERY, Away(KEY), VALUE, backend=backend)


# ---- the frameworks' own, which are not plain


def torch_kinds():
    import torch

    class Own(torch.Tensor):
        pass

    x = torch.tensor(KEY)
    gives = {
        "a parameter": torch.nn.Parameter(x),
        "a subclass": x.as_subclass(Own),
        "a negative view": torch._neg_view(-x),
        "expanded": x[:1, :1].expand(2, 2, 5, 4),
        "transposed": x.mT.contiguous().mT,
    }
    refused = {
        "sparse": (x.to_sparse(), TypeError, ["key is a sparse tensor", "to_dense"]),
        "eighths of a number": (x.to(torch.float8_e5m2), TypeError, ["key has dtype float8_e5m2"]),
        "complex": (x.to(torch.complex128), TypeError, ["key has dtype complex128"]),
        "elsewhere": (x.to("meta"), ValueError, ["key is on the device meta", "on cpu: key.to('cpu')"]),
    }
    return gives, refused


def tensorflow_kinds():
    import keras
    import tensorflow as tf

    x = tf.constant(KEY)
    gives = {"a variable": tf.Variable(x), "Keras's variable": keras.Variable(KEY, dtype="float64")}
    refused = {
        "ragged": (tf.RaggedTensor.from_tensor(x), TypeError, ["key must be an array, not RaggedTensor", "to_tensor()"]),
        "sparse": (tf.sparse.from_dense(x), TypeError, ["key must be an array, not SparseTensor", "to_dense"]),
        "complex": (tf.cast(x, tf.complex128), TypeError, ["key has dtype complex128"]),
    }
    return gives, refused


def jax_kinds():
    import jax

    x = kvattn.asarray(KEY, backend="jax")
    gives = {"placed": jax.device_put(x, jax.devices()[0])}
    deleted = kvattn.asarray(KEY + 0, backend="jax")
    deleted.delete()
    refused = {
        "deleted": (deleted, RuntimeError, ["deleted"]),  # JAX's own word
        "complex": (x.astype(complex), TypeError, ["key has dtype complex"]),
    }
    return gives, refused


def mxnet_kinds():
    import mxnet as mx

    gives = {"of mx.nd": kvattn.asarray(KEY, backend="mxnet").as_nd_ndarray()}
    refused = {
        "sparse": (mx.nd.sparse.zeros("csr", (5, 4)), TypeError, ["key is a sparse array", "tostype('default')"]),
        "a symbol": (mx.sym.var("key"), TypeError, ["key must be an array, not Symbol"]),
    }
    return gives, refused


KINDS = {"torch": torch_kinds, "tensorflow": tensorflow_kinds, "jax": jax_kinds, "mxnet": mxnet_kinds}


@pytest.mark.parametrize("own", [name for name in chosen() if name in KINDS])
def test_a_frameworks_own_kinds(own):
    gives, refused = KINDS[own]()
    query, value = (kvattn.asarray(x, backend=own) for x in (QUERY, VALUE))
    for what, key in gives.items():
        expected = kvattn.attention(QUERY, kvattn.to_numpy(key), VALUE)
        found = kvattn.attention(query, key, value)
        np.testing.assert_allclose(kvattn.to_numpy(found), expected, rtol=1e-12, atol=1e-14, err_msg=what)
    for what, (key, error, words) in refused.items():
        with pytest.raises(error) as caught:
            kvattn.attention(query, key, kvattn.asarray(VALUE + 0, backend=own), window=1)
        assert [word for word in words if word not in str(caught.value)] == [], (what, str(caught.value))
