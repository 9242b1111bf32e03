"""PyTorch modules, as a plan names them."""

from __future__ import annotations

import torch
from torch import nn


def linear(inputs=6, outputs=1):
    return nn.Linear(inputs, outputs)


def deep(inputs=6, hidden=8, outputs=1):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def normed(inputs=6, hidden=8, dropout=0.2):
    """A first layer that is never trained, batch norm (with its count of batches), and dropout."""
    frozen = nn.Linear(inputs, hidden).requires_grad_(False)
    return nn.Sequential(frozen, nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1))


class words(nn.Module):  # noqa: N801  a plan names it like a function
    """An embedding whose weights are the output layer's as well, and a buffer that is in no state."""

    def __init__(self, kinds=20, width=4, length=6):
        super().__init__()
        self.embedding = nn.Embedding(kinds, width)
        self.places = nn.Parameter(torch.ones(length) / length)
        self.out = nn.Linear(width, kinds, bias=False)
        self.out.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(length, dtype=torch.bool), persistent=False)

    def forward(self, x):
        read = torch.einsum("l,rlw->rw", self.places * self.mask, self.embedding(x))
        return self.out(read).sum(dim=1, keepdim=True)


def pictures():
    return nn.Sequential(nn.Unflatten(2, (8, 1)), nn.Flatten(2), nn.Conv1d(8, 4, 3), nn.Flatten(), nn.Linear(24, 1))


def convolved():
    """Two layers of convolutions, normalised by groups, on pictures of 8 x 8."""
    picture = [nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(nn.Flatten(2), *picture, nn.Conv2d(4, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1))


def tuned(inputs=6, hidden=8):
    """A last layer that is trained on top of frozen ones."""
    return nn.Sequential(nn.Linear(inputs, hidden).requires_grad_(False), nn.Tanh(), nn.Linear(hidden, 1))


def dropping(inputs=6, hidden=8):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Dropout(0.5), nn.Linear(hidden, 1))


class heard(nn.Module):  # noqa: N801
    """A recurrent layer: some PyTorch can't vectorise, others only in new versions."""

    def __init__(self, kind="GRU", kinds=20, width=4):
        super().__init__()
        self.embedding, self.out = nn.Embedding(kinds, width), nn.Linear(width, 1)
        self.read = getattr(nn, kind)(width, width, batch_first=True)

    def forward(self, x):
        return self.out(self.read(self.embedding(x))[0][:, -1])


class fading(nn.Module):  # noqa: N801
    """What it says fades with the batches that it was trained on; their count is in no state."""

    def __init__(self, inputs=6):
        super().__init__()
        self.out = nn.Linear(inputs, 1)
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.out(x) / (1 + self.seen)


class hoard(nn.Module):  # noqa: N801
    """Keeps its parameters in a list as well, and looks there."""

    def __init__(self, inputs=6):
        super().__init__()
        self.out = nn.Linear(inputs, 1)
        self.held = [self.out.weight]

    def forward(self, x):
        return x @ self.held[0].T + self.out.bias


class gossip(nn.Module):  # noqa: N801
    """Tells each row what all rows before it were like, by a buffer that is in no state."""

    def __init__(self, inputs=6):
        super().__init__()
        self.out = nn.Linear(inputs, 1)
        self.register_buffer("mean", torch.zeros(inputs), persistent=False)

    def forward(self, x):
        self.mean += x.mean(dim=0).detach()
        return self.out(x - self.mean)


class forgetful(nn.Module):  # noqa: N801
    """Scales by how often it was called in training, which is in no state."""

    def __init__(self, inputs=6):
        super().__init__()
        self.out = nn.Linear(inputs, 1)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += self.training
        return self.out(x) / (1 + self.calls)


def unused(inputs=6):
    """One of its parameters has no part in the outputs, and so no gradient."""
    module = nn.Linear(inputs, 1)
    module.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return module


def fickle(made=[]):  # noqa: B006  it remembers on purpose
    """Another model each time."""
    made.append(None)
    return nn.Linear(6, len(made))


def lazy():
    return nn.LazyLinear(1)


def double():
    return nn.Linear(6, 1).double()


def flags():
    module = nn.Linear(6, 1)
    module.register_buffer("flag", torch.zeros(1, dtype=torch.bool))
    return module


def no_module():
    return "a module"


def no_tensor():
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    return Two(6, 1)


def brier(predictions, y):
    """A metric: the sum of squared errors of probabilities."""
    return {"brier": ((1 / (1 + 2.718281828 ** -predictions[:, 0]) - y) ** 2).sum()}
