"""Text to translate, made here, and the batches that models are trained with: nothing in this file has a framework.

The corpus is a small grammar of English and French: "i'm late ." is "je suis en retard .", "we waited again ." is "nous avons
encore attendu .". Words agree with their subjects, French negates on both sides of the verb and puts "encore" before the
participle, so that attention has an order to learn. Short sentences come first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kvattn import api, checks

# English, French, French negated, French asked; which form of an adjective; "home"
_BE = (
    ("i'm", "je suis", "je ne suis pas", "am i", "suis-je", 0, "moi"),
    ("you're", "tu es", "tu n'es pas", "are you", "es-tu", 0, "toi"),
    ("he's", "il est", "il n'est pas", "is he", "est-il", 0, "lui"),
    ("she's", "elle est", "elle n'est pas", "is she", "est-elle", 1, "elle"),
    ("we're", "nous sommes", "nous ne sommes pas", "are we", "sommes-nous", 2, "nous"),
    ("they're", "ils sont", "ils ne sont pas", "are they", "sont-ils", 2, "eux"),
)
_HAVE = (("i", "j'ai"), ("you", "tu as"), ("he", "il a"), ("she", "elle a"), ("we", "nous avons"), ("they", "ils ont"))
_STATES = {  # of one, of a woman, of several
    "calm": "calme calme calmes", "tall": "grand grande grands", "sad": "triste triste tristes",
    "busy": "occupé occupée occupés",
    "lost": "perdu perdue perdus", "happy": "heureux heureuse heureux", "tired": "fatigué fatiguée fatigués",
    "ready": "prêt prête prêts", "sick": "malade malade malades", "rich": "riche riche riches", "poor": "pauvre pauvre pauvres",
    "young": "jeune jeune jeunes", "old": "vieux vieille vieux", "strong": "fort forte forts", "free": "libre libre libres",
    "alone": "seul seule seuls", "late": "en-retard en-retard en-retard", "kind": "gentil gentille gentils",
}  # fmt: skip
_DONE = {
    "lost": "perdu", "won": "gagné", "ran": "couru", "ate": "mangé", "slept": "dormi", "paid": "payé", "laughed": "ri",
    "danced": "dansé", "lied": "menti", "called": "appelé", "waited": "attendu", "sang": "chanté", "drank": "bu",
}  # fmt: skip
_ORDERS = {
    "go": "va", "run": "cours", "stop": "arrête", "wait": "attends", "look": "regarde", "listen": "écoute", "eat": "mange",
    "sing": "chante", "sleep": "dors", "jump": "saute",
}  # fmt: skip


def corpus() -> list[tuple[str, str]]:
    """Every pair of sentences, in lower case with a space before each mark; the order is always the same.

    >>> dict(corpus())["i'm home ."]
    'je suis chez moi .'
    """
    short = [(f"{eng} .", f"{fra} !") for eng, fra in _ORDERS.items()]
    long = [(f"{eng} now .", f"{fra} maintenant !") for eng, fra in _ORDERS.items()]
    for eng, fra in _HAVE:
        for done, fait in _DONE.items():
            short.append((f"{eng} {done} .", f"{fra} {fait} ."))
            long.append((f"{eng} {done} again .", f"{fra} encore {fait} ."))
            long.append((f"{eng} {done} today .", f"{fra} {fait} aujourd'hui ."))
    for eng, fra, negated, asks, demande, form, place in _BE:
        short.append((f"{eng} home .", f"{fra} chez {place} ."))
        long.append((f"{eng} not home .", f"{negated} chez {place} ."))
        long.append((f"{asks} home ?", f"{demande} chez {place} ?"))
        for state, forms in _STATES.items():
            said = forms.split()[form].replace("-", " ")
            short.append((f"{eng} {state} .", f"{fra} {said} ."))
            long.append((f"{eng} very {state} .", f"{fra} très {said} ."))
            long.append((f"{eng} not {state} .", f"{negated} {said} ."))
            long.append((f"{asks} {state} ?", f"{demande} {said} ?"))
    for pairs in (short, long):
        np.random.RandomState(0).shuffle(pairs)  # whose numbers no release of NumPy changes
    return short + long


class Vocab:
    """The tokens of a text, each with its index: vocab["va"], vocab[["va", "!"]], to_tokens(indices), len(vocab).

    ``tokens`` is a list, or a list of lists; those seen less than ``min_freq`` times are "<unk>".

    >>> vocab = Vocab([["go", "."], ["stop", "."]], reserved_tokens=["<pad>"])
    >>> vocab[["go", "never"]], vocab.to_tokens([2, 3])
    ([3, 2], ['<unk>', 'go'])
    """

    def __init__(self, tokens: Sequence[Any] = (), min_freq: int = 0, reserved_tokens: Sequence[str] = ()) -> None:
        counts = Counter(token for x in tokens for token in ([x] if isinstance(x, str) else x))
        self.token_freqs = counts.most_common()
        often = [token for token, count in self.token_freqs if count >= min_freq]
        self.idx_to_token = sorted({"<unk>", *reserved_tokens, *often})
        self.token_to_idx = {token: i for i, token in enumerate(self.idx_to_token)}

    def __len__(self) -> int:
        return len(self.idx_to_token)

    def __getitem__(self, tokens: Any) -> Any:
        if isinstance(tokens, (list, tuple)):
            return [self[token] for token in tokens]
        return self.token_to_idx.get(tokens, self.unk)

    def to_tokens(self, indices: Any) -> Any:
        """The token of an index, or the list of those of several, of lists of them too, and of an array of any framework."""
        found = api.to_numpy(indices).tolist() if hasattr(indices, "dtype") else indices
        if hasattr(found, "__iter__") and not isinstance(found, str):
            return [self.to_tokens(i) for i in found]
        return self.idx_to_token[int(found)]

    @property
    def unk(self) -> int:
        """The index of what is no token."""
        return self.token_to_idx["<unk>"]


class Batches:
    """Arrays cut into batches along their first axis: once in each loop over it, in another order each time if ``shuffle``.

    >>> list(Batches([np.arange(3)], 2, shuffle=False, array=np.asarray))
    [(array([0, 1]),), (array([2]),)]
    """

    def __init__(self, arrays: Sequence[Any], batch_size: int, *, shuffle: bool, array: Any, seed: int = 0) -> None:
        self.arrays, self.batch_size = arrays, checks.count("batch_size", batch_size)
        self.shuffle, self.array = shuffle, array
        self._draw = np.random.default_rng(seed)  # so that each framework is given the same batches

    def __len__(self) -> int:
        return math.ceil(len(self.arrays[0]) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        order = np.arange(len(self.arrays[0]))
        if self.shuffle:
            self._draw.shuffle(order)
        for i in range(0, len(order), self.batch_size):
            yield tuple(self.array(x[order[i : i + self.batch_size]]) for x in self.arrays)


class DataModule:
    """The data of a lesson. A subclass has get_dataloader(train), which returns what gives batches and has a length.

    A framework's own sets ``array``, which makes its arrays of NumPy's.
    """

    batch_size: int
    array: Any = staticmethod(np.asarray)

    def get_dataloader(self, train: bool) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no get_dataloader")

    def train_dataloader(self) -> Any:
        """The batches to train with."""
        return self.get_dataloader(train=True)

    def val_dataloader(self) -> Any:
        """The batches to judge the model by."""
        return self.get_dataloader(train=False)

    def get_tensorloader(self, tensors: Sequence[Any], train: bool, indices: slice = slice(0, None)) -> Batches:
        """Batches of these entries of arrays, NumPy's or the framework's, shuffled to train with."""
        arrays = [api.to_numpy(x)[indices] for x in tensors]
        return Batches(arrays, self.batch_size, shuffle=train, array=self.array)


class Translations(DataModule):
    """English sentences and their French ones: batches (src, tgt, src_valid_len, label), integers.

    src (batch, num_steps) ends with <eos> and is filled with <pad>; tgt (batch, num_steps) begins with <bos>; label is tgt
    one step on. ``num_train`` sentences are trained with and the ``num_val`` after them judge the model. Source: d2l's data
    set of this name, whose sentences, downloaded there, are of a grammar here: kvattn/scaffold/data.py.
    """

    def __init__(self, batch_size: int, num_steps: int = 9, num_train: int = 512, num_val: int = 128) -> None:
        pairs = corpus()
        for name, x, least in (("num_steps", num_steps, 1), ("num_train", num_train, 0), ("num_val", num_val, 0)):
            checks.count(name, x, least)
        if not 0 < num_train + num_val <= len(pairs):
            raise ValueError(f"num_train + num_val is {num_train + num_val}; there are {len(pairs)} pairs of sentences")
        self.batch_size, self.num_steps = checks.count("batch_size", batch_size), num_steps
        self.num_train, self.num_val = num_train, num_val
        src, tgt = ([self._fitted(pair[i]) for pair in pairs[: num_train + num_val]] for i in (0, 1))
        self.src_vocab = Vocab(src, reserved_tokens=["<pad>"])
        self.tgt_vocab = Vocab(tgt, reserved_tokens=["<pad>", "<bos>"])
        self.arrays = self._arrays(src, tgt)

    def _fitted(self, sentence: str) -> list[str]:
        tokens = [*sentence.lower().split(), "<eos>"][: self.num_steps]
        return tokens + ["<pad>"] * (self.num_steps - len(tokens))

    def _arrays(self, src: list[list[str]], tgt: list[list[str]]) -> tuple[np.ndarray, ...]:
        X = np.array([self.src_vocab[tokens] for tokens in src], int).reshape(-1, self.num_steps)
        Y = np.array([self.tgt_vocab[["<bos>", *tokens]] for tokens in tgt], int).reshape(-1, self.num_steps + 1)
        return X, Y[:, :-1], np.count_nonzero(X - self.src_vocab["<pad>"], axis=1), Y[:, 1:]

    def get_dataloader(self, train: bool) -> Batches:
        return self.get_tensorloader(self.arrays, train, slice(self.num_train) if train else slice(self.num_train, None))

    def build(self, src_sentences: Sequence[str], tgt_sentences: Sequence[str]) -> tuple[Any, ...]:
        """A batch of these sentences, written as `corpus` writes them: a word that is not in the vocabulary is <unk>.

        Raises TypeError for one sentence in the place of a list, ValueError unless both lists are as long.
        """
        if isinstance(src_sentences, str) or isinstance(tgt_sentences, str):
            raise TypeError("src_sentences and tgt_sentences must be lists of sentences, not str")
        if len(src_sentences) != len(tgt_sentences):
            raise ValueError(
                f"there are {len(src_sentences)} sentences to translate and {len(tgt_sentences)} translations; expected as many"
            )
        arrays = self._arrays(*([self._fitted(x) for x in sentences] for sentences in (src_sentences, tgt_sentences)))
        return tuple(map(self.array, arrays))


class Pictures(DataModule):
    """Pictures of ten classes, made here: batches (X, labels), X (batch, 1, height, width) in [0, 1], float32.

    A class is the direction of its stripes; where they begin, how wide they are and the noise is drawn. In the place of d2l's
    data set of clothes, which is downloaded. ``num_train`` pictures are trained with, ``num_val`` judge the model.
    """

    channels_last = False

    def __init__(
        self, batch_size: int = 64, resize: tuple[int, int] = (28, 28), num_train: int = 256, num_val: int = 64
    ) -> None:
        self.batch_size, self.resize, self.num_train, self.num_val = batch_size, resize, num_train, num_val
        draw, n = np.random.default_rng(0), num_train + num_val
        y = draw.integers(0, 10, n)
        down, across = np.meshgrid(*(np.linspace(0, 1, size) for size in resize), indexing="ij")
        angle, begin, width = (x[:, None, None] for x in (y * np.pi / 10, draw.uniform(0, 6.28, n), draw.uniform(20, 30, n)))
        stripes = np.sin(width * (across * np.cos(angle) + down * np.sin(angle)) + begin)
        X = np.clip(0.5 + 0.4 * stripes + draw.normal(0, 0.1, stripes.shape), 0, 1).astype(np.float32)
        self.arrays = (X[..., None] if self.channels_last else X[:, None]), y

    def get_dataloader(self, train: bool) -> Batches:
        return self.get_tensorloader(self.arrays, train, slice(self.num_train) if train else slice(self.num_train, None))


def bleu(pred_seq: str, label_seq: str, k: int) -> float:
    """How good a translation is: exp(min(0, 1 - len(label) / len(pred))) * product over n <= k of p_n^(1 / 2^n).

    p_n is the share of the runs of n words in ``pred_seq`` that ``label_seq`` has too, each counted as often as it is there.

    >>> bleu("je suis chez moi .", "je suis chez moi .", k=2), bleu("", "va !", k=2)
    (1.0, 0.0)

    Source: Papineni et al. 2002, "BLEU: a method for automatic evaluation of machine translation", as d2l weighs it.
    """
    pred, label = pred_seq.split(), label_seq.split()
    if not pred:
        return 0.0
    score = math.exp(min(0.0, 1 - len(label) / len(pred)))
    for n in range(1, min(k, len(pred)) + 1):
        said, right = (Counter(zip(*(x[i:] for i in range(n)), strict=False)) for x in (pred, label))
        score *= (sum((said & right).values()) / said.total()) ** (0.5**n)
    return score
