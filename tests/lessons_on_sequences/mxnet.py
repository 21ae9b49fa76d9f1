from kvattn import mxnet as d2l
from kvattn.backends.mxnet import mx, np  # which imports MXNet on today's NumPy

init, nn, rnn = mx.init, mx.gluon.nn, mx.gluon.rnn


class Seq2SeqAttentionDecoder(d2l.AttentionDecoder):
    def __init__(self, vocab_size, embed_size, num_hiddens, num_layers, dropout=0):
        super().__init__()
        self.attention = d2l.AdditiveAttention(num_hiddens, dropout)
        self.embedding = nn.Embedding(vocab_size, embed_size)
        self.rnn = rnn.GRU(num_hiddens, num_layers, dropout=dropout)
        self.dense = nn.Dense(vocab_size, flatten=False)
        self.initialize(init.Xavier())

    def init_state(self, enc_outputs, enc_valid_lens):
        outputs, state = enc_outputs
        return outputs.swapaxes(0, 1), state, enc_valid_lens

    def forward(self, X, state):
        keys, hidden, lens = state
        outputs, self.shown = [], []
        for x in self.embedding(X).swapaxes(0, 1):
            context = self.attention(np.expand_dims(hidden[-1], 1), keys, keys, lens)
            x = np.concatenate((context, np.expand_dims(x, 1)), axis=-1)
            output, (hidden,) = self.rnn(x.swapaxes(0, 1), hidden)
            outputs.append(output)
            self.shown.append(self.attention.attention_weights)
        return self.dense(np.concatenate(outputs, axis=0)).swapaxes(0, 1), [keys, hidden, lens]

    @property
    def attention_weights(self):
        return self.shown
