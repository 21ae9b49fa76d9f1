"""A case as a program that prints what a backend gives, with what it should give as comments, for a report of a fault."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvattn import checks, layers
from kvattn.conformance import check, tolerance
from kvattn.conformance.cases import Case


def code(made: Case, failure: check.Result, backend: str, device: str | None = None) -> str:
    """The call of a case as a program, and what it should give."""
    lines = _of_layer(made, failure, backend) if made.call in layers.LAYERS else _of_function(made, failure, backend, device)
    lines += ["# " + line for line in failure.message.strip().splitlines()]
    answer = made.answer.get("output" if failure.what == check.OUTPUT_ONLY else failure.what)
    if answer is not None and answer.size <= 64:
        lines.append(f"# expected {failure.what}: {answer.tolist()}")
    return "\n".join(lines) + "\n"


# ---- functions


def _of_function(made: Case, failure: check.Result, backend: str, device: str | None) -> list[str]:
    given = dict(made.arguments)
    grad_output, grad_scores = given.pop("grad_output", None), given.pop("grad_scores", None)
    keywords = {name: _keyword(name, x, backend) for name, x in made.keywords.items()}
    inputs, others = _inputs(made.call, given)
    options = {n: x for n, x in keywords.items() if not n.startswith("return_")} | others
    keywords_code = "".join(f", {n}={x}" for n, x in options.items() if n not in ("splits", "capacity"))
    lines = [*_head(failure.dtype, backend, device, "functions.function(" in keywords_code)]
    lines += [f"{name} = {_literal(x, 'array')}" for name, x in given.items()]
    if made.call == "split_attention":
        return [*lines, *_parts(options["splits"], given["key"].shape[-2], keywords_code, backend)]
    if made.call == "decoding":
        cache = _cache(options.get("capacity"), failure.dtype, backend)
        return [*lines, cache, *_steps(given["query"].shape[-2], inputs, keywords_code, backend)]
    call, asked = made.call, {n: x for n, x in keywords.items() if n.startswith("return_")}
    if failure.what.startswith("grad_") and call != "self_attention":
        lines.append(f"grad_output = {_literal(grad_output, 'array')}")
        call, inputs = f"{call}_grad", [*inputs, "grad_output"]
        through = {}
        if grad_scores is not None:  # in the scores' dtype
            wide = "float32" if failure.dtype in tolerance.HALF else failure.dtype
            lines.append(f"grad_scores = {_literal(grad_scores.astype(wide))}")
            through = {"return_scores": keywords["return_scores"], "grad_scores": "grad_scores"}
        asked = {"wrt": repr([failure.what.removeprefix("grad_")])} | through
    elif failure.what == check.OUTPUT_ONLY:
        asked = {}
    keywords_code += "".join(f", {n}={x}" for n, x in asked.items())
    return [*lines, f"print(kvattn.{call}({', '.join(inputs)}{keywords_code}, backend={backend!r}))"]


def _head(dtype: str, backend: str, device: str | None, of_positions: bool) -> list[str]:
    """What is imported, and the function by which the program makes its arrays."""
    lines = ["from functools import partial", *["from kvattn.conformance import functions"] * of_positions, ""]
    lines += ["import numpy as np", "from numpy import inf, nan", "", "import kvattn", ""]
    made_by = f"kvattn.asarray(x, dtype={dtype!r}, backend={backend!r})"
    if device is not None:
        lines = ["from contextlib import ExitStack", *lines]
        lines += [f"tab, stack = kvattn.dispatch.load({backend!r}), ExitStack()"]
        lines += [f"like = stack.enter_context(tab.on(kvattn.dispatch.device(tab, {device!r})))", ""]
        made_by = f"tab.asarray(x, dtype={dtype!r}, like=like)"
    return [*lines, f"def array(x):\n    return {made_by}", ""]


def _keyword(name: str, x: Any, backend: str) -> str:
    """A keyword's value: the name of a function, with its parameters, or a literal."""
    if name not in (*check.FUNCTIONS, "mask", "bias"):
        return _literal(x, "array")
    function, given_parameters = check._named(x)
    parameters = "".join(f", {n}={_literal(p, 'array')}" for n, p in given_parameters.items())
    if name in ("mask", "bias"):
        return f"functions.function(kvattn.dispatch.load({backend!r}), {function!r}{parameters})"
    return f"partial(kvattn.{function}{parameters})" if parameters else f"kvattn.{function}"


def _inputs(call: str, given: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The arguments that stand by place, params among them, and by name the arrays that are options."""
    params = [name for name in checks.PARAMS if name in given and call in check.PROJECTED]
    if call == "self_attention":  # whose sink is an option
        params = [name for name in params if name != "sink"]
    inputs: list[str] = [name for name in ("query", "key", "value", "x") if name in given]
    options = {name: name for name in given if name not in (*params, *inputs)}
    if call == "self_attention":
        return [*inputs, *params], options
    as_dict = "{" + ", ".join(f"{name!r}: {name}" for name in params) + "}"
    return [*inputs, as_dict] if params else inputs, options


def _parts(splits: str, m: int, keywords_code: str, backend: str) -> list[str]:
    """Attention over parts of the keys, merged."""
    part = f"query, key[..., i:j, :], value[..., i:j, :]{keywords_code}, return_lse=True, backend={backend!r}"
    return [
        f"ends = [0, *{splits}, {m}]",
        f"parts = [kvattn.attention({part}) for i, j in zip(ends, ends[1:])]",
        "print(kvattn.merge_attention(*map(list, zip(*parts)), return_lse=True))",
    ]


def _cache(capacity: str | None, dtype: str, backend: str) -> str:
    if capacity is None:
        return "cache = kvattn.KVCache()"
    lead, size = capacity.rsplit(", ", 1)
    return f"cache = kvattn.KVCache.allocate({lead}), {size[:-1]}, dtype={dtype!r}, like=query, backend={backend!r})"


def _steps(n: int, inputs: list[str], keywords_code: str, backend: str) -> list[str]:
    """Multi-head attention with a cache: two positions, then one at a time."""
    *arrays, params = inputs
    step = ", ".join([*(f"{x}[..., i:j, :]" for x in arrays), params])
    ending = f"{keywords_code}, causal=True, cache=cache, backend={backend!r}"
    return [
        f"for i, j in [(0, 2), *((i, i + 1) for i in range(2, {n}))]:",
        f"    output, cache = kvattn.multi_head_attention({step}{ending})",
        "    print(output)",
    ]


# ---- layers


def _of_layer(made: Case, failure: check.Result, backend: str) -> list[str]:
    arguments, keywords = dict(made.arguments), dict(made.keywords)
    names, config, weights = (keywords.pop(name) for name in ("inputs", "config", "weights"))
    inputs = [arguments.pop(name) for name in names]
    if not failure.what.startswith("grad_"):
        arguments.pop("grad_output", None)
    options = {n: _literal(x) for n, x in {**arguments, **keywords}.items()}
    options |= {n: f"kvattn.{x}" for n, x in keywords.items() if n in check.FUNCTIONS}
    keywords_code = "".join(f", {n}={x}" for n, x in options.items())
    call = f"{backend!r}, {made.call!r}, {config}, weights, inputs, dtype={failure.dtype!r}{keywords_code}"
    return [
        *("import numpy as np", "from numpy import inf, nan", "", "import kvattn", "from kvattn.conformance import native", ""),
        f"weights = {{{', '.join(f'{n!r}: {_literal(x)}' for n, x in weights.items())}}}",
        f"inputs = [{', '.join(map(_literal, inputs))}]",
        f"results, by_inputs, by_weights = native.run({call})",
        "print(results, by_inputs, by_weights)",
    ]


def _literal(x: Any, floating: str | None = None) -> str:
    """x as code; ``floating``: the name of a function that makes floating-point arrays, else np.array."""
    if isinstance(x, tuple) and any(isinstance(part, np.ndarray) for part in x):
        return f"({', '.join(_literal(part, floating) for part in x)})"
    if not isinstance(x, np.ndarray):
        return repr(x)
    text = repr(x.tolist()) if x.size else f"np.zeros({x.shape})"
    return f"{floating}({text})" if floating and x.dtype.kind == "f" else f"np.array({text}, {x.dtype.name!r})"
