import optax
from flax import linen as nn
from jax import numpy as jnp

from kvattn import jax as d2l


class Seq2SeqAttentionDecoder(nn.Module):
    vocab_size: int
    embed_size: int
    num_hiddens: int
    num_layers: int
    dropout: float = 0

    def setup(self):
        self.attention = d2l.AdditiveAttention(self.num_hiddens, self.dropout)
        self.embedding = nn.Embed(self.vocab_size, self.embed_size)
        self.rnn = d2l.GRU(self.num_hiddens, self.num_layers, dropout=self.dropout)
        self.dense = nn.Dense(self.vocab_size)

    def init_state(self, enc_outputs, enc_valid_lens, *args):
        outputs, state = enc_outputs
        return outputs.transpose(1, 0, 2), state, enc_valid_lens

    def __call__(self, X, state, training=False):
        keys, hidden, lens = state
        outputs, shown = [], []
        for x in self.embedding(X).transpose(1, 0, 2):
            context, weights = self.attention(hidden[-1][:, None], keys, keys, lens, training=training)
            x = jnp.concatenate((context, x[:, None]), -1)
            output, hidden = self.rnn(x.transpose(1, 0, 2), hidden, training=training)
            outputs.append(output)
            shown.append(weights)
        self.sow("intermediates", "dec_attention_weights", shown)
        return self.dense(jnp.concatenate(outputs)).transpose(1, 0, 2), [keys, hidden, lens]


def model(encoder, decoder, tgt_pad, lr):
    return d2l.Seq2Seq(encoder, decoder, tgt_pad=tgt_pad, lr=lr, training=True)


def predict(model, trainer, batch, num_steps):
    tokens, (shown, _) = model.predict_step(trainer.state.params, batch, num_steps, True)
    return tokens, shown


class Heads(d2l.Module):
    num_heads: int


class _Pictured(d2l.Classifier):
    lr: float
    training: bool = False

    @nn.compact
    def __call__(self, X):
        X = nn.relu(nn.Conv(32, (5, 5), padding="VALID")(X)).mean((1, 2))
        return nn.Dense(10)(X)

    def configure_optimizers(self):
        return optax.adam(self.lr)


def pictured():
    return _Pictured(lr=0.01)
