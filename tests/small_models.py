"""Small torch models, which tests name as FILE.py:CALLABLE."""

from __future__ import annotations

import os

import torch
from torch import nn

from lnsdeploy.evaluation.inputs import ImageInput, TensorInput, TokenInput


class Decoder(nn.Module):
    """One layer of a language model: attention that looks back only, and a head."""

    def __init__(self, vocabulary: int = 257, width: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        x = self.embedding(ids)
        mixed = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), is_causal=True)
        return {"logits": self.head(self.norm(x + mixed))}


def cnn(classes: int = 10, channels: int = 8):
    """For images of whatever set it is run on."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=2),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, classes),
    )


def sized_cnn():
    return cnn(), ImageInput((3, 16, 12), (0.5, 0.4, 0.3), (0.2, 0.2, 0.25), crop=0.875, interpolation="bicubic")


def digits_mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def decoder(length: int = 12):
    return Decoder(), TokenInput(257, length)


def masked():
    return Decoder(), TokenInput(257, 9, mask=256)


def recurrent():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 8, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    return Last(), TensorInput((5, 6))


def failing():
    """Fails in the middle of a run, in one process, or is killed there: FAIL_IN and FAIL_BY say where and how."""

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            if os.environ.get("FAIL_IN") == os.environ.get("RANK", "0") and self.calls > 5:
                if os.environ.get("FAIL_BY") == "kill":
                    os.kill(os.getpid(), 9)
                raise RuntimeError("out of luck\nin two lines")
            return self.linear(x)

    return Fails(), TensorInput((4,))


def infinite():
    class Infinite(nn.Module):
        def forward(self, x):
            return x.flatten(1) / 0

    return Infinite(), TensorInput((4,))


def detector():
    class Boxes(nn.Module):
        def forward(self, x):
            return [{"boxes": x}]

    return Boxes(), TensorInput((4,))


def raising():
    raise ValueError("no such thing\nas a free model")


def not_a_module():
    return "module"


def not_an_input():
    return cnn(), (3, 8, 8)


module = nn.Linear(3, 2)
number = 3
torch.manual_seed(12345)  # a model file may do so: the draw of weights follows all the same
