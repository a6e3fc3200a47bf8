"""Late interaction against what else computes the same scores: seconds, memory, and how exact the gradients are.

Rows are timed in turns, so that other load on the machine meets them all, and each is set beside the bare product of
the same tokens. Extra memory is the peak over what the inputs take: on a CPU the process's resident memory, measured
in a process of its own for each row. Gradients are compared with float64 autograd's, on fewer pairs of tokens that
bfloat16 holds exactly.

    python benchmarks/late_interaction.py                   # the sizes of a training step, two minutes on two cores
    python benchmarks/late_interaction.py --device cuda     # 512 pairs in float32 and bfloat16, half a minute

On a GPU it ends with an error where the Triton kernels miss a score or a gradient.
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

from finelip_diffusion.evaluation.intervals import markdown_table
from finelip_diffusion.scores import NEGATIVE_SLOPE, late_interaction, max_similarity

# float32 sums a few hundred matches; bfloat16 rounds each match, and the sum, to 8 bits.
GRADIENT_BARS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass
class Arguments:
    """The defaults are pairs of ViT-L/14 with refined tokens."""

    batch_size: int = field(
        default=0, metadata={"help": "The number of images, and of captions. 0 is 128, or 512 on a GPU."}
    )
    image_tokens: int = field(default=52, metadata={"help": "The number of tokens per image."})
    text_tokens: int = field(default=52, metadata={"help": "The number of tokens per caption."})
    width: int = field(default=768, metadata={"help": "The width of each token."})
    device: str = field(default="cpu", metadata={"help": "The device: cpu or cuda."})
    threads: int = field(
        default=0,
        metadata={
            "help": "The number of CPU threads. 0 is the default of torch. With 1, the CPU time of the process "
            "is measured."
        },
    )
    repeats: int = field(
        default=5,
        metadata={"help": "The number of times that each row is timed. The loop over captions is timed once."},
    )
    gradient_batch_size: int = field(
        default=16, metadata={"help": "The number of images, and of captions, on which gradients are compared."}
    )
    seed: int = field(default=0, metadata={"help": "The random seed for the tokens and the incoming gradient."})

    def __post_init__(self) -> None:
        self.batch_size = self.batch_size or (512 if self.device == "cuda" else 128)


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


def fused(image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
    """`late_interaction` by the Triton kernels where there is a GPU."""
    if not image_tokens.is_cuda:
        return late_interaction(image_tokens, text_tokens)
    both = max_similarity(image_tokens, text_tokens, negative_slope=NEGATIVE_SLOPE, fused=True)
    return both[0] + both[1]


def forward_backward(
    score: Callable[[Tensor, Tensor], Tensor], image_tokens: Tensor, text_tokens: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    scores = score(image_tokens, text_tokens)
    return torch.autograd.grad(scores, (image_tokens, text_tokens), grad.to(scores.dtype))


def product(image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
    return image_tokens.flatten(0, 1) @ text_tokens.flatten(0, 1).T


@torch.no_grad()
def bare_product(image_tokens: Tensor, text_tokens: Tensor, grad: Tensor) -> None:
    product(image_tokens, text_tokens)


def three_products(image_tokens: Tensor, text_tokens: Tensor, grad: Tensor) -> None:
    similarity = product(image_tokens, text_tokens)
    torch.autograd.grad(similarity, (image_tokens, text_tokens), torch.ones_like(similarity))


@torch.no_grad()
def forward(image_tokens: Tensor, text_tokens: Tensor, grad: Tensor) -> None:
    fused(image_tokens, text_tokens)


BARE, LOOP, FORWARD, OURS, PLAIN = (
    "bare matrix product, forward", "loop over captions", "late_interaction, forward", "late_interaction",
    "late_interaction without Triton",
)  # fmt: skip
Row = Callable[..., tuple[Tensor, ...] | None]


def rows_of(device: str) -> dict[str, Row]:
    """What is timed; on a GPU the loop over captions would keep 40 GB."""
    loop: dict[str, Row] = {LOOP: partial(forward_backward, loop_over_captions)}
    without: dict[str, Row] = {PLAIN: partial(forward_backward, late_interaction)}
    return {
        **(loop if device == "cpu" else {}),
        "einsum": partial(forward_backward, einsum),
        BARE: bare_product,
        "bare matrix product": three_products,
        **(without if device == "cuda" else {}),
        FORWARD: forward,
        OURS: partial(forward_backward, fused),
    }


def make_inputs(args: Arguments, batch_size: int, dtype: torch.dtype, exact: bool = False) -> list[Tensor]:
    """Normalized random tokens of both sides, if `exact` rounded to bfloat16, and the gradient of their scores."""
    generator = torch.Generator().manual_seed(args.seed)
    inputs = []
    for length in (args.image_tokens, args.text_tokens):
        tokens = F.normalize(torch.randn(batch_size, length, args.width, generator=generator), dim=-1)
        tokens = tokens.bfloat16() if exact else tokens
        inputs.append(tokens.to(args.device, dtype).requires_grad_())
    return [*inputs, torch.randn(batch_size, batch_size, generator=generator).to(args.device)]


def seconds(run: Callable[..., object], inputs: list[Tensor]) -> float:
    """Of one run; of a single CPU thread those of the process, so that other load on the machine does not count."""
    clock = time.process_time if not inputs[0].is_cuda and torch.get_num_threads() == 1 else time.perf_counter
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    start = clock()
    run(*inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def peak_megabytes(row: str, args: Arguments, dtype: torch.dtype) -> float:
    """Peak memory of one run over what was taken before it."""
    run = rows_of(args.device)[row]
    run(*make_inputs(args, 2, dtype))  # what libraries take on their first call
    inputs = make_inputs(args, args.batch_size, dtype)
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(*inputs)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = peak_resident()
    filling = []  # brings resident memory up to its own peak, so that whatever comes on top shows
    while peak_resident() == before:
        filling.append(b"1" * 2**18)
    before = peak_resident()
    run(*inputs)
    return (peak_resident() - before) / 1e6


def peak_resident() -> int:
    """Bytes; Linux counts it in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gradient_errors(args: Arguments, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference of any gradient to float64 autograd's; the gradients of the scores have variance 1."""
    inputs = make_inputs(args, args.gradient_batch_size, dtype, exact=True)
    exact = forward_backward(einsum, *(tensor.double() for tensor in inputs))
    errors = {}
    for row, run in rows_of(args.device).items():
        grads = run(*inputs)
        if grads is not None:
            errors[row] = max((grad - other).abs().max().item() for grad, other in zip(grads, exact, strict=True))
    return errors


def score_error(args: Arguments, dtype: torch.dtype) -> float:
    """Largest difference of any score to float64's."""
    image_tokens, text_tokens, _ = make_inputs(args, args.gradient_batch_size, dtype, exact=True)
    exact = einsum(image_tokens.double(), text_tokens.double())
    return (fused(image_tokens, text_tokens) - exact).abs().max().item()


def main(args: Arguments) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    missed = [wrong for dtype in dtypes_of(args.device) for wrong in compare(args, dtype)]
    if missed:
        raise SystemExit("; ".join(missed))


def dtypes_of(device: str) -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16] if device == "cuda" else [torch.float32]


def compare(args: Arguments, dtype: torch.dtype) -> list[str]:
    """Prints the table of a dtype, and returns what the kernels miss."""
    rows = rows_of(args.device)
    if args.device == "cuda":
        memory = {row: peak_megabytes(row, args, dtype) for row in rows}
    else:
        context = get_context("forkserver")
        context.set_forkserver_preload(["finelip_diffusion.scores", "transformers"])
        with context.Pool(1, maxtasksperchild=1) as pool:
            peaks = pool.map(partial(peak_megabytes, args=args, dtype=dtype), rows, chunksize=1)
        memory = dict(zip(rows, peaks, strict=True))
    errors, wrong = gradient_errors(args, dtype), score_error(args, dtype)
    inputs = make_inputs(args, args.batch_size, dtype)
    times: dict[str, list[float]] = {row: [] for row in rows}
    for repeat in range(args.repeats):
        for row, run in rows.items():
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
        f"width {args.width}, {str(dtype).removeprefix('torch.')}, {where}, torch {torch.__version__}, "
        f"median of {args.repeats}\n"
    )
    heads = ["forward and backward, unless said", "seconds", "of the bare product"]
    heads += ["extra memory, MB", "gradient error"]
    lines = []
    for row in rows:
        error = f"{errors[row]:.1e}" if row in errors else "-"
        lines.append([row, f"{took[row]:.4f}", f"{ratios[row]:.2f}", f"{memory[row]:.0f}", error])
    print(*markdown_table(heads, lines), sep="\n")
    print(f"\nlargest difference of a score to float64: {wrong:.1e}\n")
    if args.device != "cuda":
        return []
    bars = {"score": (wrong, 1e-5), "gradient": (errors[OURS], GRADIENT_BARS[dtype])}
    return [
        f"a {name} in {dtype} differs by {error:.1e} from float64's, more than {bar:g}"
        for name, (error, bar) in bars.items()
        if not error <= bar
    ]


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
