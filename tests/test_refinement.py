"""Token refinement and attention pooling against plain computations written from the papers."""

import math

import pytest
import torch
from torch import Tensor

from finelip_diffusion.refinement import AttentionPooling, TokenRefinement

B, N, E, K, HEADS = 4, 6, 20, 3, 4
LENGTHS = [6, 4, 1, 3]
MASK = torch.arange(N) < torch.tensor(LENGTHS)[:, None]


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Norms and biases too, which are drawn as 1 and 0 and would hide where they stand."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = parameter.data.double() + 0.5 * noise


@pytest.fixture
def refinement() -> TokenRefinement:
    torch.manual_seed(0)
    module = TokenRefinement(E, K)
    randomize(module, seed=0)
    return module


@pytest.fixture
def pooling() -> AttentionPooling:
    torch.manual_seed(0)
    module = AttentionPooling(E, HEADS)
    randomize(module, seed=1)
    return module


def draw(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weight + bias


def plain_refinement(module: TokenRefinement, tokens: list[Tensor]) -> Tensor:
    """Section 3.2 for the tokens of one image or caption, one refined token after the other."""
    norm_weight, norm_bias, first, first_bias, second, second_bias = module.weigh.parameters()
    logits = []
    for token in tokens:
        hidden = first @ layer_norm(token, norm_weight, norm_bias) + first_bias
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2  # GELU
        logits.append(module.scale * (second @ hidden + second_bias))
    refined = []
    for k in range(K):
        shares = [logit[k].exp() for logit in logits]
        total = torch.stack(shares).sum()
        refined.append(
            torch.stack([share * token / total for share, token in zip(shares, tokens, strict=True)]).sum(0)
        )
    return torch.stack(refined)


def gradients(value: Tensor, module: torch.nn.Module, *inputs: Tensor) -> list[Tensor]:
    weights = draw(*value.shape, seed=3)  # no symmetry between outputs
    return list(torch.autograd.grad((weights * value).sum(), [*module.parameters(), *inputs]))


@pytest.mark.parametrize("masked", [False, True])
def test_refinement_equals_a_plain_loop(refinement: TokenRefinement, masked: bool) -> None:
    """Values and gradients, in float64, to the last bits."""
    tokens = draw(B, N, E).requires_grad_()
    lengths = LENGTHS if masked else [N] * B
    ours = refinement(tokens, MASK if masked else None)
    plain = torch.stack([plain_refinement(refinement, list(row[:n])) for row, n in zip(tokens, lengths, strict=True)])
    assert ours.shape == (B, K, E)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    for left, right in zip(gradients(ours, refinement, tokens), gradients(plain, refinement, tokens), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-11)


def test_the_hidden_layer_is_a_fifth_as_wide() -> None:
    """512 -> 102 -> 39, as the authors' weights are: ViT-B/16."""
    shapes = [tuple(parameter.shape) for parameter in TokenRefinement(512, 39).weigh.parameters()]
    assert shapes == [(512,), (512,), (102, 512), (102,), (39, 102), (39,)]


@pytest.mark.parametrize("garbage", [1e30, -1e30, math.inf, math.nan])
def test_padding_has_no_part_in_refinement(refinement: TokenRefinement, garbage: float) -> None:
    clean = draw(B, N, E).requires_grad_()
    expected = refinement(clean, MASK)
    dirty = clean.detach().masked_fill(~MASK[..., None], garbage).requires_grad_()
    found = refinement(dirty, MASK)
    assert torch.equal(found, expected)
    for left, right in zip(gradients(found, refinement, dirty), gradients(expected, refinement, clean), strict=True):
        assert torch.equal(left, right)
    (gradient,) = torch.autograd.grad(refinement(dirty, MASK).sum(), dirty)
    assert torch.equal(gradient[~MASK], torch.zeros_like(gradient[~MASK]))


def test_refinement_of_a_row_depends_neither_on_the_batch_nor_on_its_length(refinement: TokenRefinement) -> None:
    """To the last bits: other shapes may be summed in another order."""
    tokens = draw(B, N, E)
    whole = refinement(tokens, MASK)
    for row, length in enumerate(LENGTHS):
        alone = refinement(tokens[row : row + 1, :length])
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-12)


def test_refinement_in_half_precision_keeps_the_dtype(refinement: TokenRefinement) -> None:
    """bf16 has 8 bits: a few roundings of 2^-8, relative to the largest value."""
    tokens = draw(B, N, E)
    exact = refinement(tokens, MASK)
    half = refinement.bfloat16()(tokens.bfloat16(), MASK)
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).abs().max() < 2**-4 * exact.abs().max()


def plain_pooling(module: AttentionPooling, query: Tensor, tokens: Tensor) -> Tensor:
    """One query over the tokens of one image: multi-head attention that may also look at a token of zeros."""
    state = dict(module.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, state[f"{name}.weight"], state[f"{name}.bias"])

    weights, biases = state["attention.in_proj_weight"].chunk(3), state["attention.in_proj_bias"].chunk(3)
    q = weights[0] @ norm(query, "norm_queries") + biases[0]
    keys = [weights[1] @ norm(token, "norm_tokens") + biases[1] for token in tokens]
    values = [weights[2] @ norm(token, "norm_values") + biases[2] for token in tokens]
    keys, values = [*keys, torch.zeros_like(q)], [*values, torch.zeros_like(q)]
    heads = []
    for head in torch.arange(E).chunk(HEADS):
        shares = torch.stack([q[head] @ key[head] / math.sqrt(E / HEADS) for key in keys]).softmax(0)
        heads.append(sum(share * value[head] for share, value in zip(shares, values, strict=True)))
    return state["attention.out_proj.weight"] @ torch.cat(heads) + state["attention.out_proj.bias"]


def test_pooling_equals_a_plain_loop(pooling: AttentionPooling) -> None:
    """In float64, to the last bits."""
    queries, tokens = draw(B, 5, E).requires_grad_(), draw(B, N, E, seed=4).requires_grad_()
    ours = pooling(queries, tokens)
    plain = torch.stack(
        [
            torch.stack([plain_pooling(pooling, query, image) for query in row])
            for row, image in zip(queries, tokens, strict=True)
        ]
    )
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    both = (gradients(value, pooling, queries, tokens) for value in (ours, plain))
    for left, right in zip(*both, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-11)


def test_pooling_can_look_away(pooling: AttentionPooling) -> None:
    """Keys far from a query lose to the token of zeros, whose value is zero: what is left is the output's bias."""
    with torch.no_grad():
        pooling.attention.in_proj_weight[: 2 * E] = 0
        pooling.attention.in_proj_bias[:E], pooling.attention.in_proj_bias[E : 2 * E] = 10.0, -10.0
    pooled = pooling(draw(B, 2, E), draw(B, N, E, seed=4))
    torch.testing.assert_close(pooled, pooling.attention.out_proj.bias.expand_as(pooled), rtol=0, atol=1e-12)


def test_each_query_pools_for_itself(pooling: AttentionPooling) -> None:
    queries, tokens = draw(B, 5, E), draw(B, N, E, seed=4)
    whole = pooling(queries, tokens)
    alone = torch.cat([pooling(queries[:, place : place + 1], tokens) for place in range(5)], dim=1)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(pooling(queries[1:2], tokens[1:2])[0], whole[1], rtol=0, atol=1e-12)
