"""The softmax of the fused head against mpmath, at any offset and any probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from helpers.fused import cut_blocks, flat_logps, flat_pair
from spoloss.torch import _devices, _exponentials, _softmax

GAPS = (27.0, 18.0, 9.0, 4.0, 1.0, 0.0, -10.0, -1000.0, -10_000.0)
"""The target's logit minus the others': -log p from about 1e-12 to 1e4."""


class Margin:
    """l(h) = h, so that the gradient of the loss is that of the log-probability."""

    def value(self, margin: Tensor, beta: float) -> Tensor:  # noqa: ARG002
        return margin

    def slope(self, margin: Tensor, beta: float) -> Tensor:  # noqa: ARG002
        return torch.ones_like(margin)


def one_pass(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    none = torch.full_like(labels, -100)
    empty = hidden.detach()
    call = {"beta": 1.0, "reduction": "sum", **options}
    out = flat_pair(Margin(), hidden, empty, weight, labels, none, 0.0, 0.0, **call)
    torch.testing.assert_close(out.loss, out.chosen_logps.sum())
    return out.chosen_logps + (out.loss - out.loss.detach()) / len(labels)


WAYS = {"recomputed": flat_logps, "one pass": one_pass}


@pytest.fixture(params=["in place", "fused kernel"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks of two vocabulary entries, in both forms of the exponentials."""
    cut_blocks(monkeypatch, 2)
    if request.param == "fused kernel":
        monkeypatch.setattr(_devices, "CPU", _devices.CPU._replace(compiles=True))
        monkeypatch.setattr(_exponentials, "_VECTOR", 1)
        monkeypatch.setattr(_exponentials, "compiled", lambda function: function)
    return str(request.param)


def exact(logits: list[float], target: int) -> tuple[float, list[float]]:
    """Log p of the target, and its derivative with respect to each logit."""
    with mpmath.workdps(60):
        exps = [mpmath.exp(z) for z in map(mpmath.mpf, logits)]
        total = mpmath.fsum(exps)
        others = mpmath.fsum(e for v, e in enumerate(exps) if v != target)
        slopes = [others / total if v == target else -e / total for v, e in enumerate(exps)]
        return float(-mpmath.log1p(others / exps[target])), list(map(float, slopes))


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e8])
@pytest.mark.parametrize("trained", [False, True])
def test_no_digit_is_lost(way: str, dtype: torch.dtype, offset: float, *, trained: bool) -> None:
    gaps = [8.0 * round(gap / 8.0) for gap in GAPS] if abs(offset) > 1e7 else GAPS
    rows = [[offset, offset + gap, offset - 1e3, offset, offset] for gap in gaps]
    hidden = torch.tensor(rows, dtype=dtype)[:, None].requires_grad_()
    assert hidden[:, 0].tolist() == rows
    weight = torch.eye(5, dtype=dtype, requires_grad=trained)  # the hidden states are the logits
    labels = torch.ones(len(rows), 1).long()
    got = WAYS[way](hidden, weight, labels, shift=False)
    (grad,) = torch.autograd.grad(got.sum(), hidden)
    eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    for logits, logp, slopes in zip(rows, got.tolist(), grad[:, 0].tolist(), strict=True):
        true_logp, true_slopes = exact(logits, 1)
        assert logp == pytest.approx(true_logp, rel=8.0 * eps, abs=least)
        assert slopes == pytest.approx(true_slopes, rel=8.0 * eps, abs=least)


def from_log_sum_exp(sums: _softmax.Sums) -> Tensor:
    rest = sums.peak + sums.others.log()
    return torch.nn.functional.logsigmoid(sums.target - rest)


def by_difference(sums: _softmax.Sums) -> Tensor:
    return sums.target - sums.peak - sums.total().log()


@pytest.mark.parametrize(("wrong", "offset"), [(from_log_sum_exp, 1e4), (by_difference, 0.0)])
def test_the_check_catches_lost_digits(
    wrong: Callable[..., Any], offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_softmax.Sums, "logps", wrong)
    with pytest.raises(AssertionError):
        test_no_digit_is_lost("recomputed", torch.float32, offset, trained=True)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("softcap", [None, 1.0, 30.0])
@pytest.mark.parametrize("trained", [False, True])
def test_an_entry_that_a_bias_forbids(way: str, softcap: float | None, *, trained: bool) -> None:
    """Padding of the vocabulary adds nothing; as a label, it has log-probability -inf."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    hidden, weight, bias = normal(3, 4, 2), normal(5, 2), normal(5) - 20.0
    labels = torch.randint(5, (3, 4), generator=generator)
    padded = {
        "weight": torch.cat([weight, normal(3, 2)]),
        "bias": torch.cat([bias, torch.full((3,), -torch.inf)]),
    }
    found = []
    for head in ({"weight": weight, "bias": bias}, padded):
        leaves = [hidden, *head.values()]
        for leaf, wanted in zip(leaves, (True, trained, trained), strict=True):
            leaf.requires_grad_(wanted)
        logps = WAYS[way](leaves[0], leaves[1], labels, bias=leaves[2], softcap=softcap)
        wanted = leaves if trained else leaves[:1]
        found.append((logps.detach(), *torch.autograd.grad(logps.sum(), wanted)))
    for plain, with_padding in zip(*found, strict=True):
        if plain.shape == hidden.shape or (plain.ndim == 1 and len(plain) == 3):
            torch.testing.assert_close(with_padding, plain)
        else:
            torch.testing.assert_close(with_padding[:5], plain)
            assert (with_padding[5:] == 0).all()
    labels[0, 2] = 6
    leaves = [hidden, *padded.values()]
    logps = flat_logps(
        hidden, padded["weight"], labels, bias=padded["bias"], softcap=softcap, per_token=True
    )
    assert logps[0, 1] == -torch.inf
    assert (logps > -torch.inf).sum() == logps.numel() - 1
    for grad in torch.autograd.grad(logps.sum(), leaves if trained else leaves[:1]):
        assert grad.isfinite().all()
