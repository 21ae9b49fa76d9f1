"""What trains a model, but for the framework: hyperparameters, the curves of a training, the loop over epochs and batches.

A framework's file makes d2l's classes of these: `Module` and those below it beside its own class of models, and `Trainer`
with ``prepare_model``, ``training_step`` and ``validation_step``.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from kvattn import api

F = TypeVar("F", bound=Callable[..., Any])


def add_to_class(cls: type) -> Callable[[F], F]:
    """Make the function below a method of a class that is there already: a lesson writes a class in several cells.

    >>> class Model: pass
    >>> @add_to_class(Model)
    ... def answer(self):
    ...     return 42
    >>> Model().answer()
    42
    """

    def add(function: F) -> F:
        setattr(cls, function.__name__, function)
        return function

    return add


def check_len(x: Any, n: int) -> None:
    """Raises AssertionError unless ``x`` has this length.

    >>> check_len([1.0], 1)
    """
    if len(x) != n:
        raise AssertionError(f"the length is {len(x)}; expected {n}")


class HyperParameters:
    """What keeps the arguments that it is made with.

    >>> class Model(HyperParameters):
    ...     def __init__(self, lr, steps=2):
    ...         self.save_hyperparameters(ignore=["steps"])
    >>> vars(Model(lr=0.1))
    {'hparams': {'lr': 0.1}, 'lr': 0.1}
    """

    def save_hyperparameters(self, ignore: Sequence[str] = ()) -> None:
        """Keep what is named in the function that calls this, its arguments, as attributes; and together in ``hparams``."""
        frame = inspect.currentframe()
        named = frame.f_back.f_locals if frame and frame.f_back else {}
        self.hparams = {name: x for name, x in named.items() if name not in ("self", *ignore) and name[0] != "_"}
        for name, x in self.hparams.items():
            setattr(self, name, x)


class ProgressBoard(HyperParameters):
    """The curves of a training: `draw` adds a point, the mean of each ``every_n``, and `show` draws them all in one figure.

    >>> board = ProgressBoard(display=False)
    >>> for x in range(4):
    ...     board.draw(x, x * x, "square", every_n=2)
    >>> board.data
    {'square': [(0.5, 0.5), (2.5, 6.5)]}
    """

    def __init__(
        self, xlabel: str | None = None, ylabel: str | None = None, xlim: Any = None, ylim: Any = None,
        xscale: str = "linear", yscale: str = "linear", figsize: tuple[float, float] = (3.5, 2.5), display: bool = True,
    ) -> None:  # fmt: skip
        self.xlabel, self.ylabel, self.xlim, self.ylim = xlabel, ylabel, xlim, ylim
        self.xscale, self.yscale, self.figsize, self.display = xscale, yscale, figsize, display
        self.data: dict[str, list[tuple[float, float]]] = {}
        self._waiting: dict[str, list[tuple[float, float]]] = {}

    def draw(self, x: float, y: Any, label: str, every_n: int = 1) -> None:
        points = self._waiting.setdefault(label, [])
        points.append((x, float(api.to_numpy(y)) if hasattr(y, "dtype") else y))
        if len(points) >= every_n:
            self.data.setdefault(label, []).append(tuple(sum(z) / len(points) for z in zip(*points, strict=True)))
            points.clear()

    def show(self) -> None:
        """The figure, where ``display`` and matplotlib are there and something was drawn."""
        if not (self.display and self.data and importlib.util.find_spec("matplotlib")):
            return
        from kvattn import plot

        curves = [list(zip(*points, strict=True)) for points in self.data.values()]
        plot.plot(
            [x for x, _ in curves], [y for _, y in curves], self.xlabel, self.ylabel, legend=list(self.data), xlim=self.xlim,
            ylim=self.ylim, xscale=self.xscale, yscale=self.yscale, figsize=self.figsize,
        )  # fmt: skip


class Module(HyperParameters):
    """The base of models. A subclass has ``loss(Y_hat, Y)``, and ``forward`` or ``net``, which it calls."""

    board: ProgressBoard
    trainer: Trainer
    net: Any

    def __init__(self, plot_train_per_epoch: int = 2, plot_valid_per_epoch: int = 1) -> None:
        super().__init__()
        self.plot_train_per_epoch, self.plot_valid_per_epoch = plot_train_per_epoch, plot_valid_per_epoch
        self.board = ProgressBoard()

    def loss(self, *args: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def forward(self, X: Any) -> Any:
        return self.net(X)

    def _outputs(self, inputs: Any, training: bool) -> Any:
        """What the model makes of a batch's inputs, in training or out of it."""
        model: Any = self
        return model(*inputs)

    def training_step(self, batch: Any) -> Any:
        loss = self.loss(self._outputs(batch[:-1], training=True), batch[-1])
        self.plot("loss", loss, train=True)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.plot("loss", self.loss(self._outputs(batch[:-1], training=False), batch[-1]), train=False)

    def plot(self, key: str, value: Any, train: bool) -> None:
        """A point of the curve ``key``, of training or of validation, at this moment of the training."""
        now = getattr(self, "trainer", None)
        if now is None:
            raise RuntimeError(f"{type(self).__name__} is trained by nobody: its steps plot in Trainer.fit(model, data)")
        if train:
            x, every = now.train_batch_idx / now.num_train_batches, now.num_train_batches / self.plot_train_per_epoch
        else:
            x, every = now.epoch + 1, now.num_val_batches / self.plot_valid_per_epoch
        self.board.xlabel = "epoch"
        self.board.draw(x, value, ("train_" if train else "val_") + key, every_n=max(1, int(every)))


class Classifier:
    """The base of models that choose one of several classes: logits (..., classes), labels (...)."""

    def validation_step(self: Any, batch: Any) -> None:
        Y_hat = self._outputs(batch[:-1], training=False)
        self.plot("loss", self.loss(Y_hat, batch[-1]), train=False)
        self.plot("acc", self.accuracy(Y_hat, batch[-1]), train=False)


class Decoder:
    """The base of decoders: init_state(enc_outputs, valid_lens) gives a state, (X, state) -> (logits, state)."""

    def init_state(self, enc_all_outputs: Any, *args: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no init_state")


class AttentionDecoder:
    """The base of decoders with attention, which show their weights."""

    @property
    def attention_weights(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no attention_weights")


class EncoderDecoder:
    """An encoder and a decoder: (src, tgt, valid_lens) -> logits. A framework's own can choose and join tokens."""

    encoder: Any
    decoder: Any
    _judged: dict[str, Any] = {}  # noqa: RUF012 (what the parts are called with out of training)

    def __init__(self, encoder: Any, decoder: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, enc_X: Any, dec_X: Any, *args: Any) -> Any:
        return self.decoder(dec_X, self.decoder.init_state(self.encoder(enc_X, *args), *args))[0]

    def predict_step(self: Any, batch: Any, device: Any, num_steps: int, save_attention_weights: bool = False) -> Any:
        """The likeliest next token, ``num_steps`` times: (tokens (batch, num_steps), the decoder's weights in each step)."""
        src, tgt, valid_lens, _ = batch
        state = self.decoder.init_state(self.encoder(src, valid_lens, **self._judged), valid_lens)
        outputs, attention_weights = [tgt[:, :1]], []
        for _ in range(num_steps):
            Y, state = self.decoder(outputs[-1], state, **self._judged)
            outputs.append(self._likeliest(Y, tgt.dtype))
            if save_attention_weights:
                attention_weights.append(self.decoder.attention_weights)
        return self._joined(outputs[1:]), attention_weights


class Seq2Seq:
    """An encoder and a decoder that learn to translate, by Adam; padding in the labels costs nothing."""

    def __init__(self: Any, encoder: Any, decoder: Any, tgt_pad: int, lr: float) -> None:
        super().__init__(encoder, decoder)  # type: ignore[call-arg]
        self.tgt_pad, self.lr = tgt_pad, lr

    validation_step = Module.validation_step


class Trainer(HyperParameters):
    """Trains a model with data for ``max_epochs``: trainer.fit(model, data), which ends with the figure of its curves.

    ``num_gpus`` of 1 takes a GPU, if there is one; where gradients together are longer than ``gradient_clip_val``, they are
    shortened to it, 0 for never.
    """

    def __init__(self, max_epochs: int, num_gpus: int = 0, gradient_clip_val: float = 0) -> None:
        self.save_hyperparameters()
        self.max_epochs, self.num_gpus, self.gradient_clip_val = max_epochs, num_gpus, gradient_clip_val

    def fit(self, model: Any, data: Any, **options: Any) -> None:
        self.train_dataloader, self.val_dataloader = data.train_dataloader(), data.val_dataloader()
        self.num_train_batches = len(self.train_dataloader)
        self.num_val_batches = 0 if self.val_dataloader is None else len(self.val_dataloader)
        self.epoch = self.train_batch_idx = self.val_batch_idx = 0
        self.prepare_model(model, **options)
        model.board.xlim = [0, self.max_epochs]
        for self.epoch in range(self.max_epochs):  # noqa: B020
            self.fit_epoch()
        model.board.show()

    def fit_epoch(self) -> None:
        for batch in self.train_dataloader:
            self.training_step(self.prepare_batch(batch))
            self.train_batch_idx += 1
        for batch in self.val_dataloader or ():
            self.validation_step(self.prepare_batch(batch))
            self.val_batch_idx += 1

    def prepare_model(self, model: Any) -> None:
        """Ready a model to be trained: its place, its optimiser."""
        model.trainer, self.model = self, model
        self.optim = model.configure_optimizers()

    def prepare_batch(self, batch: Any) -> Any:
        return batch

    def training_step(self, batch: Any) -> None:
        """One step of the optimiser."""
        raise NotImplementedError

    def validation_step(self, batch: Any) -> None:
        self.model.validation_step(batch)
