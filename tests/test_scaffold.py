"""What lessons stand on: a GRU, one for the five frameworks, text to translate, and d2l's names for it."""

import importlib
import subprocess
import sys

import lessons_on_sequences
import numpy as np
import pytest
from adapters import reference
from near import assert_near

import kvattn
from kvattn import layers
from kvattn.scaffold import data as text

RNG = np.random.default_rng(4)
X, H = RNG.normal(size=(4, 3, 5)).astype("float32"), RNG.normal(size=(2, 3, 6)).astype("float32")
GRAD = RNG.normal(size=(4, 3, 6)).astype("float32")
CONFIG = {"num_hiddens": 6, "num_layers": 2}


@pytest.fixture
def adapter(backend):
    return importlib.import_module(f"adapters.{backend}")


@pytest.fixture
def kv(backend):
    return importlib.import_module(f"kvattn.{backend}")


def gru(w, X, H, num_layers=2):
    """(outputs, state) by the formula, a number after another."""
    state = []
    for i in range(num_layers):
        W_x, b_x, W_h, b_h = (w[f"cells.{i}.{name}"] for name in ("W_x", "b_x", "W_h", "b_h"))
        h, outputs, n = H[i], [], len(W_h)
        for x in X:
            a, b = x @ W_x + b_x, h @ W_h + b_h
            r, z = (1 / (1 + np.exp(-(a[:, j : j + n] + b[:, j : j + n]))) for j in (0, n))
            h = (1 - z) * np.tanh(a[:, 2 * n :] + r * b[:, 2 * n :]) + z * h
            outputs.append(h)
        X = np.stack(outputs)
        state.append(h)
    return X, np.stack(state)


def made(adapter, seed=7, **config):
    layer = adapter.layer("GRU", **CONFIG, seed=seed, **config)
    adapter.call(layer, X)
    return layer


def shaken(w):
    rng = np.random.default_rng(5)
    return {name: (x + rng.normal(size=x.shape) / 4).astype("float32") for name, x in sorted(w.items())}


@pytest.mark.parametrize("given", [False, True])
def test_a_gru_gives_the_numbers_and_the_gradients_of_the_formula(adapter, given):
    layer = made(adapter)
    w = shaken(adapter.weights(layer))
    layer, inputs = adapter.load(layer, w), (X, H) if given else (X,)
    output, state = adapter.call(layer, *inputs)
    expected = gru(w, X, H if given else np.zeros_like(H))
    assert_near(output, expected[0])
    assert_near(np.stack(state), expected[1])

    by_inputs, by_weights = adapter.gradients(layer, inputs, GRAD)
    arrays = {name: x.astype(float) for name, x in [*w.items(), ("X", X), ("H", H if given else 0 * H)]}
    expected = reference.gradients(lambda at: gru(at, at["X"], at["H"])[0], arrays, GRAD)
    for found, name in zip(by_inputs, ("X", "H"), strict=False):
        assert_near(found, expected[name], name)
    assert set(by_weights) == set(w)
    for name, found in by_weights.items():
        assert_near(found, expected[name], name)


def test_a_seed_gives_a_gru_the_same_weights_everywhere(adapter):
    w = adapter.weights(made(adapter, seed=11))
    shapes = {"W_x": (None, 18), "b_x": (18,), "W_h": (6, 18), "b_h": (18,)}
    assert set(w) == {f"cells.{i}.{name}" for i in range(2) for name in shapes}
    for i, features in enumerate((5, 6)):
        for name, shape in shapes.items():
            expected = layers.initial(layers.child(11, f"cells.{i}"), name, tuple(n or features for n in shape))
            np.testing.assert_array_equal(w[f"cells.{i}.{name}"], expected)


def test_dropout_between_cells_is_the_same_everywhere_by_a_seed(adapter, backend):
    one = importlib.import_module("adapters.numpy")
    expected = one.call(made(one, dropout=0.5), X, training=True, rng=3)[0]
    layer = made(adapter, dropout=0.5)
    assert_near(adapter.call(layer, X, training=True, rng=3)[0], expected)
    assert_near(adapter.call(layer, X)[0], one.call(made(one), X)[0])
    assert np.abs(expected - one.call(made(one), X)[0]).max() > 0.01


def test_what_a_gru_refuses(adapter, kv):
    for config, error, words in (
        ({"num_layers": 2}, TypeError, "num_hiddens"),
        ({"num_hiddens": 2.5}, TypeError, "num_hiddens"),
        ({"num_hiddens": 4, "num_layers": 0}, ValueError, "num_layers must be at least 1"),
        ({"num_hiddens": 4, "dropout": 2.0}, ValueError, "dropout"),
    ):
        with pytest.raises(error, match=words):
            adapter.layer("GRU", **config)
    layer = made(adapter)
    for inputs, words in (((X[0],), "steps, batch, features"), ((X[:0],), "at least one step"), ((X, H[:1]), "H has shape")):
        with pytest.raises(ValueError, match=words):
            adapter.call(layer, *inputs)
    with pytest.raises(ValueError, match=r"H has shape \(0,\); expected \(2, "):
        kvattn.scaffold.check_call(X, [], 2, 4)


def test_numpys_gru_takes_the_gradient_of_its_state_too():
    from kvattn import numpy as kv

    layer, grad_state = kv.GRU(None, 6, 2, seed=7), RNG.normal(size=H.shape)
    x, h = X.astype(float), H.astype(float)
    layer(x, h, record=True)
    by_X, by_H = layer.backward(GRAD.astype(float), grad_state)
    arrays = {**{name: w.astype(float) for name, w in layer.weights().items()}, "X": x, "H": h}

    def total(at):
        output, state = gru(at, at["X"], at["H"])
        return (GRAD * output).sum() + (grad_state * state).sum()

    expected = reference.gradients(total, arrays, 1.0)
    assert_near(by_X, expected["X"])
    assert_near(by_H, expected["H"])
    for name, found in layer.grads.items():
        assert_near(found, expected[name], name)
    halves = layer(X.astype("float16"), H.astype("float16"))
    assert [x.dtype for x in halves] == ["float16", "float16"]


def test_batches_are_the_frameworks_arrays_in_one_order(kv, backend):
    data = kv.MTFraEng(batch_size=100, num_train=250, num_val=30)
    assert len(data.train_dataloader()) == 3
    assert len(data.val_dataloader()) == 1
    loader = data.train_dataloader()
    src, tgt, lens, label = map(kvattn.to_numpy, next(iter(loader)))
    first = [" ".join(data.src_vocab.to_tokens(x)) for x in src[:2]]
    assert first == FIRST
    np.testing.assert_array_equal(tgt[:, 1:], label[:, :-1])
    assert (tgt[:, 0] == data.tgt_vocab["<bos>"]).all()
    np.testing.assert_array_equal(lens, (src != data.src_vocab["<pad>"]).sum(1))
    np.testing.assert_array_equal(src[np.arange(100), lens - 1], data.src_vocab["<eos>"])
    assert (kvattn.to_numpy(next(iter(loader))[0]) != src).any()  # the next time in another order
    assert {kvattn.dispatch.name_of(kvattn.dispatch.choose(None, x=x)) for x in next(iter(loader))} == {backend}

    src, tgt, lens, label = data.build(["go .", "i quack ."], ["va !", "je suis ."])
    said = [data.src_vocab.to_tokens(x) for x in src]
    assert said[0] == ["go", ".", "<eos>"] + ["<pad>"] * 6
    assert said[1][:3] == ["i", "<unk>", "."]
    assert data.tgt_vocab.to_tokens(label[0])[:3] == ["va", "!", "<eos>"]
    assert list(kvattn.to_numpy(lens)) == [3, 4]
    with pytest.raises(ValueError, match="there are 704"):
        kv.MTFraEng(8, num_train=1000)


FIRST = [
    "i'm strong . <eos> <pad> <pad> <pad> <pad> <pad>",
    "they slept . <eos> <pad> <pad> <pad> <pad> <pad>",
]  # the same whichever framework


def test_the_corpus_is_french():
    pairs = dict(text.corpus())
    assert len(pairs) == 704
    assert pairs["i lost ."] == "j'ai perdu ."
    assert pairs["he's calm ."] == "il est calme ."
    assert pairs["she's not old ."] == "elle n'est pas vieille ."
    assert pairs["are they late ?"] == "sont-ils en retard ?"
    assert pairs["we waited again ."] == "nous avons encore attendu ."


def test_data_that_cannot_be_are_refused():
    from kvattn import numpy as kv

    for given, error, words in (
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, not 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an int"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, not 0"),
        ({"num_train": -1, "num_val": 5}, ValueError, "num_train must be at least 0, not -1"),
        ({"num_train": 5, "num_val": -1}, ValueError, "num_val must be at least 0, not -1"),
    ):
        with pytest.raises(error, match=words):
            kv.MTFraEng(**{"batch_size": 2, **given})
    sentences = kv.MTFraEng(2, num_train=9, num_val=0)
    with pytest.raises(ValueError, match="2 sentences to translate and 1 translations; expected as many"):
        sentences.build(["go .", "run ."], ["va !"])
    with pytest.raises(TypeError, match="lists of sentences, not str"):  # whose letters would be sentences
        sentences.build("go .", "va !")
    assert [x.shape for x in sentences.build([], [])] == [(0, 9), (0, 9), (0,), (0, 9)]

    class Data(kv.DataModule):
        batch_size = 0

    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        Data().get_tensorloader([np.arange(3)], train=True)


def test_the_tokens_of_a_batch_are_lists_of_lists():
    vocab = text.Vocab([["a", "b"]])
    assert vocab.to_tokens(np.array([[1, 2], [2, 0]])) == [["a", "b"], ["b", "<unk>"]]
    assert vocab.to_tokens([[1], [2, 0]]) == [["a"], ["b", "<unk>"]]
    assert vocab.to_tokens(np.zeros((0, 2), int)) == []
    assert vocab.to_tokens([]) == []
    assert vocab.to_tokens(range(2)) == ["<unk>", "a"]
    assert vocab.to_tokens(2) == "b"


@pytest.mark.parametrize(
    ("pred", "label", "expected"),
    [
        ("a b c", "a b c", 1.0),
        ("a b", "a b c d", np.exp(-1)),
        ("a a a", "a b c", (1 / 3) ** 0.5 * 0),
        ("a b d", "a b c", (2 / 3) ** 0.5 * 0.5**0.25),
        ("x", "a b", 0.0),
        ("", "a", 0.0),
    ],
)
def test_bleu(pred, label, expected):
    from kvattn.scaffold.data import bleu

    assert bleu(pred, label, k=2) == pytest.approx(expected)


def test_the_scaffold_is_loaded_when_it_is_asked_for():
    code = (
        "import sys; from kvattn import numpy as kv; before = 'kvattn.scaffold.numpy' in sys.modules; kv.GRU; "
        "print(before, 'kvattn.scaffold.numpy' in sys.modules, 'GRU' in dir(kv), hasattr(kv, 'nothing'))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "False True True False\n"


# ---- d2l's lessons on sequences, by its names in its order: a model each framework's reader writes, trained


@pytest.fixture
def lesson(backend):
    """The decoder of a lesson in a framework's own words, and how its models are made there."""
    if backend == "mxnet":
        from kvattn.backends.mxnet import mx

        mx.npx.set_np()
    return lessons_on_sequences.of(backend)


def test_a_lesson_on_attention_between_sequences_trains_and_translates(lesson, kv):
    data = kv.MTFraEng(batch_size=32, num_steps=4, num_train=64, num_val=16)
    assert data.num_steps == 4
    encoder = kv.Seq2SeqEncoder(len(data.src_vocab), 12, 12, 2, 0.1)
    decoder = lesson.Seq2SeqAttentionDecoder(len(data.tgt_vocab), 12, 12, 2, 0.1)
    model = lesson.model(encoder, decoder, data.tgt_vocab["<pad>"], lr=0.02)
    model.board.display = False
    trainer = kv.Trainer(max_epochs=12, gradient_clip_val=1, num_gpus=1)
    trainer.fit(model, data)
    curves = {name: [y for _, y in points] for name, points in model.board.data.items()}
    assert {name: len(y) for name, y in curves.items()} == {"train_loss": 24, "val_loss": 12}
    assert curves["train_loss"][0] == pytest.approx(np.log(len(data.tgt_vocab)), abs=0.5)
    assert curves["train_loss"][-1] < 0.85 * curves["train_loss"][0]
    assert curves["val_loss"][-1] < curves["val_loss"][0]
    assert [x for x, _ in model.board.data["train_loss"]][:3] == [0, 0.5, 1]

    batch = data.build(["i lost .", "i'm home ."], ["j'ai perdu .", "je suis chez moi ."])
    tokens, weights = lesson.predict(model, trainer, batch, data.num_steps)
    said = [" ".join(data.tgt_vocab.to_tokens(x)) for x in tokens]
    assert [len(x.split()) for x in said] == [4, 4]
    assert 0 <= kv.bleu(said[0], "j'ai perdu .", k=2) <= 1
    assert len(weights) == 4  # steps, each a list with the weights of its one token
    w = np.stack([kvattn.to_numpy(step[0]) for step in weights])
    assert w.shape == (4, 2, 1, 4)
    assert_near(w.sum(-1), np.ones((4, 2, 1)))
    lens = kvattn.to_numpy(batch[2])
    assert (w[:, 0, 0, lens[0] :] == 0).all()  # padding


def small(kv, lesson, lr=0.02):
    data = kv.MTFraEng(batch_size=16, num_steps=4, num_train=16, num_val=2)
    encoder = kv.Seq2SeqEncoder(len(data.src_vocab), 6, 6, 2, seed=1)
    decoder = lesson.Seq2SeqAttentionDecoder(len(data.tgt_vocab), 6, 6, 2)
    made = lesson.model(encoder, decoder, data.tgt_vocab["<pad>"], lr)
    made.board.display = False
    return made, data


def test_numpys_encoder_and_decoder_derive_their_gradients():
    from kvattn import numpy as kv
    from kvattn.layers import analytic

    model, data = small(kv, lessons_on_sequences.of("numpy"))
    *inputs, label = next(iter(data.train_dataloader()))
    model(*inputs)  # makes the weights, float32, which differences would be too coarse in
    for _, part in analytic.parts(model):
        part._state.arrays = {name: x.astype(float) for name, x in part._state.arrays.items()}
    model.backward(model.loss(model(*inputs, record=True), label)[1])
    weights, grads = model.weights(), model.grads
    assert set(grads) == set(weights)
    for part in ("encoder.embedding", "encoder.rnn", "decoder.embedding", "decoder.attention", "decoder.rnn", "decoder.dense"):
        names = [name for name in weights if name.startswith(part)]
        length, kept = np.sqrt(sum((grads[name] ** 2).sum() for name in names)), {name: weights[name].copy() for name in names}
        losses = []
        for step in (1e-4, -1e-4):  # along the gradient, where the loss climbs by its length
            for name in names:
                weights[name][:] = kept[name] + step / length * grads[name]
            losses.append(model.loss(model(*inputs), label)[0])
        for name in names:
            weights[name][:] = kept[name]
        assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(length, rel=1e-3), part


def test_gradients_are_shortened_to_their_limit(lesson, kv, backend):
    """Which gradient descent by a rate of 1 shows: the weights move as far. optax does it for JAX, where weights come later."""
    if backend == "jax":
        return
    read = {
        "numpy": lambda: model.weights().values(),
        "torch": lambda: model.parameters(),
        "tensorflow": lambda: model.trainable_variables,
        "mxnet": lambda: [x.data() for x in model.collect_params().values()],
    }[backend]
    model, data = small(kv, lesson, lr=1.0)
    model.configure_optimizers = lambda: kv.Module.configure_optimizers(model)
    model(*next(iter(data.val_dataloader()))[:-1])  # makes the weights
    moved = {}
    for limit in (0, 0.01):
        before = [kvattn.to_numpy(x).copy() for x in read()]
        kv.Trainer(max_epochs=1, gradient_clip_val=limit).fit(model, data)
        moved[limit] = np.sqrt(sum(((kvattn.to_numpy(x) - y) ** 2).sum() for x, y in zip(read(), before, strict=True)))
    assert moved[0] > 0.05
    assert moved[0.01] == pytest.approx(0.01, rel=0.01)


def test_a_class_is_written_in_several_cells(lesson, kv):
    """As d2l writes its own multi-head attention: on Module, with methods that are added."""
    attention = lesson.Heads(4)
    assert isinstance(attention, kv.Module)

    @kv.add_to_class(lesson.Heads)
    def split(self, X):
        return kv.reshape(X, (X.shape[0], X.shape[1], self.num_heads, -1))

    kv.check_shape(attention.split(kv.ones((2, 3, 8))), (2, 3, 4, 2))
    kv.check_len([1, 2], 2)
    with pytest.raises(AssertionError, match="the length is 2; expected 3"):
        kv.check_len([1, 2], 3)


def test_the_curves_of_a_training_are_drawn(kv):
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")

    board = kv.ProgressBoard("epoch", xlim=[0, 2])
    for x in range(4):
        board.draw(x / 2, np.float32(x), "train_loss")
    board.draw(1.0, 5.0, "val_loss")
    board.show()
    (axes,) = plt.gcf().axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 0.5, 1, 1.5], [1]]
    assert [text.get_text() for text in axes.get_legend().texts] == ["train_loss", "val_loss"]
    plt.close("all")


def test_a_step_without_a_trainer_says_so():
    from kvattn.scaffold import training

    with pytest.raises(RuntimeError, match=r"Module is trained by nobody: its steps plot in Trainer.fit\(model, data\)"):
        training.Module().plot("loss", 1.0, train=True)


# ---- attention pooling in d2l's way: kernels of one argument


def d2ls(x_train, y_train, x, kernel):
    """d2l's formula: a column of the weights is a query."""
    k = kernel(x_train.reshape(-1, 1) - x.reshape(1, -1)).astype(float)
    w = k / k.sum(0)
    return y_train.T @ w, w


@pytest.mark.parametrize("column", [False, True])
def test_a_kernel_of_one_argument_is_of_differences_and_its_weights_have_a_column_for_each_query(kv, backend, column):
    rng = np.random.default_rng(6)
    x_train, x = np.sort(rng.random(7) * 5), rng.random(4) * 5
    y_train = np.sin(x_train) + rng.normal(size=7)
    kernels = {
        "gaussian": (lambda u: kv.exp(-(u**2) / 2), lambda u: np.exp(-(u**2) / 2)),
        "boxcar": (lambda u: kv.abs(u) < 2.0, lambda u: np.abs(u) < 2),
        "one-sided": (lambda u: kv.exp(-u), lambda u: np.exp(-u)),  # the difference is x_train - x
    }
    shape = (-1, 1) if column else (-1,)
    given = [kv.tensor(z.reshape(shape).astype("float32")) for z in (x_train, y_train)]
    for name, (kernel, same) in kernels.items():
        y, w = kv.nadaraya_watson(*given, kv.tensor(x.astype("float32")), kernel)
        expected = d2ls(x_train, y_train, x, same)
        assert_near(kvattn.to_numpy(w), expected[1].astype("float32"), name)
        assert_near(kvattn.to_numpy(y).ravel(), expected[0].astype("float32"), name)
        assert y.shape == ((4, 1) if column else (4,))
    with pytest.raises(TypeError, match="the kernel gave float; expected an array, a number for each difference"):
        kv.nadaraya_watson(*given, kv.tensor(x.astype("float32")), lambda u: 1.0)
    with pytest.raises(ValueError, match="x has 2 features"):
        kv.nadaraya_watson(kv.ones((3, 2)), kv.ones((3,)), kv.ones((4, 2)), lambda u: u)


def test_kernels_of_one_argument_are_drawn():
    from kvattn import plot

    figure = plot.kernel_shapes([lambda u: np.exp(-(u**2) / 2), kvattn.gaussian_kernel])
    one, other = (axes.lines[0].get_ydata() for axes in figure.axes)
    assert_near(one, other)


# ---- pictures, and a model of the framework's own layers that tells their classes


def test_pictures_are_learned_from(kv, backend):
    if "FashionMNIST" not in dir(kv):
        assert backend not in ("torch", "jax")  # in which d2l has a vision transformer
        return
    data = kv.FashionMNIST(batch_size=64, resize=(12, 12), num_train=128, num_val=64)
    X, y = map(kvattn.to_numpy, next(iter(data.val_dataloader())))
    assert X.shape == ((64, 1, 12, 12) if backend == "torch" else (64, 12, 12, 1))
    assert (X.dtype, set(y)) == ("float32", set(range(10)))
    model = importlib.import_module(f"lessons_on_sequences.{backend}").pictured()
    model.board.display = False
    kv.Trainer(max_epochs=40).fit(model, data)
    curves = {name: [y for _, y in points] for name, points in model.board.data.items()}
    assert set(curves) == {"train_loss", "val_loss", "val_acc"}
    assert curves["val_loss"][-1] < curves["val_loss"][0]
    assert curves["val_acc"][-1] > 0.5  # by chance 0.1


def test_every_name_that_a_namespace_lists_is_there(kv):
    assert [name for name in dir(kv) if not hasattr(kv, name)] == []
