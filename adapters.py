"""Bottleneck adapters: Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751) and Pfeiffer et al.
2021 (https://arxiv.org/abs/2005.00247).

Each sub-layer of a BERT layer ends in `dense -> dropout -> add & norm`. With h = dropout(dense(x)),
a = what came into the sub-layer (its residual), LN = its own LayerNorm:

    BERT       y = LN(h + a)
    Houlsby    y = LN(h + Adapter(h) + a)              after attention and FFN: two per layer
    Pfeiffer   y = LN(h + Adapter(LN(h + a)) + a)      after the FFN only, the same LN twice

    Adapter(x) = W_up act(W_down x + b_down) + b_up        hidden -> bottleneck -> hidden

"Houlsby" here is the authors' code (google-research/adapter-bert): tanh-GELU, normal weights of
standard deviation 1e-3 cut at two of them, and every LayerNorm trains. "Pfeiffer" is adapter-hub's
`seq_bn`: ReLU, standard deviation 0.02, LayerNorms frozen. Both pass the skip connection around the
adapter; it is the `h +` in the equations.
"""
from torch import nn

from common import fail


class Adapter(nn.Module):
    """The bottleneck without its skip connection: x (..., hidden) -> (..., hidden).

    Trains 2 * hidden * bottleneck + bottleneck + hidden numbers.
    """

    def __init__(self, hidden, bottleneck, activation):
        super().__init__()
        self.down = nn.Linear(hidden, bottleneck)
        self.activation = activation
        self.up = nn.Linear(bottleneck, hidden)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        # Adapter(x) = W_up act(W_down x + b_down) + b_up
        return self.up(self.activation(self.down(x)))  # (..., hidden)


class HoulsbyOutput(nn.Module):
    """Take the place of BertSelfOutput or BertOutput `output`: x (batch, tokens, in), a (batch,
    tokens, hidden) -> (batch, tokens, hidden)."""

    def __init__(self, output, bottleneck):
        super().__init__()
        self.dense, self.dropout, self.LayerNorm = output.dense, output.dropout, output.LayerNorm
        self.adapter = Adapter(output.dense.out_features, bottleneck, nn.GELU(approximate="tanh"))
        for linear in (self.adapter.down, self.adapter.up):  # a, b: absolute, no multiples of std
            nn.init.trunc_normal_(linear.weight, std=1e-3, a=-2e-3, b=2e-3)

    def forward(self, x, a):
        h = self.dropout(self.dense(x))  # (batch, tokens, hidden)
        # y = LN(h + Adapter(h) + a)
        return self.LayerNorm(h + self.adapter(h) + a)


class PfeifferOutput(nn.Module):
    """Take the place of BertOutput `output`: x (batch, tokens, intermediate), a (batch, tokens,
    hidden) -> (batch, tokens, hidden)."""

    def __init__(self, output, bottleneck):
        super().__init__()
        self.dense, self.dropout, self.LayerNorm = output.dense, output.dropout, output.LayerNorm
        self.adapter = Adapter(output.dense.out_features, bottleneck, nn.ReLU())
        for linear in (self.adapter.down, self.adapter.up):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, x, a):
        h = self.dropout(self.dense(x))  # (batch, tokens, hidden)
        # y = LN(h + Adapter(LN(h + a)) + a): the skip is h, taken before add & norm
        return self.LayerNorm(h + self.adapter(self.LayerNorm(h + a)) + a)


def width(model, s):
    """Return the units of a bottleneck."""
    units = s.bottleneck or model.config.hidden_size // s.reduction
    if units < 1:
        fail(f"--reduction {s.reduction} leaves no unit of a hidden size of "
             f"{model.config.hidden_size}")
    return units


def put_houlsby(model, s):
    """Put two adapters into every layer."""
    for layer in model.bert.encoder.layer:
        layer.attention.output = HoulsbyOutput(layer.attention.output, width(model, s))
        layer.output = HoulsbyOutput(layer.output, width(model, s))


def put_pfeiffer(model, s):
    """Put one adapter into every layer."""
    for layer in model.bert.encoder.layer:
        layer.output = PfeifferOutput(layer.output, width(model, s))
