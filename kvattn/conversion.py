"""Arrays from elsewhere: what any framework's array is, and how what a caller gives becomes one of the tab that serves.

Framework-neutral: it reads shapes, dtypes and, where they can be read, values. Refuses what is no array, or has another
dtype, or lies on another device; what an option of a call may be, `checks` says.
"""

from __future__ import annotations

from contextlib import suppress
from numbers import Integral
from typing import Any

from kvattn import distances, registry

FLOATS = ("float64", "float32", "float16", "bfloat16")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

_names: dict[type, dict[Any, str]] = {}  # by the dtype's class first: torch.compile cannot hash another framework's dtypes


def dtype_name(x: Any) -> str:
    """The dtype of any framework's array, spelled as NumPy spells it."""
    dtype = x.dtype
    kind = type(dtype)
    if not hasattr(kind, "name"):  # PyTorch's, whose name is quick to find: torch.compile would compile anew when a table grew
        return getattr(dtype, "__name__", None) or str(dtype).rpartition(".")[2]
    names = _names.setdefault(kind, {})
    if dtype not in names:
        names[dtype] = dtype.name
    return names[dtype]


def device_name(x: Any) -> str:
    """The device of any framework's array, as PyTorch spells it: "cpu", "cuda:0"; "unknown" while it is traced."""
    device: Any = getattr(x, "device", getattr(x, "ctx", "cpu")) or "unknown"
    if hasattr(device, "platform"):  # jax's, whose str differs from release to release
        device = f"{device.platform}:{device.id}"
    name = str(device).lower().rpartition("device:")[2].replace("(", ":").rstrip(")")
    return "cpu" if name == "cpu:0" else name


def array(tab: Any, name: str, x: Any, like: Any = None) -> Any:
    """``x`` as an array of ``tab``, on the device of ``like``; lists of floats take its dtype too."""
    if tab.is_array(x):
        if getattr(x, "is_nested", False):
            raise TypeError(f"{name} is a nested tensor; expected a padded one, with valid_lens: x.to_padded_tensor(0.0)")
        compressed = hasattr(x, "is_sparse_csr") and not getattr(tab, "tracing", bool)()  # rows, columns or blocks of them;
        if getattr(x, "is_sparse", False) or (compressed and "sparse" in str(x.layout)):  # torch.compile would record this
            raise TypeError(f"{name} is a sparse tensor; expected a dense one: x.to_dense()")
        if getattr(x, "stype", "default") != "default":
            raise TypeError(f"{name} is a sparse array; expected a dense one: x.tostype('default')")
        if like is not None:
            same_device(name, x, like)
        return x
    device = like if like is not None and tab.is_array(like) else None
    given, x = x, neutral(tab, name, x)
    try:
        made = tab.asarray(x, like=device)
        if like is not None and isinstance(given, (list, tuple, float)) and dtype_name(made) == "float64":
            made = tab.asarray(x, dtype=dtype_name(like), like=device)
    except (TypeError, ValueError) as error:
        cure = next((f"; {words}" for part, words in DENSE.items() if hasattr(given, part)), "")
        raise TypeError(f"{name} must be an array{_such(x)}: {error}{cure}") from error
    return made


def same_device(name: str, x: Any, like: Any) -> None:
    """Raises ValueError where PyTorch's tensors lie on two devices and neither is moved; integers on the CPU are."""
    if (
        hasattr(x, "is_meta")
        and hasattr(like, "is_meta")
        and x.device != like.device
        and (x.is_meta or like.is_meta or (x.ndim and dtype_name(x) not in INTEGERS))
    ):
        raise ValueError(
            f"{name} is on the device {x.device}, and what it is given with on {like.device}: {name}.to({str(like.device)!r})"
        )


DENSE = {  # what a matrix that is not dense has, and what makes an array of it
    "to_tensor": "to_tensor() pads it with zeros, and valid_lens says how far each row goes",
    "dense_shape": "tf.sparse.to_dense makes a dense one",
    "toarray": "toarray() makes a dense one",
}


def _such(x: Any) -> str:
    """What ``x`` is, in the words of an error."""
    kind = type(x).__name__
    return f" of numbers that the backend has, not of {x.dtype}" if kind == "ndarray" else f", not {kind}"


def neutral(tab: Any, name: str, x: Any) -> Any:
    """``x`` as what ``tab.asarray`` is given: what is no framework's array as NumPy's own.

    Raises TypeError for what hides numbers or holds none.
    """
    traced = hasattr(tab, "tracing") and tab.tracing()  # torch.compile follows no more than this
    if traced or registry.home(x, registry.name_of(tab)) is not None:
        return x
    if hasattr(x, "mask") and hasattr(x, "filled"):
        raise TypeError(
            f"{name} is a masked array, whose mask is not read here: give {name}.filled(0.0), and say who may attend to "
            "what by mask= or valid_lens="
        )
    try:
        made = distances.values(x)
    except Exception as error:  # of whatever class it is
        raise TypeError(f"{name} must be an array{_such(x)}: {error}") from error
    if made.dtype.names is not None:
        raise TypeError(f"{name} is a structured array; expected numbers: one of its fields, {name}[{made.dtype.names[0]!r}]")
    if made.dtype.kind in "OSUMm":
        cure = f"convert it, {name}.astype('float32')" if hasattr(x, "astype") else "its rows are ragged, or no numbers"
        cure = next((words for part, words in DENSE.items() if hasattr(x, part)), cure)
        raise TypeError(f"{name} must be an array{_such(x)}: {cure}")
    return made


def floating(name: str, x: Any, first: tuple[str, Any] | None = None, tab: Any = None) -> Any:
    """``x``, converted where ``tab`` says that the framework does so itself. Raises TypeError unless it is floating point, and
    of the same dtype as ``first``, a (name, array) pair."""
    dtype = dtype_name(x)
    if dtype not in FLOATS:
        if type(x).__module__ == "numpy":
            neutral(tab, name, x)  # which may know better what is wrong
        cure = "; booleans are mask=, True where a query may attend" if name == "bias" and dtype.startswith("bool") else ""
        raise TypeError(f"{name} has dtype {dtype}; expected floating point: one of {', '.join(FLOATS)}{cure}")
    if first is not None and dtype != (expected := dtype_name(first[1])):
        if hasattr(tab, "converts") and tab.converts(x, first[1]):
            return tab.asarray(x, dtype=expected)
        raise TypeError(
            f"{name} has dtype {dtype} but {first[0]} has {expected}; convert one of them: nothing is promoted silently"
        )
    return x


def integers(tab: Any, name: str, x: Any, like: Any) -> Any:
    """``x`` as an array of an integer dtype; unsigned ones become int32, since positions are subtracted."""
    traced = hasattr(tab, "tracing") and tab.tracing()  # torch.compile knows no dtype of NumPy's arrays
    if not traced and not tab.is_array(x) and type(x).__module__ == "numpy":  # before MXNet makes another of uint64
        x = _signed(x)
    x = array(tab, name, x, like=like)
    if (dtype := dtype_name(x)) not in INTEGERS:
        raise TypeError(f"{name} has dtype {dtype}; expected an integer dtype")
    if not dtype.startswith("u"):
        return x
    values = _values(tab, x)
    if values is not None:
        return tab.asarray(_signed(values), like=x)
    return tab.signed(x) if hasattr(tab, "signed") else tab.asarray(x, dtype="int32")


def _values(tab: Any, x: Any) -> Any:
    """What `peek` shows; of a backend that makes signed integers in no other way, what it reads, if it is not traced."""
    values = peek(tab, x)
    if values is None and not hasattr(tab, "signed"):
        with suppress(Exception):  # of whatever class a framework raises for an array without values
            values = tab.to_numpy(x)
    return values


def _signed(x: Any) -> Any:
    """A NumPy array of unsigned integers as int32, those beyond it as the largest that may be added to; others as they are."""
    return x.clip(max=2**30).astype("int32") if x.dtype.name.startswith("u") and x.dtype.name in INTEGERS else x


def exact_integers(tab: Any, name: str, x: Any, like: Any) -> Any:
    """As `integers`, where far away is no one place. Raises ValueError for what some framework's int32 would not hold."""
    values, traced = None, hasattr(tab, "tracing") and tab.tracing()
    if tab.is_array(x):
        values = _values(tab, x) if dtype_name(x).startswith("u") else None
    elif not traced:
        with suppress(TypeError, ValueError):  # what is no array has its error below
            values = distances.values(x)
    if values is not None and values.size and values.dtype.kind in "iu":
        in_int32(name, values)
        x = values.astype("int32") if values.dtype.kind == "u" else x
    return integers(tab, name, x, like)


def in_int32(name: str, values: Any) -> None:
    """Raises ValueError for integers, NumPy's, that int32 does not hold."""
    if values.size and values.dtype.itemsize >= 4:
        least, most = int(values.min()), int(values.max())
        if not -(2**31) <= least <= most < 2**31:
            raise ValueError(f"{name} reach from {least} to {most}; expected int32's, from -2^31 to 2^31 - 1")


def is_integer(x: Any) -> bool:
    """Whether ``x`` is a Python or NumPy integer, and no bool."""
    return type(x) is int or (isinstance(x, Integral) and not isinstance(x, bool))


def peek(tab: Any, x: Any) -> Any:
    """The values of ``x`` as a NumPy array where they can be read, else None; backends need not offer it."""
    return tab.peek(x) if hasattr(tab, "peek") else None


def converted(tab: Any, name: str, x: Any, dtype: Any) -> Any:
    """``x`` as an array of ``tab``. Raises TypeError for a dtype that does not exist, or that this backend lacks."""
    if isinstance(dtype, str) and dtype not in (*FLOATS, *INTEGERS, "bool", "complex64", "complex128"):
        raise TypeError(f"dtype must be one of {', '.join(FLOATS)}, an integer dtype or bool, not {dtype!r}")
    try:
        return tab.asarray(neutral(tab, name, x), dtype=dtype)
    except TypeError as error:
        if dtype == "bfloat16":
            has = "NumPy has it after `import ml_dtypes`"
            raise TypeError(f"{registry.name_of(tab)} has no bfloat16 here ({error}); {has}") from None
        raise


def read(tab: Any, name: str, x: Any) -> Any:
    """``x``, of ``tab`` or neutral, as a NumPy array. Raises ValueError for what has no values."""
    if tab.is_array(x):
        if getattr(x, "is_meta", False):
            raise ValueError(f"{name} lies on PyTorch's meta device, which holds shapes and no values")
        return tab.to_numpy(x)
    return tab.to_numpy(neutral(tab, name, x))
