import pytest
import torch
from hypothesis import settings
from torch import nn

from kdnb.data import load_data

# A first call into PyTorch can take a second; time is not what these tests are about.
settings.register_profile("kdnb", deadline=None)
settings.load_profile("kdnb")


class Two(nn.Module):
    "Answers with a tuple."

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x), None


@pytest.fixture(scope="session")
def digits():
    torch.set_num_threads(1)
    return load_data("digits")


def stream(seed):
    return torch.Generator().manual_seed(seed)


def batch(n=32, classes=10, seed=3):
    "Random pictures, and classes for them."
    draw = stream(seed)
    return torch.rand(n, 1, 8, 8, generator=draw), torch.randint(0, classes, (n,), generator=draw)


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    "To the same bits: tensors, networks, and what holds them."
    if isinstance(a, nn.Module):
        return same(a.state_dict(), b.state_dict())
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, tuple) else a == b
