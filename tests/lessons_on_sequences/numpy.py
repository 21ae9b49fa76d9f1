import numpy as np

from kvattn import numpy as d2l


class Seq2SeqAttentionDecoder(d2l.AttentionDecoder):
    def __init__(self, vocab_size, embed_size, num_hiddens, num_layers, dropout=0):
        self.attention = d2l.AdditiveAttention(num_hiddens, dropout)
        self.embedding = d2l.Embedding(vocab_size, embed_size)
        self.rnn = d2l.GRU(embed_size + num_hiddens, num_hiddens, num_layers, dropout)
        self.dense = d2l.Dense(vocab_size)

    def init_state(self, enc_outputs, enc_valid_lens):
        return [*enc_outputs, enc_valid_lens]

    def forward(self, X, outputs, hidden, lens):
        state, keys, made, self.shown = [outputs, hidden, lens], outputs.swapaxes(0, 1), [], []
        for x in self.embedding(X).swapaxes(0, 1):
            context = self.attention(state[1][-1][:, None], keys, keys, lens)
            output, state[1] = self.rnn(np.concatenate((context[:, 0], x), -1)[None], state[1])
            made.append(output)
            self.shown.append(self.attention.attention_weights)
        return self.dense(np.concatenate(made)).swapaxes(0, 1), state

    def vjp(self, grad):
        by_keys, by_hidden, by_embedded = 0, None, []
        for step in self.dense.backward(grad.swapaxes(0, 1))[::-1]:
            by_input, by_hidden = self.rnn.backward(step[None], by_hidden)
            by_context, by_x = np.split(by_input[0], [by_hidden.shape[-1]], axis=-1)
            by_query, by_key, by_value = self.attention.backward(by_context[:, None])
            by_hidden[-1] += by_query[:, 0]
            by_keys = by_keys + by_key + by_value
            by_embedded.append(by_x)
        self.embedding.backward(np.stack(by_embedded[::-1], axis=1))
        return by_keys.swapaxes(0, 1), by_hidden

    @property
    def attention_weights(self):
        return self.shown
