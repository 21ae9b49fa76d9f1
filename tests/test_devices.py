"""The suite on a device: arrays and results lie there, the report names it, and one that is absent is an error."""

import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import chosen

import kvattn
from kvattn import conformance, dispatch
from kvattn.backends import numpy as tab
from kvattn.conformance import check, known_differences, native

PARTS = {"attention", "attention_grad", "multi_head_attention", "merge_attention", "write"}  # what the stand-in offers
ALL = conformance.cases()
CASES = [x for x in ALL if not check._missing(SimpleNamespace(**dict.fromkeys(PARTS, print)), x)]
FEW = [x for call in ("attention", "decoding", "split_attention") for x in [y for y in CASES if y.call == call][:3]]
FEW += [x for x in CASES if "capacity" in x.keywords][:1]
CUBLAS = "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context..."


class Array(np.ndarray):
    device = "cpu"

    def __array_finalize__(self, other):
        self.device = getattr(other, "device", "cpu")


def laid(x, device):
    made = np.array(x).view(Array)
    made.device = device
    return made


def several(x):
    return x if isinstance(x, tuple) else (x,)


def third_party(**changed):
    """NumPy's tab with arrays that lie on one of two devices, and refuses to compute with those of both."""

    def asarray(x, dtype=None, like=None):
        return laid(np.asarray(x, dtype=dtype), x.device if isinstance(x, Array) else getattr(like, "device", "cpu"))

    def wrapped(function):
        def call(*args, **options):
            flat = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
            (device,) = {x.device for x in (*flat, *options.values()) if isinstance(x, Array)}
            seen.append(device)
            results = function(*args, **options)
            results = [laid(x, device) if isinstance(x, np.ndarray) else x for x in several(results)]
            return tuple(results) if len(results) > 1 else results[0]

        return call

    @contextmanager
    def on(device):
        yield laid(0.0, device)

    seen = []
    offered = {name: wrapped(getattr(tab, name)) for name in PARTS}
    parts = {"is_array": lambda x: isinstance(x, Array), "asarray": asarray, "to_numpy": np.asarray, **offered}
    parts |= {name: getattr(tab, name) for name in ("scaled_dot_score", "softmax")}
    parts |= {
        "devices": lambda: {"cpu": "cpu", "card:0": "Card 3000", "card:1": "Card 4000"},
        "on": on,
        "__name__": "third_party",
    }
    return SimpleNamespace(seen=seen, **parts | changed)


def test_the_arrays_of_the_suite_lie_on_the_device():
    for asked, place, named in (("card", "card:0", "Card 3000"), ("CARD:1", "card:1", "Card 4000"), (None, "cpu", "")):
        backend = third_party()
        report = conformance.run(backend, FEW, dtypes=["float64"], device=asked)
        assert not report.failures, report.failures[0].message
        assert set(backend.seen) == {place}
        assert report.device == named


def test_a_result_that_lies_elsewhere_is_wrong():
    def attention(*args, **options):
        found = third_party().attention(*args, **options)
        return tuple(laid(x, "cpu") for x in found) if isinstance(found, tuple) else laid(found, "cpu")

    report = conformance.run(third_party(attention=attention), FEW[:1], dtypes=["float64"], device="card")
    assert "lies on cpu, the arguments on card:0" in report.failures[0].message


def test_a_device_that_is_not_there_is_an_error_that_says_what_is():
    with pytest.raises(ValueError, match=r"has no device 'card:2' here; it has cpu, card:0 \(Card 3000\), card:1"):
        conformance.run(third_party(), FEW, device="card:2")
    with pytest.raises(ValueError, match=r"cannot be told to run on 'cpu': it lacks devices\(\) and on\(device\)"):
        conformance.run(third_party(devices=None), FEW, device="cpu")


def test_the_notice_of_cublas_about_its_context_fails_no_case_and_another_warning_does():
    for message, fine in ((CUBLAS, True), ("deprecated", False)):

        def attention(*args, message=message, **options):
            warnings.warn(message, stacklevel=2)
            return third_party().attention(*args, **options)

        report = conformance.run(third_party(attention=attention), FEW[:1], dtypes=["float64"])
        assert bool(report.failures) != fine


def test_a_difference_that_is_known_of_one_device_excuses_nothing_on_another(monkeypatch):
    row = known_differences.Difference("third_party", "*", "on this card nothing works", device="card")
    monkeypatch.setattr(known_differences, "DIFFERENCES", (row,))
    for device, excused in (("card:1", [row.reason]), ("cpu", []), (None, [])):
        report = conformance.run(third_party(), FEW[:1], dtypes=["float64"], device=device)
        assert (report.excused, bool(report.results)) == (excused, not excused)


def test_every_backend_runs_where_it_is_told_to(backend, tab):
    report = conformance.run(backend, FEW[:2], device="cpu")
    assert not report.failures, report.failures[0].message
    assert report.device == tab.devices()["cpu"]
    for name in ("tpuu", "cuda:99"):
        with pytest.raises(ValueError, match=f"backend '{backend}' has no device '{name}' here; it has cpu"):
            conformance.run(backend, FEW, device=name)
    for name in tab.devices():
        with dispatch.on(tab, name) as like:
            assert tab.to_numpy(tab.asarray(np.arange(3.0), like=like)).tolist() == [0, 1, 2]


def test_a_cache_lies_where_an_array_lies():
    backend = third_party()
    cache = kvattn.KVCache.allocate((1, 4, 2), like=laid(0.0, "card:1"), backend=backend)
    assert (cache.key.device, cache.value.device) == ("card:1", "card:1")


def test_unsigned_lengths_whose_values_cannot_be_seen_do_not_wrap(backend, tab, monkeypatch):
    """On a GPU, and in traces: 2^32 - 1 was -1."""
    monkeypatch.setattr(tab, "peek", lambda x: None)
    cases = [case for case in ALL if case.name == "uint32 positions and offsets"]
    report = conformance.run(backend, cases, dtypes=["float32"])
    assert not report.failures, report.failures[0].message
    assert report.passed == 1
    for dtype, far in (("uint32", 2**32 - 1), ("uint64", 2**40), ("uint8", 255)):
        x = tab.asarray(np.array([far, 3, 0], dtype=dtype))
        if kvattn.conversion.dtype_name(x) == dtype:  # MXNet makes int64 of the larger ones
            found = tab.signed(x)
            assert kvattn.conversion.dtype_name(found) == "int32"
            assert tab.to_numpy(found).tolist() == [min(far, 2**30), 3, 0]


@pytest.mark.parametrize("framework", [name for name in chosen() if name == "torch"])
def test_a_layer_lies_where_its_arrays_lie(framework, monkeypatch):
    """Also its weights: PyTorch makes them on the CPU, whatever the inputs are."""
    tab = dispatch.load(framework)
    moved, to = [], tab.torch.nn.Module.to
    monkeypatch.setattr(tab.torch.nn.Module, "to", lambda layer, where: moved.append(str(where)) or to(layer, where))
    ones, likes, asarray = np.ones((1, 2, 1)), [], tab.asarray
    monkeypatch.setattr(tab, "asarray", lambda x, dtype=None, like=None: likes.append(like) or asarray(x, dtype, like))
    with dispatch.on(tab, "cpu") as like:
        native.run(tab, "AddNorm", {"norm_shape": 1}, {"gamma": np.ones(1), "beta": np.ones(1)}, [ones, ones], like=like)
    assert "cpu" in moved
    assert any(x is like for x in likes)
