import torch
from torch import nn

from kvattn import torch as d2l


class Seq2SeqAttentionDecoder(d2l.AttentionDecoder):
    def __init__(self, vocab_size, embed_size, num_hiddens, num_layers, dropout=0):
        super().__init__()
        self.attention = d2l.AdditiveAttention(num_hiddens, dropout)
        self.embedding = nn.Embedding(vocab_size, embed_size)
        self.rnn = nn.GRU(embed_size + num_hiddens, num_hiddens, num_layers, dropout=dropout)
        self.dense = nn.LazyLinear(vocab_size)
        self.apply(d2l.init_seq2seq)

    def init_state(self, enc_outputs, enc_valid_lens):
        outputs, state = enc_outputs
        return outputs.swapaxes(0, 1), state, enc_valid_lens

    def forward(self, X, state):
        keys, hidden, lens = state
        outputs, self.shown = [], []
        for x in self.embedding(X).swapaxes(0, 1):
            context = self.attention(hidden[-1][:, None], keys, keys, lens)
            output, hidden = self.rnn(torch.cat((context, x[:, None]), -1).swapaxes(0, 1), hidden)
            outputs.append(output)
            self.shown.append(self.attention.attention_weights)
        return self.dense(torch.cat(outputs)).swapaxes(0, 1), [keys, hidden, lens]

    @property
    def attention_weights(self):
        return self.shown


class _Pictured(d2l.Classifier):
    def __init__(self, lr):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.LazyConv2d(32, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


def pictured():
    return _Pictured(lr=0.01)
