"""The Triton kernels of token similarities: on a GPU where there is one, and on a CPU in Triton's interpreter."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA GPU")

from finelip_diffusion.scores import max_similarity  # noqa: E402

# float32: products in three TF32 parts, sums of 80 terms. bfloat16: 8 bits of the gradient of each match, and of their
# sum; float16: 11 bits of the sum. The largest gradients here are about 0.3.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
SIZES = [(3, 7, 4, 6, 24), (2, 52, 3, 40, 80), (2, 150, 2, 131, 16)]  # I, P, J, T, E: less than a tile, and several


def separate_tokens(batch: int, length: int, width: int, seed: int) -> Tensor:
    """Random tokens of many lengths and both signs of similarity, in float64, that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(batch, length, width, generator=generator), dim=-1).bfloat16().double()


def random_mask(batch: int, length: int, seed: int) -> Tensor:
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, 0] = True
    return mask


def scores_and_gradients(tokens: list[Tensor], masks: list[Tensor | None], slope: float, fused: bool) -> list[Tensor]:
    tokens = [values.clone().requires_grad_() for values in tokens]
    both = max_similarity(*tokens, *masks, slope, fused=fused)
    generator = torch.Generator().manual_seed(9)
    back = [torch.randn(both[0].shape, generator=generator).to(both[0]) for _ in both]
    return [*both, *torch.autograd.grad(both, tokens, back)]


@on_device
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_scores_and_gradients_are_those_of_float64(size, masked, dtype) -> None:
    if INTERPRETED and dtype != torch.float32:
        pytest.skip("the interpreter multiplies the bits of bfloat16 as integers, and is slow")
    images, P, texts, T, E = size
    exact = [separate_tokens(images, P, E, 1).to(DEVICE), separate_tokens(texts, T, E, 2).to(DEVICE)]
    masks: list[Tensor | None] = [None, None]
    if masked:
        masks = [random_mask(images, P, 3).to(DEVICE), random_mask(texts, T, 4).to(DEVICE)]
        for values, mask in zip(exact, masks, strict=True):
            values[~mask] = math.nan  # of tokens that are not kept nothing may get through
    expected = scores_and_gradients([values.nan_to_num() for values in exact], masks, 0.1, fused=False)
    found = scores_and_gradients([values.to(dtype) for values in exact], masks, 0.1, fused=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=TOLERANCES[dtype])
    assert found[0].dtype == torch.float32 and found[2].dtype == dtype


@on_device
def test_one_side_alone_gets_a_gradient() -> None:
    tokens = [separate_tokens(3, 9, 16, 1).float().to(DEVICE), separate_tokens(2, 5, 16, 2).float().to(DEVICE)]
    expected = scores_and_gradients(tokens, [None, None], 1.0, fused=False)[2:]
    for side in (0, 1):
        asked = [values.clone().requires_grad_(number == side) for number, values in enumerate(tokens)]
        generator = torch.Generator().manual_seed(9)
        both = max_similarity(*asked, fused=True)
        torch.autograd.backward(both, [torch.randn(both[0].shape, generator=generator).to(DEVICE) for _ in both])
        torch.testing.assert_close(asked[side].grad, expected[side], rtol=0, atol=1e-5)
        assert asked[1 - side].grad is None


def test_in_the_interpreter() -> None:
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("they run natively, or this is the interpreter")
    flags = ["--noconftest", "-p", "no:cacheprovider", "-n", "0"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *flags, str(Path(__file__).resolve())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


def test_what_the_kernels_cannot_do_is_refused_in_one_sentence() -> None:
    tokens = torch.ones(2, 3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="fused=True, but .*: leave fused out"):
        max_similarity(tokens, tokens, fused=True)
