"""Who serves a call: the argument, the arrays, use_backend, set_backend, the environment, numpy."""

import contextlib
import functools
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

import kvattn
from kvattn import dispatch, prepare, registry

X = np.eye(2, dtype=np.float32)


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    monkeypatch.delenv("KVATTN_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_process", None)


def test_the_argument_moves_neutral_data(backend, tab):
    for data in (X, X.tolist()):
        assert tab.is_array(kvattn.attention(data, data, data, backend=backend))


def test_a_frameworks_own_array_goes_to_it(backend, tab, monkeypatch):
    monkeypatch.setenv("KVATTN_BACKEND", "numpy")
    own = tab.asarray(X)
    assert tab.is_array(kvattn.attention(own, own, own))
    assert tab.is_array(kvattn.attention(own, X, X)), "NumPy arrays beside it are neutral"
    assert tab.is_array(kvattn.attention(X, X, own)), "whichever comes first"


def test_use_backend_comes_before_set_backend_before_the_environment(backend, monkeypatch):
    monkeypatch.setenv("KVATTN_BACKEND", backend)
    assert kvattn.get_backend() == backend
    kvattn.set_backend("numpy")
    assert kvattn.get_backend() == "numpy"
    with kvattn.use_backend(backend) as tab:
        assert kvattn.get_backend() == backend
        assert tab.is_array(kvattn.attention(X, X, X))
        with kvattn.use_backend("numpy"):
            assert kvattn.get_backend() == "numpy"
        assert kvattn.get_backend() == backend
    assert kvattn.get_backend() == "numpy"
    kvattn.set_backend(None)
    assert kvattn.get_backend() == backend


def test_use_backend_is_of_this_thread_only(backend):
    seen = []
    with kvattn.use_backend(backend):
        thread = threading.Thread(target=lambda: seen.append(kvattn.get_backend()))
        thread.start()
        thread.join()
    assert seen == ["numpy"]


def test_the_environment_moves_a_script(backend, monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy as np, kvattn\nx = np.eye(3, dtype=np.float32)\nout = kvattn.attention(x, x, x)\n"
        "print(kvattn.dispatch.home(out) or 'numpy', float(kvattn.to_numpy(out).sum()))\n"
    )
    monkeypatch.setenv("KVATTN_BACKEND", backend)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    name, total = done.stdout.split()[-2:]
    assert name == backend
    assert float(total) == pytest.approx(3)


def test_aliases():
    assert dispatch.canonical("PyTorch ") == "torch"
    assert dispatch.canonical("tf") == "tensorflow"


def test_arrays_of_two_frameworks_are_refused_by_name(backend, tab):
    """One backend is enough: a third party's class stands for the second framework."""
    third_party = type("Tensor", (), {"__module__": "torch.fake" if backend != "torch" else "mxnet.fake"})()
    if backend == "numpy":
        with pytest.raises(TypeError, match="query is an array of torch but backend='numpy'"):
            kvattn.attention(third_party, X, X, backend="numpy")
    else:
        with pytest.raises(TypeError, match=rf"query is an array of {backend} and key of \w+; convert one of them"):
            kvattn.attention(tab.asarray(X), third_party, X)


def test_an_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match="unknown backend 'torhc'; known: numpy, torch, tensorflow, jax, mxnet"):
        kvattn.attention(X, X, X, backend="torhc")


def test_an_absent_framework_says_what_to_install(monkeypatch):
    def absent():
        raise ModuleNotFoundError("No module named 'absent'")

    monkeypatch.setitem(registry.OURS, "absent", absent)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[absent\]"):
        kvattn.attention(X, X, X, backend="absent")


def test_a_broken_framework_keeps_its_own_traceback(monkeypatch):
    def broken():
        raise ImportError("libfoo.so: not found")

    monkeypatch.setitem(registry.OURS, "json", broken)
    with pytest.raises(ImportError, match="json is installed but does not import") as caught:
        dispatch.load("json")
    assert str(caught.value.__cause__) == "libfoo.so: not found"


class Point:
    """An entry point, as far as dispatch looks."""

    def __init__(self, module, name="mine"):
        self.name, self.value, self.module = name, f"{name}.tab", module

    def load(self):
        return self.module


def test_a_plugin_serves_its_own_arrays(monkeypatch):
    class Own:
        __module__ = "mine.arrays"

    tab = types.SimpleNamespace(is_array=lambda x: isinstance(x, Own), asarray=None, to_numpy=lambda x: X, attention=None)
    tab.asarray = tab.attention = lambda *a, **k: Own()
    monkeypatch.setattr(registry, "_plugins", lambda: {"mine": Point(tab)})
    monkeypatch.setattr(registry, "loaded", dict(registry.loaded))
    assert kvattn.to_numpy(Own()) is X
    assert "mine" in kvattn.available_backends()


class Foreign:
    """An array of a package that is no plugin's."""

    __module__ = "elsewhere.arrays"


def claiming(*classes):
    """A backend whose arrays these are."""
    tab = types.SimpleNamespace(is_array=lambda x: isinstance(x, classes), to_numpy=lambda x: X)
    tab.asarray = tab.attention = lambda *a, **k: tab
    return tab


@pytest.fixture
def plugins(monkeypatch):
    """The plugins that are installed: a dict to put them in."""
    installed = {}
    monkeypatch.setattr(registry, "_plugins", lambda: installed)
    monkeypatch.setattr(registry, "loaded", dict(registry.loaded))
    monkeypatch.setattr(registry, "_homes", {})
    return installed


def test_a_class_met_before_its_plugin_is_loaded_is_known_after(plugins):
    plugins["mine"] = Point(claiming(Foreign))
    assert dispatch.home(Foreign()) is None, "nothing tells of mine before it is loaded: the class is of another package"
    dispatch.load("mine")
    assert dispatch.home(Foreign()) == "mine"
    assert dispatch.choose(None, x=Foreign()) is dispatch.load("mine")


def test_a_class_met_before_its_plugin_is_installed_is_known_after(plugins):
    near = type("Near", (), {"__module__": "mine.arrays"})
    assert dispatch.home(near()) is None
    plugins["mine"] = Point(claiming(near))
    assert dispatch.home(near()) == "mine"


def test_a_plugin_is_found_once_it_is_installed(monkeypatch, tmp_path):
    """As pip installs one while the process runs: into a folder that was looked through before."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "loaded", dict(registry.loaded))
    monkeypatch.setattr(registry, "_homes", {})
    (tmp_path / "sometime.py").write_text(
        "class Own: pass\nis_array = lambda x: isinstance(x, Own)\nasarray = attention = to_numpy = lambda *a, **k: Own()\n"
    )
    import sometime

    assert "sometime" not in kvattn.available_backends()
    assert dispatch.home(sometime.Own()) is None
    (info := tmp_path / "sometime-1.0.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sometime\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvattn.backends]\nsometime = sometime\n")
    assert "sometime" in kvattn.available_backends()
    assert dispatch.home(sometime.Own()) == "sometime"


@pytest.mark.parametrize("alone_first", [False, True])
def test_a_class_that_two_plugins_claim_is_refused_by_both_names(plugins, alone_first):
    mine, yours = claiming(Foreign), claiming(Foreign)
    plugins |= {"mine": Point(mine), "yours": Point(yours, "yours")}
    dispatch.load("mine")
    if alone_first:
        assert dispatch.home(Foreign()) == "mine"
    dispatch.load("yours")
    for given in ({"x": Foreign()}, {"x": X, "y": Foreign()}):
        with pytest.raises(TypeError, match="'mine' and 'yours' both claim arrays of class Foreign; say which: backend='mine'"):
            dispatch.choose(None, **given)
    assert dispatch.choose("yours", x=Foreign()) is yours
    assert dispatch.choose(mine, x=Foreign()) is mine
    with pytest.raises(TypeError, match="both claim"):
        dispatch.choose("numpy", x=Foreign())


def test_the_packages_are_looked_through_once(monkeypatch):
    """An unknown class is looked up at every call: it costs a look at the folders' times, and no more."""
    import importlib.metadata

    registry.known_backends()
    monkeypatch.setattr(importlib.metadata, "entry_points", None)
    assert dispatch.home(Foreign()) is None
    assert registry.known_backends()


def test_a_plugin_that_lacks_a_function_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "_plugins", lambda: {"mine": Point(types.SimpleNamespace(is_array=callable))})
    with pytest.raises(TypeError, match="missing: asarray, to_numpy, attention"):
        dispatch.load("mine")


def test_lists_take_the_dtype_of_the_arrays_beside_them(backend):
    out = kvattn.attention(X, X.tolist(), X.tolist(), bias=[[0.0, 1.0]], backend=backend)
    assert kvattn.to_numpy(out).dtype == np.float32


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "bool"])
def test_conversion_keeps_the_dtype(backend, tab, dtype):
    x = np.array([[0, 1], [1, 0]], dtype)
    there = kvattn.convert(x, backend)
    assert tab.is_array(there)
    back = kvattn.to_numpy(there)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, x)
    assert kvattn.convert(there, backend) is there


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 0, 4)])
def test_arrays_of_no_elements_and_of_no_axes_are_converted_too(backend, shape):
    """MXNet takes zeros in a shape for sizes to come, unless npx.set_np() was called."""
    x = kvattn.asarray(np.ones(shape, "float32"), backend=backend)
    for dtype in ("float64", "float16", "float32"):
        found = kvattn.to_numpy(kvattn.asarray(x, dtype=dtype))
        assert (found.dtype, found.shape) == (dtype, shape)
        assert kvattn.to_numpy(kvattn.convert(kvattn.asarray(np.ones(shape, dtype)), backend)).shape == shape


def test_a_call_that_was_checked_before_is_not_checked_again(backend, monkeypatch):
    x = kvattn.asarray([[1.0, 2.0], [3.0, 4.0]], dtype="float32", backend=backend)
    first = kvattn.to_numpy(kvattn.attention(x, x, x, causal=True))
    monkeypatch.setattr(kvattn.checks, "pairs", None)
    assert (kvattn.to_numpy(kvattn.attention(x, x, x, causal=True)) == first).all()
    with pytest.raises(TypeError, match="not callable"):  # other shapes are looked at
        kvattn.attention(x[:1], x, x)


def test_what_was_checked_for_one_backend_is_checked_again_for_another():
    x = np.ones((2, 2), "float32")
    kvattn.attention(x, x, x)
    for other in kvattn.available_backends()[1:2]:
        with kvattn.use_backend(other) as tab:
            assert tab.is_array(kvattn.attention(x, x, x))
    assert isinstance(kvattn.attention(x, x, x), np.ndarray)


INPUTS = ("query", "key", "value")
SHAPES = {"query": (2, 4, 3, 5), "key": (2, 2, 6, 5), "value": (2, 2, 6, 7)}


@pytest.fixture
def checked(backend, tab, monkeypatch):
    """Arrays of the backend that have been served before, with another query, key and value of each number of features."""
    monkeypatch.setattr(prepare, "_remembered", {})
    arrays = {name: tab.asarray(np.ones(shape, "float32")) for name, shape in SHAPES.items()}
    kvattn.attention(*arrays.values())
    assert prepare.remembered(*arrays.values(), None), "else there is nothing to test: the call was not remembered"
    return arrays


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32"])
@pytest.mark.parametrize("which", INPUTS)
def test_after_a_good_call_another_dtype_is_refused_as_before(tab, checked, which, dtype):
    checked[which] = tab.asarray(np.ones(SHAPES[which]), dtype=dtype)
    for options in ({}, {"causal": True}, {"scale": 1.0}):
        with pytest.raises(TypeError, match=dtype):
            kvattn.attention(*checked.values(), **options)


@pytest.mark.parametrize(
    ("which", "shape"),
    [
        *(("query", shape) for shape in ((2, 4, 3, 4), (2, 3, 3, 5), (3, 4, 3, 5), (4, 3, 5))),
        *(("key", shape) for shape in ((2, 2, 6, 4), (2, 2, 5, 5), (2, 3, 6, 5), (3, 2, 6, 5), (2, 6, 5))),
        *(("value", shape) for shape in ((2, 2, 5, 7), (2, 4, 6, 7), (3, 2, 6, 7), (2, 6, 7))),
    ],
)
def test_after_a_good_call_another_shape_is_refused_as_before(tab, checked, which, shape):
    checked[which] = tab.asarray(np.ones(shape, "float32"))
    with pytest.raises(ValueError, match="has shape"):
        kvattn.attention(*checked.values())


OPTIONS = {
    "mask": np.arange(12).reshape(2, 1, 1, 6) % 2 > 0,
    "bias": np.ones((4, 3, 6), "float32"),
    "valid_lens": np.array([6, 2], "int32"),
}
WRONG = {  # what is refused after such options were served
    "mask": (np.ones((2, 1, 1, 5), bool), np.ones((2, 1, 1, 6), "float32"), np.ones((3, 1, 1, 6), bool)),
    "bias": (np.ones((3, 3, 6), "float32"), np.ones((4, 3, 6), "float64"), np.ones((4, 3, 6), "int32")),
    "valid_lens": (np.array([6, 2, 1], "int32"), np.array([6, 2], "float32"), np.array([6, -1], "int32")),
}


@pytest.mark.parametrize("which", WRONG)
def test_after_a_good_call_with_options_others_are_refused_as_before(tab, checked, which):
    options = {name: tab.asarray(x) for name, x in OPTIONS.items()}
    for given in (options, {which: options[which]}):
        expected = kvattn.attention(*checked.values(), **given)
        for wrong in WRONG[which]:
            with pytest.raises((TypeError, ValueError), match=which):
                kvattn.attention(*checked.values(), **given | {which: tab.asarray(wrong)})
        known = prepare.remembered(*checked.values(), None)
        assert known.fits(checked["query"], *(given.get(name) for name in OPTIONS)), "else there is nothing to test"
        neutral = given | {which: OPTIONS[which]}
        for again in (given, neutral):
            np.testing.assert_array_equal(
                kvattn.to_numpy(kvattn.attention(*checked.values(), **again)), kvattn.to_numpy(expected)
            )


def test_after_a_good_call_a_gradient_of_another_kind_is_refused_as_before(tab, checked):
    options = {name: tab.asarray(x) for name, x in OPTIONS.items()}
    back = tab.asarray(np.ones((2, 4, 3, 7), "float32"))
    wrong = (np.ones((2, 4, 3, 5), "float32"), np.ones((2, 4, 3, 7)), np.ones((2, 4, 3, 7), "int32"))
    for given in ({}, options, {"causal": True, "window": (2, 0)}):
        expected = kvattn.attention_grad(*checked.values(), back, **given)
        for x in wrong:
            with pytest.raises((TypeError, ValueError), match="grad_output"):
                kvattn.attention_grad(*checked.values(), tab.asarray(x), **given)
        for name, others in WRONG.items():
            for x in others if name in given else ():
                with pytest.raises((TypeError, ValueError), match=name):
                    kvattn.attention_grad(*checked.values(), back, **given | {name: tab.asarray(x)})
        known = prepare.remembered(*checked.values(), None)
        assert known.fits(checked["query"], *(given.get(name) for name in OPTIONS), back), "else there is nothing to test"
        for found, first in zip(kvattn.attention_grad(*checked.values(), back, **given), expected, strict=True):
            np.testing.assert_array_equal(kvattn.to_numpy(found), kvattn.to_numpy(first))
    others = {"window": (-1, (1, 2, 3), 1.5, "2"), "scale": (float("inf"), "2"), "softcap": (0, -1.0, "2")}
    for name, wrong in ((name, x) for name, each in others.items() for x in each):
        for call, extra in ((kvattn.attention, ()), (kvattn.attention_grad, (back,))):
            with pytest.raises((TypeError, ValueError), match=name):
                call(*checked.values(), *extra, **{name: wrong})


def test_after_a_good_call_an_rng_that_is_none_is_refused_as_before(tab, checked):
    back = tab.asarray(np.ones((2, 4, 3, 7), "float32"))
    for call, extra in ((kvattn.attention, ()), (kvattn.attention_grad, (back,))):
        call(*checked.values(), *extra, rng=0)
        with pytest.raises(ValueError, match="rng is -1"):
            call(*checked.values(), *extra, rng=-1)


def test_after_a_good_call_a_gradients_wrt_may_be_an_array_of_names(tab, checked):
    back = tab.asarray(np.ones((2, 4, 3, 7), "float32"))
    expected = kvattn.attention_grad(*checked.values(), back)
    found = kvattn.attention_grad(*checked.values(), back, wrt=np.array(INPUTS))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(kvattn.to_numpy(x), kvattn.to_numpy(y))


@pytest.mark.parametrize("called", [1, 2])
def test_the_gradients_of_another_backend_are_looked_at_in_every_call(called):
    tab = dispatch.load("numpy")
    gradients, asked = {"two": lambda x: x[:2], "a list": list, "wide": lambda x: [y.astype("float64") for y in x]}, []

    def attention_grad(*arrays, wrt, **options):
        asked.append({*options})
        return gradients[which](tab.attention_grad(*arrays, wrt=wrt, **options))

    x = np.ones((3, 4), "float32")
    for which in gradients:
        theirs = types.SimpleNamespace(**{**vars(tab), "attention_grad": attention_grad})
        for _ in range(called - 1):
            with contextlib.suppress(TypeError):
                kvattn.attention_grad(x, x, x, x, backend=theirs)
        if which == "two":
            with pytest.raises(TypeError, match="returned no tuple of 3 gradients"):
                kvattn.attention_grad(x, x, x, x, backend=theirs)
        else:
            found = kvattn.attention_grad(x, x, x, x, backend=theirs)
            assert type(found) is tuple
            assert {y.dtype.name for y in found} == {"float32"}
    assert {"scale", "dropout", "rng", "positions", "score"} < asked[0], "which it may read without a default"
    assert all(each == asked[0] for each in asked)


@pytest.mark.parametrize("which", INPUTS)
def test_after_a_good_call_neutral_data_is_converted_and_a_strangers_array_refused(tab, checked, backend, which):
    class Theirs:
        """An array of another framework, of the shape and dtype of one that was served."""

        __module__ = "torch.fake" if backend != "torch" else "mxnet.fake"

        def __init__(self, x):
            self.shape, self.dtype = x.shape, x.dtype

    theirs = {name: Theirs(x) for name, x in checked.items()}
    for neutral in (np.ones(SHAPES[which], "float32"), np.ones(SHAPES[which]).tolist()):
        checked[which] = neutral
        assert tab.is_array(kvattn.attention(*checked.values()))

    for strange in ([which], INPUTS):  # one of them, and then all
        with pytest.raises(TypeError, match=f"{strange[0]} is an array|{strange[0]} of"):
            kvattn.attention(*(checked | {name: theirs[name] for name in strange}).values(), backend=backend)


def test_after_a_good_call_another_backend_is_still_another(backend, tab, checked):
    mine = types.SimpleNamespace(**{name: getattr(tab, name) for name in ("is_array", "asarray", "to_numpy")})
    mine.attention = lambda *args, **options: "mine"
    for _ in range(2):
        assert kvattn.attention(*checked.values(), backend=mine) == "mine"
        assert tab.is_array(kvattn.attention(*checked.values(), backend=tab))
        assert tab.is_array(kvattn.attention(*checked.values(), backend=backend))
        assert tab.is_array(kvattn.attention(*checked.values()))


def test_after_a_good_call_of_another_score_the_features_of_a_dot_product_are_looked_at(backend, tab, monkeypatch):
    monkeypatch.setattr(prepare, "_remembered", {})
    query, key, value = (tab.asarray(np.ones(shape, "float32")) for shape in ((3, 2), (4, 5), (4, 1)))
    score = functools.partial(kvattn.multiplicative_score, W=np.ones((2, 5), "float32"))
    kvattn.attention(query, key, value, score=score)
    for options in ({}, {"score": kvattn.dot_score}, {"score": kvattn.cosine_score}):
        with pytest.raises(ValueError, match="features"):
            kvattn.attention(query, key, value, **options)


def test_calls_that_were_checked_are_forgotten_before_they_fill_memory(backend, tab, monkeypatch):
    monkeypatch.setattr(prepare, "_remembered", {})
    monkeypatch.setattr(prepare, "REMEMBERED", 3)
    for n in range(1, 8):
        x = tab.asarray(np.ones((n, 2), "float32"))
        kvattn.attention(x, x, x)
        assert 1 <= len(prepare._remembered) <= 3


# ---- plugins


class Installed:
    """Packages that declare backends, in a folder of sys.path, as pip leaves them."""

    def __init__(self, folder):
        self.folder = folder

    def add(self, name, code, points, natives=(), raw=None):
        (self.folder / f"{name}.py").write_text(code)
        (info := self.folder / f"{name}-1.0.dist-info").mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = ["[kvattn.backends]", *points, "[kvattn.native_packages]", *natives]
        (info / "entry_points.txt").write_bytes(raw or "\n".join(lines).encode())


BACKEND = """
import theirs
is_array = lambda x: isinstance(x, theirs.Own)
asarray = to_numpy = lambda *a, **k: theirs.Own()
def attention(query, key, value, **keywords): return theirs.Own()
"""


@pytest.fixture
def installed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "loaded", dict(registry.loaded))
    monkeypatch.setattr(registry, "_homes", {})
    monkeypatch.setattr(registry, "_installed", None)
    (tmp_path / "theirs.py").write_text("class Own: shape, dtype = (), None\n")
    before = set(sys.modules)
    yield Installed(tmp_path)
    for name in set(sys.modules) - before:  # each test writes modules of these names anew
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_an_array_finds_its_plugin_by_the_native_package_and_no_other_is_loaded(installed):
    installed.add("aplugin", "raise OSError('a broken library')", ["abroken = aplugin"], ["abroken = elsewhere"])
    installed.add("bplugin", BACKEND, ["bworks = bplugin"], ["bworks = theirs"])
    import theirs

    class Derived(theirs.Own):
        pass

    assert "bplugin" not in sys.modules
    assert dispatch.home(np.eye(2)) is dispatch.home([1.0]) is dispatch.home(object()) is None
    assert {"abroken": "aplugin", "bworks": "bplugin"}.items() <= registry.plugins().items()
    assert "bplugin" not in sys.modules, "that it is listed and asked about other arrays loads nothing"
    for own in (Derived(), theirs.Own()):
        assert dispatch.choose(None, x=own) is sys.modules["bplugin"]
    with pytest.raises(ImportError, match="the plugin aplugin fails to load: a broken library"):
        dispatch.load("abroken")


def test_a_broken_plugin_for_the_same_arrays_is_of_no_account_where_another_takes_them(installed):
    installed.add("aplugin", "raise OSError('a broken library')", ["abroken = aplugin"], ["abroken = theirs"])
    import theirs

    with pytest.raises(ImportError, match="a broken library"):
        dispatch.home(theirs.Own())
    installed.add("bplugin", BACKEND, ["bworks = bplugin"], ["bworks = theirs"])
    registry._installed = None
    assert dispatch.home(theirs.Own()) == "bworks"


@pytest.mark.parametrize("raw", [b"\xff\xfe\x00", b"[kvattn.backends]\nno equals sign\n[[\n", b"= \n[kvattn.backends]\n=\n"])
def test_metadata_that_cannot_be_read_hides_no_other_plugin(installed, raw):
    installed.add("aplugin", "", [], raw=raw)
    installed.add("bplugin", BACKEND, ["bworks = bplugin"])
    assert registry.plugins()["bworks"] == "bplugin"
    assert dispatch.load("bworks").attention
    assert set(registry.known_backends()) >= {"numpy", "torch", "bworks"}


def test_a_plugin_that_lacks_a_keyword_of_every_call_is_told_which(installed):
    code = BACKEND.replace("**keywords", "*, mask=None, bias=None, score=None, normalize=None, valid_lens=None, causal=False")
    installed.add("bplugin", code, ["bworks = bplugin"])
    with pytest.raises(TypeError, match=r"missing: attention's keywords query_offset, window, .*, return_lse$"):
        dispatch.load("bworks")


@pytest.mark.parametrize(
    ("lacks", "call"),
    {
        "merge_attention": lambda tab: kvattn.merge_attention([X], [X[0]], backend=tab),
        "softmax": lambda tab: kvattn.softmax(X, backend=tab),
        "dot_score": lambda tab: kvattn.attention(X, X, X, score=kvattn.dot_score, backend=tab),
        "gaussian_kernel": lambda tab: kvattn.nadaraya_watson(X, X, X, backend=tab),
        "rotary": lambda tab: kvattn.rotary(X, backend=tab),
        "attention_grad": lambda tab: kvattn.attention_grad(X, X, X, X, backend=tab),
        "self_attention": lambda tab: kvattn.self_attention(X, X, X, X, backend=tab),
        "multi_head_attention": lambda tab: kvattn.multi_head_attention(
            X, X, X, {"W_q": X, "W_k": X, "W_v": X}, num_heads=1, backend=tab
        ),
        "write": lambda tab: kvattn.KVCache(X, X, 2).extend(X, X, backend=tab),
    }.items(),
)
def test_a_plugin_without_an_optional_function_says_so(lacks, call):
    tab = dispatch.load("numpy")
    bare = types.SimpleNamespace(**{name: getattr(tab, name) for name in registry.REQUIRED}, __name__="bare")
    with pytest.raises(NotImplementedError, match=f"^backend 'bare' offers no {lacks}; what it may offer"):
        call(bare)


def test_keywords_that_come_later_may_be_lacking():
    def attention(query, key, value, *, score=None, normalize=None, mask=None, bias=None, valid_lens=None, causal=False,
                  query_offset=0, window=None, positions=None, scale=None, softcap=None, dropout=0.0, rng=None,
                  return_weights=False, return_lse=False):  # fmt: skip
        return query

    lacks = registry.lacking(types.SimpleNamespace(attention=attention))
    assert "sink" in lacks
    assert not {*lacks} & {*registry.ALWAYS}
    for tab in registry.loaded.values():
        assert registry.lacking(tab) == []
