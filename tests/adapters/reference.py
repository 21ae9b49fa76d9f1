"""The layers once more, in the plainest NumPy there is, from exported weights; derivatives are by complex step."""

import math

import numpy as np

from kvattn import layers

STEP = 1e-30


def softmax(scores, allowed):
    top = np.where(allowed, scores.real, -np.inf).max(axis=-1, keepdims=True)
    e = np.where(allowed, np.exp(scores - np.where(np.isfinite(top), top, 0)), 0)
    return e / np.where(e.sum(axis=-1, keepdims=True) == 0, 1, e.sum(axis=-1, keepdims=True))


def allowed(n, m, valid_lens, causal=False):
    """(batch or 1, n, m)"""
    may = np.ones((1, n, m), bool)
    if valid_lens is not None:
        lens = np.asarray(valid_lens)
        may = may & (np.arange(m) < (lens[:, None, None] if lens.ndim == 1 else lens[:, :, None]))
    return may & np.tri(n, m, dtype=bool) if causal else may


def weights_of(name, w, queries, keys):
    """The scores of a layer with one head."""
    d = queries.shape[-1]
    if name == "DotProductAttention":
        return queries @ keys.swapaxes(-1, -2) / math.sqrt(d)
    if name == "AdditiveAttention":
        hidden = np.tanh((queries @ w["W_q"])[:, :, None] + (keys @ w["W_k"])[:, None])
        return hidden @ w["w_v"]
    if name == "MultiplicativeAttention":
        return queries @ w["W"] @ keys.swapaxes(-1, -2)
    gate = (queries @ w["w_g"][:d])[:, :, None] + (keys @ w["w_g"][d:])[:, None]
    return queries @ keys.swapaxes(-1, -2) / (1 + np.exp(-gate))


def attention(name, w, queries, keys, values, valid_lens=None, causal=False, sink=None, slope=0.0):
    """(output, weights) of an attention layer. ``sink``: the score of one more key, for all, whose value is 0.

    ``slope``: by which scores fall for each position between query and key.
    """
    far = np.abs(np.arange(queries.shape[1])[:, None] - np.arange(keys.shape[1]))
    scores, may = weights_of(name, w, queries, keys) - slope * far, allowed(queries.shape[1], keys.shape[1], valid_lens, causal)
    if sink is not None:
        scores = np.concatenate([scores, np.full_like(scores[..., :1], sink, np.result_type(scores, sink))], axis=-1)
        may = np.concatenate([may, np.ones_like(may[..., :1])], axis=-1)
    weights = softmax(scores, may)[..., : keys.shape[1]]
    return weights @ values, weights


def multi_head(
    w, queries, keys, values, valid_lens=None, *, num_heads, num_kv_heads=None, causal=False, turned=None, slopes=None
):
    """(output, weights (batch * heads, n, m)). ``turned``: what is done to a head's queries and keys (batch, n, d).

    ``slopes``: by which the scores of each head fall with distance.
    """
    kv_heads = num_kv_heads or num_heads
    q, k, v = (x @ w[f"W_{c}"] + w.get(f"b_{c}", 0) for c, x in zip("qkv", (queries, keys, values), strict=True))
    outputs, every = [], []
    for head in range(num_heads):
        group = head * kv_heads // num_heads

        def part(x, of, number):
            size = x.shape[-1] // number
            return x[..., of * size : (of + 1) * size]

        query, key = part(q, head, num_heads), part(k, group, kv_heads)
        if "q_norm" in w:
            query, key = (x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) for x in (query, key))
            query, key = query * w["q_norm"], key * w["k_norm"]
        if turned is not None:
            query, key = turned(query), turned(key)
        output, weights = attention(
            "DotProductAttention",
            {},
            query,
            key,
            part(v, group, kv_heads),
            valid_lens,
            causal,
            w["sink"][head] if "sink" in w else None,
            0.0 if slopes is None else slopes[head],
        )
        outputs.append(output)
        every.append(weights)
    weights = np.stack(every, axis=1).reshape(-1, *every[0].shape[1:])
    return np.concatenate(outputs, axis=-1) @ w["W_o"] + w.get("b_o", 0), weights


def turned(x, base=10000.0, interleaved=False):
    """Rows (..., n, d), each pair (a, b) of features as (a cos - b sin, b cos + a sin) of position times frequency."""
    n, d = x.shape[-2:]
    first, second = (slice(0, d, 2), slice(1, d, 2)) if interleaved else (slice(0, d // 2), slice(d // 2, d))
    angles = np.arange(n)[:, None] / base ** (np.arange(d // 2) * 2 / d)
    made = np.empty_like(x)
    made[..., first] = x[..., first] * np.cos(angles) - x[..., second] * np.sin(angles)
    made[..., second] = x[..., second] * np.cos(angles) + x[..., first] * np.sin(angles)
    return made


def norm(w, X):
    centred = X - X.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + 1e-5) * w["gamma"] + w["beta"]


def ffn(w, X, activation="relu"):
    X = X @ w["W_1"] + w["b_1"]
    X = np.where(X.real > 0, X, 0) if activation == "relu" else X * (1 + np.vectorize(math.erf)(X.real / math.sqrt(2))) / 2
    return X @ w["W_2"] + w["b_2"]


def under(w, prefix):
    return {name.removeprefix(prefix + "."): x for name, x in w.items() if name.startswith(prefix + ".")}


def block(w, X, valid_lens=None, **options):
    Y = norm(under(w, "addnorm1"), X + multi_head(under(w, "attention"), X, X, X, valid_lens, **options)[0])
    return norm(under(w, "addnorm2"), Y + ffn(under(w, "ffn"), Y))


def encoder(w, tokens, valid_lens=None, *, num_blks, **options):
    h = w["embedding"].shape[1]
    X = w["embedding"][tokens] * math.sqrt(h) + layers.encoding(tokens.shape[1], h)
    for i in range(num_blks):
        X = block(under(w, f"blocks.{i}"), X, valid_lens, **options)
    return X


def decoder_block(w, X, outputs, valid_lens=None, **options):
    Y = norm(under(w, "addnorm1"), X + multi_head(under(w, "attention1"), X, X, X, causal=True, **options)[0])
    options.pop("turned", None)
    Z = norm(under(w, "addnorm2"), Y + multi_head(under(w, "attention2"), Y, outputs, outputs, valid_lens, **options)[0])
    return norm(under(w, "addnorm3"), Z + ffn(under(w, "ffn"), Z))


def decoder(w, tokens, outputs, valid_lens=None, *, num_blks, **options):
    h = w["embedding"].shape[1]
    X = w["embedding"][tokens] * math.sqrt(h) + layers.encoding(tokens.shape[1], h)
    for i in range(num_blks):
        X = decoder_block(under(w, f"blocks.{i}"), X, outputs, valid_lens, **options)
    return X @ w["dense.W"] + w["dense.b"]


def gradients(function, arrays, grad_output):
    """{name: d sum(grad_output * function(arrays)) / d array}, one element after another."""
    found = {}
    for name, x in arrays.items():
        found[name] = np.empty(x.shape)
        for at in np.ndindex(*x.shape):
            moved = x.astype(complex)
            moved[at] += STEP * 1j
            found[name][at] = (grad_output * function({**arrays, name: moved})).sum().imag / STEP
    return found
