"""The walls: tabs are parallel, modules import only what their folder allows, importing kvattn loads nothing."""

import ast
import inspect
import re
import subprocess
import sys
import typing
from functools import cache
from pathlib import Path

import kvattn
from kvattn import checks, decoding, maps, namespace, prepare, signatures

PACKAGE = Path(kvattn.__file__).parent
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "mxnet", "flax", "numpy"}
TABS = ["numpy", "torch", "tensorflow", "jax", "mxnet"]
FRONTEND = ["__init__", "api", "scores", "prepare", "dispatch", "registry", "checks", "planning", "call", "multihead",
            "conversion"]  # fmt: skip


@cache
def parsed(path):
    return ast.parse(path.read_text())


def functions(tab):
    """The public functions of a tab, in order, with their signatures."""
    tree = parsed(PACKAGE / "backends" / f"{tab}.py")
    return [
        (node.name, ast.unparse(node.args)) for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"
    ]


def test_the_tabs_hold_the_same_functions_in_the_same_order():
    for tab in TABS[1:]:
        assert functions(tab) == functions("numpy"), tab


def test_every_function_of_the_spec_is_in_the_tabs():
    spec = set(kvattn.__all__) - {
        "KVCache",
        "alibi_slopes",
        "available_backends",
        "convert",
        "explain",  # a tab's part of it is `choose`
        "get_backend",
        "nadaraya_watson",
        "relative_position_bucket",
        "segments_from_cu_seqlens",
        "set_backend",
        "use_backend",
    }
    assert spec <= {name for name, _ in functions("numpy")}


def test_what_type_checkers_are_shown_is_what_the_functions_take():
    told = {name: x.annotation for name, x in inspect.signature(kvattn.attention).parameters.items()}
    options = {name: x.__forward_arg__ for name, x in signatures.Options.__annotations__.items()}
    returned = {"return_weights", "return_lse", "return_scores"}
    assert {n: x for n, x in told.items() if n not in {"query", "key", "value", "backend", "unknown"} | returned} == options
    overloaded = 0
    for name in kvattn.__all__:
        function = getattr(kvattn, name)
        takes = {*inspect.signature(function).parameters} - {"unknown"}
        if "options" in takes:  # attention's
            takes |= {*options} | (set() if name.endswith("_grad") else returned)
        *those, last = typing.get_overloads(function) or [function]
        for shown in (*those, last):
            given = {*inspect.signature(shown).parameters} - {"unknown"}
            given |= {*options} if "options" in given else set()
            rare = set() if shown is last else {"return_scores"}  # only the last overload has it, whose result is any
            assert given | {"options"} | rare & takes == takes | {"options"} or shown is function, name
            overloaded += shown is not function
    assert overloaded > 50


def test_a_namespaces_functions_show_the_signature_that_they_have():
    shown = namespace.functions("numpy")
    homes = (kvattn, kvattn.weights, decoding, maps)
    assert {*kvattn.__all__, *kvattn.weights.__all__, *decoding.__all__, "attention_maps"} == {*shown}
    for name, function in shown.items():
        real = inspect.signature(next(getattr(home, name) for home in homes if hasattr(home, name)))
        told = str(real).replace("backend: 'Any' = None", "backend: 'Any' = 'numpy'")
        assert str(inspect.signature(function)) == told.replace("backend: 'str')", "backend: 'str' = 'numpy')"), name


def imports(path):
    """The top packages a file imports, anywhere in it, and kvattn's own modules in full."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield from ([f"{base}.{alias.name}" for alias in node.names] if base.startswith("kvattn") else [base])


def test_the_frontend_imports_no_framework():
    for name in FRONTEND:
        used = {module.partition(".")[0] for module in imports(PACKAGE / f"{name}.py")}
        assert not used & FRAMEWORKS, name


def test_a_tab_imports_its_own_framework_and_no_other_tab():
    for tab in TABS:
        modules = set(imports(PACKAGE / "backends" / f"{tab}.py"))
        others = FRAMEWORKS - {tab, "numpy"}
        assert not {module.partition(".")[0] for module in modules} & others, tab
        assert not {module for module in modules if module.startswith("kvattn.backends")}, tab


def module(path):
    """The name that the file is imported by."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# From the lowest up: a module imports those of its own line and of the lines before. A folder/ is all else that is in it.
LINES = """
    backends call conversion distances install old_numpy patterns planning positions quiet registry rotation signatures timing
    checks multihead pairs partition
    kernels/
    backends/
    dispatch
    prepare
    scores
    api cache kvattn layouts
    decoding drawings layers/
    maps plot scaffold weights
    jax mxnet mxnet_compat namespace numpy tensorflow torch
    distributed/ integrations/ scaffold/
    conformance/ peers report terminal text
    bench lesson/ tab
    __main__ cli
"""


@cache
def picture():
    """What each module of the package imports of it, wherever in its file: inside functions, and for type checkers, too."""
    paths = {module(path): path for path in PACKAGE.rglob("*.py")}
    used = {name: {x if x in paths else x.rpartition(".")[0] for x in imports(path)} for name, path in paths.items()}
    return {name: (found & set(paths)) - {name} for name, found in used.items()}


def test_imports_go_in_no_circle():
    below = picture()
    while leaves := {name for name, used in below.items() if not used}:
        below = {name: used - leaves for name, used in below.items() if name not in leaves}
    assert not below


def test_no_import_goes_up():
    line = {name: i for i, names in enumerate(LINES.strip().splitlines()) for name in names.split()}
    inside = {name: name.removeprefix("kvattn.") for name in picture()}
    place = {name: line[x if x in line else f"{x.partition('.')[0]}/"] for name, x in inside.items()}
    assert {(name, x) for name, used in picture().items() for x in used if place[x] > place[name]} == set()


def test_nothing_is_pickled_or_evaluated_or_fetched():
    for path in PACKAGE.rglob("*.py"):
        roots = {module.partition(".")[0] for module in imports(path)}
        assert not roots & {"pickle", "marshal", "shelve", "socket", "urllib", "requests"}, path
        calls = {n.func.id for n in ast.walk(parsed(path)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not calls & {"eval", "exec"}, path


def test_importing_kvattn_loads_no_framework():
    code = f"import sys, kvattn; print(sorted(set(sys.modules) & {FRAMEWORKS!r}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_public_name_has_a_promise_and_a_place_in_the_reference():
    reference = (Path(__file__).parents[1] / "docs" / "reference" / "api.md").read_text()
    for name in kvattn.__all__:
        assert getattr(kvattn, name).__doc__, name
        assert re.search(rf"\b{name}\b", reference), name


def test_errors_name_every_score_and_normaliser():
    assert {*checks.SCORES, *checks.NORMALIZERS, "masked_softmax"} == {each.__name__ for each in prepare.tabbed}


def test_a_kernel_begins_with_the_formula_that_it_computes_and_where_that_is_from():
    for path in (PACKAGE / "kernels").rglob("*.py"):
        tree = parsed(path)
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if functions & {"attention", "attention_grad"} and path.stem not in ("gpu", "flash"):  # which call others
            begins = ast.get_docstring(tree)
            assert " = " in begins or "softmax(" in begins, path
            assert "Source" in begins or "source" in begins or "0 * NaN" in begins, path


def test_a_folder_of_kernels_says_what_each_of_its_files_computes():
    for folder in (PACKAGE / "kernels").glob("*/__init__.py"):
        heads = re.findall(r"(?:- |[;.] )((?:\w+, )*\w+):", ast.get_docstring(parsed(folder)))
        named = {name for head in heads for name in head.split(", ")}
        assert {path.stem for path in folder.parent.glob("*.py")} - {"__init__"} == named, folder


def private_names(path, own):
    """Names with an underscore that ``path`` uses and the package does not give."""
    for node in ast.walk(parsed(path)):
        names = [node.attr] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("kvattn"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        yield from (name for name in names if name.startswith("_") and not name.startswith("__") and name not in own)


def test_what_is_private_to_a_framework_bears_the_version_in_which_it_was_read():
    paths = [*PACKAGE.rglob("*.py")]
    nodes = [node for path in paths for node in ast.walk(parsed(path))]
    own = {"_asdict", "_fields", "_make", "_replace"} | {getattr(x, "name", None) for x in nodes}
    own |= {getattr(x, "id", getattr(x, "attr", None)) for x in nodes if isinstance(getattr(x, "ctx", None), ast.Store)}
    for path in paths:
        if names := {*private_names(path, own)}:
            assert re.search(r"(?s)read in\b[^\n]*\n?[^\n]* \d+\.\d+", path.read_text()), (path, names)


def test_every_text_that_a_mutant_replaces_stands_in_its_file():
    """Many mutants are made once a week only: a text that moved is noticed here."""

    def rows(file):
        """(name of the table, the first four of a row, None for what is no text), of each table of texts."""
        constants = {}
        for node in parsed(Path(__file__).parent / file).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                constants[node.targets[0].id] = node.value.value
            elif (
                isinstance(node, ast.Assign) and isinstance(node.value, ast.List) and isinstance(node.value.elts[0], ast.Tuple)
            ):
                for row in node.value.elts:
                    told = [x.value if isinstance(x, ast.Constant) else constants.get(getattr(x, "id", "")) for x in row.elts]
                    yield node.targets[0].id, told

    def source(*files):
        return "".join((PACKAGE / file).read_text() for file in files)

    count = 0
    for name, (first, second, third, *_) in rows("test_mutants.py"):
        if name == "ELSEWHERE":
            assert third in source(first), third
        for tab in TABS if name == "EVERYWHERE" else [name.lower()] if name == "NUMPY" else []:
            assert second in source(f"backends/{tab}.py", "call.py", "multihead.py"), (tab, second)
        count += 1
    for _, (first, _, third, *_) in rows("test_tiled_mutants.py"):
        assert third in source(f"kernels/numpy/{first}.py"), third
        count += 1
    for framework, files in (("jax", ["tiles"]), ("tensorflow", ["tiles", "plan"])):
        for _, (_, second, *_) in rows(f"test_tiled_{framework}_mutants.py"):
            assert second in source(*(f"kernels/{framework}/{file}.py" for file in files)), second
            count += 1
    for name, (_, second, *_) in rows("test_draws.py"):
        if name == "LAYER_FAULTS":
            assert second in source("layers/numpy.py"), second
            count += 1
    assert count > 100


# Functions outside layers with ten parameters or more: those that have attention's signature, or one that a framework asks for;
# and PyTorch's, which are asked before a call is described, since to describe a small one takes longer than to serve it.
MANY_PARAMETERS = {
    "api.attention", "api.attention_grad", "prepare.options", "call.Call.of", "plot.plot", "backends.Backend.attention",
    "backends.jax.attention", "backends.mxnet.attention", "backends.numpy.attention", "backends.tensorflow.attention",
    "backends.torch.attention", "distributed.jax.ring_attention", "distributed.torch.ring_attention",
    "integrations.transformers.forward", "kernels.torch.flash._Attention.forward", "kernels.jax.decoding._part",
    "backends.torch._at_once", "backends.torch._whole", "backends.torch._beside_one_mask", "kernels.torch.sdpa.small",
    "kernels.torch.operators._masked_backward",
}  # fmt: skip


def test_no_other_function_has_ten_parameters():
    """A private function is given the call's description, or its arrays in one tuple. Layers have d2l's constructors."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        holders = [(module(path), parsed(path))]
        holders += [(f"{module(path)}.{node.name}", node) for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)]
        for holder, node in holders:
            for function in node.body:
                if isinstance(function, ast.FunctionDef) and "layers" not in path.parts:
                    takes, decorators = function.args, " ".join(map(ast.unparse, function.decorator_list))
                    count = len(takes.posonlyargs) + len(takes.args) + len(takes.kwonlyargs)
                    if count >= 10 and not re.search(r"overload|triton\.jit", decorators):
                        found.add(f"{holder}.{function.name}".removeprefix("kvattn."))
    assert found == MANY_PARAMETERS, "give it the call, or its arrays in one tuple; else name it in MANY_PARAMETERS"


def test_a_call_like_one_before_drops_no_option():
    """`attention` and its gradients serve arrays like ones before at once: an option is passed on there, or asked about first,
    else it would be forgotten from the second call on."""
    for function in parsed(PACKAGE / "api.py").body:
        if isinstance(function, ast.FunctionDef) and function.name in ("attention", "attention_grad"):
            if any("overload" in ast.unparse(x) for x in function.decorator_list):
                continue
            told = set()
            for node in ast.walk(function):
                asked = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "plain"
                if asked or (isinstance(node, ast.If) and "plain and known" in ast.unparse(node.test)):
                    told |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            options = {x.arg for x in function.args.kwonlyargs}
            assert len(options) > 10
            assert options - told == {"backend"}, "pass it on where a call is remembered, or ask for it in `plain`"
