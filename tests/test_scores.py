"""Scores against the papers' loops in float64; their masks, their precision, and the memory that they hold."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_scores import (
    EXACT,
    IMAGES,
    TEXTS,
    E,
    Mixtures,
    P,
    T,
    kept,
    literal_laps,
    literal_max_similarity,
    random_mask,
    random_tokens,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finelip_diffusion import scores
from finelip_diffusion.scores import laps_scores, late_interaction, max_similarity

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def image_tokens() -> Tensor:
    return random_tokens(IMAGES, P, seed=1).requires_grad_()


@pytest.fixture
def text_tokens() -> Tensor:
    return random_tokens(TEXTS, T, seed=2).requires_grad_()


@pytest.fixture
def text_mask() -> Tensor:
    return random_mask(TEXTS, T, seed=3)


@pytest.fixture
def sent_back() -> Tensor:
    """A gradient of the scores."""
    return torch.randn(IMAGES, TEXTS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("block", [1, 100, 400, 10**6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_max_similarity_equals_the_loop(
    image_tokens, text_tokens, text_mask, sent_back, block, masked, slope, monkeypatch
) -> None:
    monkeypatch.setattr(scores, "CPU_BLOCK", block)
    masks = (random_mask(IMAGES, P), text_mask) if masked else (None, None)
    ours = max_similarity(image_tokens, text_tokens, *masks, negative_slope=slope)
    literal = literal_max_similarity(kept(image_tokens, masks[0]), kept(text_tokens, masks[1]), slope)
    torch.testing.assert_close(ours, literal, **EXACT)
    upstream = sent_back, sent_back.flip(0)
    grads = torch.autograd.grad(ours, (image_tokens, text_tokens), upstream)
    torch.testing.assert_close(grads, torch.autograd.grad(literal, (image_tokens, text_tokens), upstream), **EXACT)


def test_late_interaction_is_both_directions_with_a_slope_of_a_tenth(image_tokens, text_tokens, text_mask) -> None:
    literal = literal_max_similarity(list(image_tokens), kept(text_tokens, text_mask), 0.1)
    torch.testing.assert_close(late_interaction(image_tokens, text_tokens, None, text_mask), sum(literal), **EXACT)


def test_float32_gradients_are_within_1e_5_of_float64s() -> None:
    tokens = [random_tokens(6, 52, 96, seed).requires_grad_() for seed in (1, 2)]
    rounded = [values.detach().float().requires_grad_() for values in tokens]
    literal = sum(literal_max_similarity(list(tokens[0]), list(tokens[1]), 0.1))
    ours = torch.autograd.grad(late_interaction(*rounded).sum(), rounded)
    for grad, exact in zip(ours, torch.autograd.grad(literal.sum(), tokens), strict=True):
        assert (grad - exact).abs().max() < 1e-5


def test_rows_are_images_and_columns_are_captions(image_tokens) -> None:
    result = late_interaction(image_tokens, image_tokens[:3])
    assert result.shape == (IMAGES, 3)
    assert result.argmax(0).tolist() == [0, 1, 2]
    torch.testing.assert_close(result[:3].diagonal(), torch.full((3,), 2.0, dtype=torch.float64), **EXACT)


def test_padding_changes_nothing_whatever_it_holds(image_tokens, text_tokens, sent_back) -> None:
    def padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
        longer = torch.cat([tokens, torch.full_like(tokens, math.nan)], dim=1)
        return longer, torch.arange(longer.shape[1]).expand(len(longer), -1) < tokens.shape[1]

    (images, image_mask), (texts, mask) = padded(image_tokens), padded(text_tokens)
    plain, with_pads = late_interaction(image_tokens, text_tokens), late_interaction(images, texts, image_mask, mask)
    torch.testing.assert_close(with_pads, plain, **EXACT)
    plain_grads = torch.autograd.grad(plain, (image_tokens, text_tokens), sent_back)
    grads = torch.autograd.grad(with_pads, (images, texts), sent_back)
    for grad, plain_grad in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(grad[:, : plain_grad.shape[1]], plain_grad, **EXACT)
        assert not grad[:, plain_grad.shape[1] :].any()


def test_a_slice_of_the_batch_has_a_slice_of_the_scores(image_tokens, text_tokens, text_mask) -> None:
    whole = late_interaction(image_tokens, text_tokens, text_mask=text_mask)
    part = late_interaction(image_tokens[1:3], text_tokens[2:], text_mask=text_mask[2:])
    torch.testing.assert_close(part, whole[1:3, 2:], **EXACT)


def test_a_pad_does_not_beat_a_negative_similarity() -> None:
    image = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    text = torch.tensor([[[-1.0, 0.0]]])
    for direction in max_similarity(image, text, image_mask=torch.tensor([[True, False]])):
        assert direction.item() == -1.0
    for direction in max_similarity(text, image, text_mask=torch.tensor([[True, False]])):
        assert direction.item() == -1.0


def test_at_similarity_0_the_slope_is_that_of_the_leaky_relu() -> None:
    image, text = torch.tensor([[[1.0, 0.0]]], requires_grad=True), torch.tensor([[[0.0, 1.0]]])
    (grad,) = torch.autograd.grad(late_interaction(image, text).sum(), image)
    x = torch.zeros((), requires_grad=True)
    (slope,) = torch.autograd.grad(F.leaky_relu(x, 0.1), x)
    torch.testing.assert_close(grad, 2 * slope * text)


def test_among_equal_tokens_one_gets_the_gradient(image_tokens, text_tokens, sent_back) -> None:
    twice = image_tokens.repeat(1, 2, 1)
    once, result = late_interaction(image_tokens, text_tokens), late_interaction(twice, text_tokens)
    torch.testing.assert_close(result, once, **EXACT)
    of_twice, of_texts = torch.autograd.grad(result, (twice, text_tokens), sent_back)
    expected, expected_of_texts = torch.autograd.grad(once, (image_tokens, text_tokens), sent_back)
    torch.testing.assert_close(of_twice[:, :P] + of_twice[:, P:], expected, **EXACT)
    torch.testing.assert_close(of_texts, expected_of_texts, **EXACT)


def test_no_gradient_sent_back_is_no_gradient(image_tokens, text_tokens) -> None:
    result = late_interaction(image_tokens, text_tokens)
    for grad in torch.autograd.grad(result, (image_tokens, text_tokens), torch.zeros_like(result)):
        assert not grad.any()


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_the_side_that_asks_gets_a_gradient(image_tokens, text_tokens, sent_back, frozen) -> None:
    tokens = [image_tokens, text_tokens]
    expected = torch.autograd.grad(late_interaction(*tokens), tokens, sent_back)[1 - frozen]
    tokens[frozen] = tokens[frozen].detach()
    late_interaction(*tokens).backward(sent_back)
    torch.testing.assert_close(tokens[1 - frozen].grad, expected, **EXACT)
    assert tokens[frozen].grad is None


def test_tokens_need_not_be_contiguous(image_tokens, text_tokens, sent_back) -> None:
    turned = image_tokens.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    expected = torch.autograd.grad(late_interaction(image_tokens, text_tokens), image_tokens, sent_back)
    torch.testing.assert_close(
        torch.autograd.grad(late_interaction(turned, text_tokens), turned, sent_back), expected, **EXACT
    )


def test_more_than_128_tokens_need_a_larger_integer() -> None:
    image_tokens, text_tokens = random_tokens(2, 200, 8, 1).requires_grad_(), random_tokens(3, 129, 8, 2)
    literal = sum(literal_max_similarity(list(image_tokens), list(text_tokens), 0.1))
    result = late_interaction(image_tokens, text_tokens)
    torch.testing.assert_close(result, literal, **EXACT)
    grads = (torch.autograd.grad(values.sum(), image_tokens)[0] for values in (result, literal))
    torch.testing.assert_close(*grads, **EXACT)
    assert [scores._index_dtype(n) for n in (128, 129, 2**15, 2**15 + 1)] == [
        torch.int8, torch.int16, torch.int16, torch.int32
    ]  # fmt: skip


def matching_tokens(batch: int, seed: int) -> Tensor:
    """The same E orthonormal tokens in every row, in any order and with noise: best matches win by a wide margin."""
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(batch, E, generator=generator).argsort(1)
    noise = 0.05 * torch.randn(batch, E, E, generator=generator, dtype=torch.float64)
    return F.normalize(torch.eye(E, dtype=torch.float64)[orders] + noise, dim=-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens(sent_back, dtype) -> None:
    tokens = [
        matching_tokens(IMAGES, 1).to(dtype).requires_grad_(),
        matching_tokens(TEXTS, 2).to(dtype).requires_grad_(),
    ]
    exact = [values.detach().double().requires_grad_() for values in tokens]
    result, literal = late_interaction(*tokens), sum(literal_max_similarity(*map(list, exact), 0.1))
    assert result.dtype == torch.float32
    unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(result.double(), literal, rtol=0, atol=2 * unit)  # a similarity is rounded once
    grads = torch.autograd.grad(result, tokens, sent_back.float())
    for grad, expected in zip(grads, torch.autograd.grad(literal, exact, sent_back), strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), expected, rtol=2 * unit, atol=1e-6)  # sums in float32, rounded once


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(sent_back) -> None:
    exact = [matching_tokens(IMAGES, 1).requires_grad_(), matching_tokens(TEXTS, 2).requires_grad_()]
    tokens = [values.detach().float().requires_grad_() for values in exact]
    literal = sum(literal_max_similarity(*map(list, exact), 0.1))
    with torch.autocast("cpu", torch.bfloat16):
        result = late_interaction(*tokens)
        grads = torch.autograd.grad(result, tokens, sent_back.float())
    assert result.dtype == torch.float32
    error = (result - literal).abs().max()
    unit = torch.finfo(torch.bfloat16).eps / 2
    assert 1e-6 < error < 2 * 3 * unit  # two directions; two factors and their product rounded; not float32
    for grad, expected in zip(grads, torch.autograd.grad(literal, exact, sent_back), strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)  # of the float32 tokens, in float32


def test_autocast_leaves_float64_alone(image_tokens, text_tokens) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        result = late_interaction(image_tokens, text_tokens)
    assert torch.equal(result, late_interaction(image_tokens, text_tokens))


def saved_bytes(run: Callable[[], Tensor], *inputs: Tensor) -> int:
    """Bytes of the storages that autograd keeps, those of the inputs left out."""
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()  # its graph keeps the storages, so no address is given out twice
    own = sum(storages.get(tensor.untyped_storage().data_ptr(), 0) for tensor in inputs)
    assert result.shape
    return sum(storages.values()) - own


@pytest.mark.parametrize(("batch", "length"), [(8, 16), (16, 16), (8, 32)])
def test_backward_keeps_a_byte_for_each_token_of_a_pair(batch, length) -> None:
    tokens = [random_tokens(batch, length, seed=seed).float().requires_grad_() for seed in (1, 2)]
    a_byte_each, weights = batch * batch * 2 * length, 4 * batch * 2 * length
    assert saved_bytes(lambda: max_similarity(*tokens)[0], *tokens) == a_byte_each + weights


def test_without_gradients_nothing_is_kept(image_tokens, text_tokens) -> None:
    with torch.no_grad():
        assert saved_bytes(lambda: late_interaction(image_tokens, text_tokens), image_tokens, text_tokens) == 0


class LargestStorage(TorchDispatchMode):
    """Watches every result of every operation, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.bytes = max([self.bytes, *sizes])
        self.operations.add(func.overloadpacket.__name__)
        return result


def test_no_tensor_is_larger_than_a_block_or_the_tokens(monkeypatch) -> None:
    monkeypatch.setattr(scores, "CPU_BLOCK", 1000)
    batch, length, width = 16, 12, 8
    tokens = [random_tokens(batch, length, width, seed).float().requires_grad_() for seed in (1, 2)]
    with LargestStorage() as watch:
        late_interaction(*tokens).sum().backward()
    assert {"mm", "_embedding_bag"} <= watch.operations  # both passes were watched
    choices, block_of_floats, of_tokens = batch * batch * length, 4 * 1000, 4 * batch * length * width
    assert watch.bytes <= max(choices, block_of_floats, of_tokens) < 4 * batch * batch * length * length / 10


def test_it_cannot_be_differentiated_twice(image_tokens, text_tokens) -> None:
    loss = late_interaction(image_tokens, text_tokens).square().sum()
    (grad,) = torch.autograd.grad(loss, image_tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_tokens": torch.ones(IMAGES, E)}, "image_tokens have shape (5, 16): give tokens of shape"),
        ({"text_tokens": torch.ones(TEXTS, 0, E)}, "text_tokens have shape (4, 0, 16): give tokens of shape"),
        ({"text_tokens": torch.ones(TEXTS, T, E + 1)}, "image tokens have width 16, text tokens 17: project both"),
        ({"text_mask": torch.ones(TEXTS, T)}, "text_mask is torch.float32 of shape (4, 6): give booleans of shape"),
        ({"image_mask": torch.ones(IMAGES, 1, dtype=torch.bool)}, "shape (5, 1): give booleans of shape (5, 7)"),
        ({"text_mask": torch.arange(TEXTS).expand(T, -1).T != 2}, "text_mask keeps no token of row 2"),
        ({"negative_slope": -0.1}, "negative_slope is -0.1, but"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_said_in_one_sentence(image_tokens, text_tokens, change, sentence) -> None:
    with pytest.raises(ValueError) as error:
        max_similarity(**{"image_tokens": image_tokens, "text_tokens": text_tokens, **change})
    assert sentence in str(error.value)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8])
def test_laps_scores_equal_the_loop(image_tokens, text_tokens, text_mask, sent_back, keep) -> None:
    torch.manual_seed(0)
    aggregation = Mixtures()
    asked = [image_tokens, text_tokens, *aggregation.parameters()]
    ours, literal = (
        score(3 * image_tokens, 2 * text_tokens, text_mask, aggregation, keep) for score in (laps_scores, literal_laps)
    )
    torch.testing.assert_close(ours, literal, **EXACT)
    grads, expected = (torch.autograd.grad(result, asked, sent_back) for result in (ours, literal))
    torch.testing.assert_close(grads, expected, **EXACT)


def test_laps_scores_ignore_padding_whatever_it_holds(image_tokens, text_tokens, text_mask) -> None:
    filled = text_tokens.detach().masked_fill(~text_mask[..., None], math.nan).requires_grad_()
    aggregation = Mixtures()
    scored = [laps_scores(image_tokens, tokens, text_mask, aggregation) for tokens in (text_tokens, filled)]
    torch.testing.assert_close(*scored, **EXACT)
    assert torch.autograd.grad(scored[1].sum(), filled)[0].isfinite().all()


def test_laps_scores_hold_no_images_for_each_caption() -> None:
    torch.manual_seed(0)
    aggregation, image_tokens = Mixtures(), random_tokens(IMAGES, 1 + P).requires_grad_()

    def kept_for(captions: int) -> int:
        texts, mask = random_tokens(captions, T).requires_grad_(), torch.ones(captions, T, dtype=torch.bool)
        return saved_bytes(lambda: laps_scores(image_tokens, texts, mask, aggregation), image_tokens)

    chosen_patches = 8 * IMAGES * math.ceil(P / 2) * E
    assert (kept_for(12) - kept_for(2)) / 10 < chosen_patches


def test_laps_scores_under_autocast(image_tokens, text_tokens, text_mask) -> None:
    aggregation = Mixtures()
    exact = laps_scores(image_tokens, text_tokens, text_mask, aggregation)
    rounded = [tokens.detach().float().requires_grad_() for tokens in (image_tokens, text_tokens)]
    with torch.autocast("cpu", torch.bfloat16):
        result = laps_scores(*rounded, text_mask, aggregation.float())
    assert result.dtype == torch.float32
    unit = torch.finfo(torch.bfloat16).eps / 2  # about eight roundings on the way: four in the mixtures, four behind
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=2 * 8 * unit)
    for grad in torch.autograd.grad(result.sum(), rounded):
        assert grad.dtype == torch.float32 and grad.isfinite().all()


@pytest.mark.parametrize(("keep", "chosen"), [(0.0, 0), (1.0, 7), (-1, -7)])
def test_laps_needs_patches_to_choose_and_to_fuse(text_tokens, text_mask, keep, chosen) -> None:
    with pytest.raises(ValueError, match=f"keep={keep} chooses {chosen} of 7 patches"):
        laps_scores(random_tokens(IMAGES, 1 + P), text_tokens, text_mask, Mixtures(), keep)


def test_the_benchmark_prints_its_table() -> None:
    sizes = {"batch_size": 3, "image_tokens": 4, "text_tokens": 5, "width": 8, "gradient_batch_size": 2, "repeats": 1}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    script = [sys.executable, ROOT / "benchmarks" / "late_interaction.py"]
    done = subprocess.run([*script, *flags], capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows[2:]] == [
        "loop over captions",
        "einsum",
        "bare matrix product, forward",
        "bare matrix product",
        "late_interaction, forward",
        "late_interaction",
    ]
    assert all(float(row[1]) >= 0 and float(row[2]) > 0 and float(row[3]) >= 0 for row in rows[2:])
    assert float(rows[-1][4]) < 1e-5
