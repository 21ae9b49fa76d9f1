import tensorflow as tf

from kvattn import tensorflow as d2l


class Seq2SeqAttentionDecoder(d2l.AttentionDecoder):
    def __init__(self, vocab_size, embed_size, num_hiddens, num_layers, dropout=0):
        super().__init__()
        self.attention = d2l.AdditiveAttention(num_hiddens, num_hiddens, num_hiddens, dropout)
        self.embedding = tf.keras.layers.Embedding(vocab_size, embed_size)
        cells = [tf.keras.layers.GRUCell(num_hiddens, dropout=dropout) for _ in range(num_layers)]
        self.rnn = tf.keras.layers.RNN(tf.keras.layers.StackedRNNCells(cells), return_sequences=True, return_state=True)
        self.dense = tf.keras.layers.Dense(vocab_size)

    def init_state(self, enc_outputs, enc_valid_lens):
        outputs, state = enc_outputs
        return tf.transpose(outputs, (1, 0, 2)), state, enc_valid_lens

    def call(self, X, state, **kwargs):
        keys, hidden, lens = state
        outputs, self.shown = [], []
        for x in tf.transpose(self.embedding(X), (1, 0, 2)):
            context = self.attention(tf.expand_dims(hidden[-1], 1), keys, keys, lens, **kwargs)
            output, *hidden = self.rnn(tf.concat((context, tf.expand_dims(x, 1)), -1), hidden, **kwargs)
            outputs.append(output)
            self.shown.append(self.attention.attention_weights)
        return self.dense(tf.concat(outputs, 1)), [keys, hidden, lens]

    @property
    def attention_weights(self):
        return self.shown


def model(encoder, decoder, tgt_pad, lr):
    with d2l.try_gpu():
        return d2l.Seq2Seq(encoder, decoder, tgt_pad=tgt_pad, lr=lr)
