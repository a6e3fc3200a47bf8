"""What late interaction costs: FineLIP's loop over captions, an einsum, the bare matrix product, and ours.

Rows are timed in turns, so that other load on the machine meets them all, and each is set beside the bare product of
the same tokens. Extra memory is the peak over what the inputs take: on a CPU the process's resident memory, measured
in a process of its own for each row. Gradients are compared with float64 autograd's, on fewer pairs.

    python benchmarks/late_interaction.py                   # the sizes of a training step, two minutes on two cores
    python benchmarks/late_interaction.py --device cuda
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import HfArgumentParser

from finelip_diffusion.scores import NEGATIVE_SLOPE, late_interaction


@dataclass
class Arguments:
    """The defaults are 128 pairs of ViT-L/14 with refined tokens."""

    batch_size: int = field(default=128, metadata={"help": "Images, and captions."})
    image_tokens: int = field(default=52, metadata={"help": "Tokens of an image."})
    text_tokens: int = field(default=52, metadata={"help": "Tokens of a caption."})
    width: int = field(default=768, metadata={"help": "Width of a token."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    repeats: int = field(default=5, metadata={"help": "Times each row is timed; the loop over captions once."})
    gradient_batch_size: int = field(default=16, metadata={"help": "Images, and captions, to compare gradients on."})
    seed: int = field(default=0, metadata={"help": "Seeds the tokens and the gradient that is sent back."})


def loop_over_captions(image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
    """The order of work of FineLIP's training code: each caption in turn, repeated for all images."""
    scores = []
    for caption in text_tokens:
        repeated = caption.repeat(len(image_tokens), 1, 1)
        similarity = F.leaky_relu(repeated @ image_tokens.transpose(1, 2), NEGATIVE_SLOPE)  # (B, T, P)
        scores.append(similarity.max(2).values.mean(1) + similarity.max(1).values.mean(1))
    return torch.stack(scores, dim=1)


def einsum(image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
    """All similarities at once."""
    similarity = F.leaky_relu(torch.einsum("ipe,jte->ijpt", image_tokens, text_tokens), NEGATIVE_SLOPE)
    return similarity.max(2).values.mean(2) + similarity.max(3).values.mean(2)


def forward_backward(
    score: Callable[[Tensor, Tensor], Tensor], image_tokens: Tensor, text_tokens: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(score(image_tokens, text_tokens), (image_tokens, text_tokens), grad)


@torch.no_grad()
def bare_product(image_tokens: Tensor, text_tokens: Tensor, grad: Tensor) -> None:
    image_tokens.flatten(0, 1) @ text_tokens.flatten(0, 1).T


@torch.no_grad()
def forward(image_tokens: Tensor, text_tokens: Tensor, grad: Tensor) -> None:
    late_interaction(image_tokens, text_tokens)


BARE, LOOP = "bare matrix product, forward", "loop over captions"
ROWS: dict[str, Callable[..., tuple[Tensor, ...] | None]] = {
    LOOP: partial(forward_backward, loop_over_captions),
    "einsum": partial(forward_backward, einsum),
    BARE: bare_product,
    "late_interaction, forward": forward,
    "late_interaction": partial(forward_backward, late_interaction),
}


def make_inputs(args: Arguments, batch_size: int) -> list[Tensor]:
    """Normalised random tokens of both sides, and the gradient of their scores."""
    generator = torch.Generator().manual_seed(args.seed)
    inputs = []
    for length in (args.image_tokens, args.text_tokens):
        tokens = torch.randn(batch_size, length, args.width, generator=generator)
        inputs.append(F.normalize(tokens, dim=-1).to(args.device).requires_grad_())
    return [*inputs, torch.randn(batch_size, batch_size, generator=generator).to(args.device)]


def seconds(run: Callable[..., object], inputs: list[Tensor]) -> float:
    start = time.perf_counter()
    run(*inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_megabytes(row: str, args: Arguments) -> float:
    """Peak memory of one run over what was taken before it."""
    ROWS[row](*make_inputs(args, 2))  # what libraries take on their first call
    inputs = make_inputs(args, args.batch_size)
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ROWS[row](*inputs)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = peak_resident()
    filling = []  # brings resident memory up to its own peak, so that whatever comes on top shows
    while peak_resident() == before:
        filling.append(b"1" * 2**18)
    before = peak_resident()
    ROWS[row](*inputs)
    return (peak_resident() - before) / 1e6


def peak_resident() -> int:
    """Bytes; Linux counts it in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gradient_errors(args: Arguments) -> dict[str, float]:
    """Largest difference of any gradient to float64 autograd's; the gradients of the scores have variance 1."""
    inputs = make_inputs(args, args.gradient_batch_size)
    exact = forward_backward(einsum, *(tensor.double() for tensor in inputs))
    errors = {}
    for row, run in ROWS.items():
        grads = run(*inputs)
        if grads is not None:
            errors[row] = max((grad - other).abs().max().item() for grad, other in zip(grads, exact, strict=True))
    return errors


def main(args: Arguments) -> None:
    with get_context("forkserver").Pool(1, maxtasksperchild=1) as pool:
        memory = dict(zip(ROWS, pool.map(partial(peak_megabytes, args=args), ROWS, chunksize=1), strict=True))
    errors = gradient_errors(args)
    inputs = make_inputs(args, args.batch_size)
    times: dict[str, list[float]] = {row: [] for row in ROWS}
    for repeat in range(args.repeats):
        for row, run in ROWS.items():
            if row != LOOP or repeat == 0:
                times[row].append(seconds(run, inputs))
    took = {row: statistics.median(values) for row, values in times.items()}
    ratios = {  # within each turn
        row: statistics.median(value / bare for value, bare in zip(values, times[BARE], strict=False))
        for row, values in times.items()
    }
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{args.batch_size} images x {args.batch_size} captions, {args.image_tokens} x {args.text_tokens} tokens, "
        f"width {args.width}, float32, {where}, torch {torch.__version__}, median of {args.repeats}\n"
    )
    print("| forward and backward, unless said | seconds | of the bare product | extra memory, MB | gradient error |")
    print("|---|---|---|---|---|")
    for row in ROWS:
        error = f"{errors[row]:.1e}" if row in errors else "-"
        print(f"| {row} | {took[row]:.3f} | {ratios[row]:.2f} | {memory[row]:.0f} | {error} |")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
