"""Logits of chosen tokens and losses of whole distributions, against logits that are built in full."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from sg_opd_trl.core import local_support_matching
from sg_opd_trl.models import head as heads
from sg_opd_trl.models.head import (
    OutputHead,
    likeliest_tokens,
    project,
    support_log_probs,
    support_logits,
    tiled_token_losses,
)

N, H, V, S = 7, 6, 11, 3


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(*, bias: bool = True) -> tuple[Tensor, ...]:
    made = numbers(N, H, seed=0), numbers(V, H, seed=1), numbers(V, seed=2)
    return tuple(x.requires_grad_() for x in (made if bias else made[:2]))


IDS = torch.randint(0, V, (N, S), generator=torch.Generator().manual_seed(3))
IDS[0] = IDS[1] = torch.tensor([4, 4, 2])  # the same rows of the head again and again
SETTINGS: dict[str, dict] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0, "scale": 1.5, "temperature": 0.7},
}
#: Numbers in a tile: one position, two positions, all of them.
TILES = [1, 2 * S * H, 10_000]


def dense(hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: dict) -> Tensor:
    """Logits in float64, by the definitions of the fields."""
    logits = hidden.double() @ weight.double().t()
    logits = (logits if bias is None else logits + bias.double()) * settings.get("scale", 1.0)
    if "softcap" in settings:
        logits = settings["softcap"] * torch.tanh(logits / settings["softcap"])
    return logits / settings.get("temperature", 1.0)


def gradients(output: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    upstream = numbers(*output.shape, seed=9).to(output.dtype)
    return list(torch.autograd.grad(output, inputs, upstream))


def compare(found: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for own, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert other.abs().max() > 0.01
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_support_logits(name: str, bias: bool, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "TILE_ELEMENTS", tile)
    inputs = parameters(bias=bias)
    hidden, weight, added = (*inputs, None)[:3]
    found = support_logits(hidden, OutputHead(weight, added, **SETTINGS[name]), IDS)
    compare(found, dense(hidden, weight, added, SETTINGS[name]).gather(1, IDS), inputs)


def test_support_log_probs_come_from_one_token() -> None:
    inputs = hidden, weight, bias = parameters()
    log_probs, again = (dense(hidden, weight, bias, {}).log_softmax(-1) for _ in range(2))
    token = IDS[:, 0]
    known = again.gather(1, token.unsqueeze(1)).squeeze(1).float()
    found = support_log_probs(hidden, OutputHead(weight, bias), IDS[:, 1:], token, known)
    compare(found, log_probs.gather(1, IDS[:, 1:]), inputs)


def reverse_kl(target: Tensor) -> Callable[[Tensor, slice], Tensor]:
    def loss(logits: Tensor, tile: slice) -> Tensor:
        return local_support_matching(logits.unsqueeze(0), target[None, tile, : logits.size(1)]).squeeze(0)

    return loss


@pytest.mark.parametrize("tile", [1, 2 * V, 10_000])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocab_size", [V, V - 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_tiled_losses(name: str, vocab_size: int, bias: bool, tile: int) -> None:
    inputs = parameters(bias=bias)
    hidden, weight, added = (*inputs, None)[:3]
    target = numbers(N, V, seed=4)
    head = OutputHead(weight, added, **SETTINGS[name])
    found = tiled_token_losses(hidden, head, vocab_size, reverse_kl(target), tile)
    known = dense(hidden, weight, added, SETTINGS[name])[:, :vocab_size]
    compare(found, reverse_kl(target.double())(known, slice(None)), inputs)


@pytest.mark.parametrize("name", SETTINGS)
def test_trls_reverse_kl(name: str) -> None:
    """The kernel of TRL's DistillationTrainer at beta = 1, on a teacher of another width."""
    settings = SETTINGS[name]
    inputs = hidden, weight, bias = parameters()
    teacher_hidden, teacher = numbers(N, 4, seed=5), OutputHead(numbers(V, 4, seed=6), None, **settings)
    scale, softcap = settings.get("scale", 1.0), settings.get("softcap")
    expected, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, bias, teacher_hidden, teacher.weight, None, 1.0, teacher.temperature,
        scale, softcap, scale, softcap,
    )  # fmt: skip
    target = project(teacher_hidden, teacher, V)
    found = tiled_token_losses(hidden, OutputHead(weight, bias, **settings), V, reverse_kl(target), 3 * V)
    compare(found, expected.double(), inputs)


def test_likeliest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "TILE_ELEMENTS", 2 * V)
    hidden, weight, bias = parameters()
    log_probs = dense(hidden, weight, bias, {}).log_softmax(-1)
    for vocab_size in (V, 5):
        logps, ids, support = likeliest_tokens(hidden, OutputHead(weight, bias), IDS[:, 0], 4, vocab_size)
        expected = log_probs[:, :vocab_size].topk(4)
        assert torch.equal(ids, expected.indices)
        torch.testing.assert_close(support.double(), expected.values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logps.double(), log_probs.gather(1, IDS[:, :1]).squeeze(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("full_precision", [False, True])
def test_the_projection_runs_in_the_dtype_of_autocast_unless_told_otherwise(full_precision: bool) -> None:
    inputs = hidden, weight, bias = parameters()
    head = OutputHead(weight, bias, full_precision=full_precision)
    exact = dense(hidden, weight, bias, {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chosen = support_logits(hidden, head, IDS)
        losses = tiled_token_losses(hidden, head, V, reverse_kl(numbers(N, V, seed=4)), 2 * V)
    assert chosen.dtype == losses.dtype == torch.float32
    error = float((chosen - exact.gather(1, IDS)).detach().abs().max())
    assert (error < 1e-5) == full_precision
    assert error < 0.05
    for output in (chosen, losses):
        for gradient, given in zip(gradients(output, inputs), inputs, strict=True):
            assert gradient.dtype == given.dtype
            assert torch.isfinite(gradient).all()


def test_a_bfloat16_model_accumulates_the_heads_gradient_in_float32() -> None:
    """Many small terms on one row of the head: a bfloat16 sum would stop growing."""
    hidden = torch.full((2000, 1), 1.0, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logits = support_logits(hidden, OutputHead(weight), torch.zeros(2000, 1, dtype=torch.long))
    (gradient,) = torch.autograd.grad(logits.sum(), weight)
    assert gradient.flatten().tolist() == [2000.0, 0.0]


def test_no_position_at_all_stays_connected() -> None:
    inputs = hidden, weight, bias = parameters()
    head, none = OutputHead(weight, bias), torch.zeros(0, S, dtype=torch.long)
    losses = tiled_token_losses(hidden[:0], head, V, reverse_kl(numbers(0, V, seed=4)))
    for output in (support_logits(hidden[:0], head, none), losses):
        assert output.numel() == 0
        assert all(float(g.abs().sum()) == 0 for g in torch.autograd.grad(output.sum(), inputs))


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in torch.utils._pytree.tree_leaves(result):
            if isinstance(output, Tensor):
                self.numel = max(self.numel, output.untyped_storage().size() // output.element_size())
        return result


def test_no_tensor_grows_with_positions_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    count, width, vocab, tile = 300, 4, 500, 2000
    hidden, weight = numbers(count, width, seed=0).requires_grad_(), numbers(vocab, width, seed=1).requires_grad_()
    teacher = numbers(count, width, seed=2), OutputHead(numbers(vocab, width, seed=3))
    monkeypatch.setattr(heads, "TILE_ELEMENTS", tile)

    def loss(logits: Tensor, part: slice) -> Tensor:
        return local_support_matching(logits.unsqueeze(0), project(teacher[0][part], teacher[1], vocab)[None])[0]

    with LargestTensor() as seen:
        tiled_token_losses(hidden, OutputHead(weight), vocab, loss).sum().backward()
        likeliest_tokens(hidden.detach(), OutputHead(weight.detach()), torch.zeros(count, dtype=torch.long), 3, vocab)
    # One tile, or the gradient of the head; the whole would be 150,000.
    assert seen.numel == max(tile, vocab * width, count * width)
    with LargestTensor() as seen:
        support_logits(hidden, OutputHead(weight), torch.zeros(count, 100, dtype=torch.long)).sum().backward()
    # The logits themselves; with a vector for each of them it would be 120,000.
    assert seen.numel == count * 100
    with LargestTensor() as seen:
        (hidden @ weight.t()).sum().backward()
    assert seen.numel == count * vocab, "the measuring does see a large tensor"
