"""Batch norm of a batch that processes share: torch's own, where one process has all of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lnsdeploy.training.layers import FoldedBatchNorm2d
from lnsdeploy.training.norms import synchronised_norms, whole_batch_norm

torch.set_num_threads(1)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (6, 3)),
        (nn.BatchNorm1d, (2, 3, 5)),
        (nn.BatchNorm2d, (2, 3, 4, 5)),
        (FoldedBatchNorm2d, (3, 3, 2, 2)),
        (nn.BatchNorm3d, (2, 3, 2, 1, 2)),
    ],
)
@pytest.mark.parametrize("affine", [True, False])
def test_alone_it_is_torchs(
    kind: type[nn.Module], shape: tuple[int, ...], momentum: float | None, affine: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = kind(3, momentum=momentum, affine=affine, eps=1e-3).double()
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 2, generator=generator)
        nn.init.uniform_(norm.bias, -1, 1, generator=generator)
    ours = copy.deepcopy(norm)
    for _ in range(2):
        x = (torch.randn(*shape, generator=generator, dtype=torch.float64) * 3 + 1).requires_grad_()
        mine = x.detach().clone().requires_grad_()
        wanted, found = norm(x), whole_batch_norm(ours, mine)
        weights = torch.randn(*shape, generator=generator, dtype=torch.float64)
        (wanted * weights).sum().backward()
        (found * weights).sum().backward()
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
        assert torch.allclose(mine.grad, x.grad, rtol=1e-9, atol=1e-11)
    for (name, a), (_, b) in zip(ours.state_dict().items(), norm.state_dict().items(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12), name
    assert [p.grad is not None for p in ours.parameters()] == [True] * (2 if affine else 0)
    norm.eval()
    ours.eval()
    assert torch.equal(whole_batch_norm(ours, x.detach()), ours(x.detach()))


def test_only_plain_norms_are_changed_and_all_are_given_back() -> None:
    class Acting(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).relu()

    model = nn.Sequential(nn.BatchNorm2d(2), Acting(2), FoldedBatchNorm2d(2))
    keys = list(model.state_dict())
    with synchronised_norms(model, 1):
        assert all("forward" not in module.__dict__ for module in model)
    with synchronised_norms(model, 2):
        assert ["forward" in module.__dict__ for module in model] == [True, False, True]
        assert list(model.state_dict()) == keys
    assert all("forward" not in module.__dict__ for module in model)
