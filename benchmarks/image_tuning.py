"""What an update of image tuning costs at the size of Stable Diffusion 1.5, and what batch fits a card.

Random weights cost what trained ones do. An update is that of `finetune_text_to_image.py`, by default with its default
terms: captions through the long encoder and the frozen UNet, every fourth with a short prompt whose states are kept,
backward pass, clipping, AdamW and the average of the weights. The bare UNet is its forward and backward pass on as
many states, which somebody else made. Both take turns, so that other load on the machine meets them alike. Memory is
the peak that torch's allocator held. A card's batch is the largest whose update runs while the process may have no
more than that.

    python benchmarks/image_tuning.py --device cuda          # under 90 seconds of an H100
    python benchmarks/image_tuning.py --batch_size 1 --mixed_precision no --terms restated_attention kept_states
    python benchmarks/image_tuning.py --tiny                 # a test of this script, on a CPU
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from full_size import TEXT, TINY, TINY_UNET, UNET
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, HfArgumentParser

from finelip_diffusion.evaluation.intervals import markdown_table
from finelip_diffusion.memory import activation_bytes
from finelip_diffusion.positions import STOCK_POSITIONS
from finelip_diffusion.text_encoder import MAX_LENGTH
from finelip_diffusion.tokenizer import VOCAB_SIZE
from finelip_diffusion.tuning import TERMS, Parts, Place, TuningStep, keep_start

TIME_BAR = 1.15  # times the bare UNet's forward and backward pass
KEPT_EVERY = 4
GIB = 2**30
VAE_CHANNELS = (128, 256, 512, 512)


@dataclass
class Arguments:
    """The defaults are those of Stable Diffusion 1.5 at 512 pixels."""

    device: str = field(default="cpu", metadata={"help": "The device: cpu or cuda."})
    mixed_precision: str = field(default="bf16", metadata={"help": "The precision of autocast: no, fp16 or bf16."})
    batch_size: int = field(default=8, metadata={"help": "The number of images in the updates that are timed."})
    rounds: int = field(default=9, metadata={"help": "The number of runs of the update and of the bare UNet."})
    latent_size: int = field(
        default=64, metadata={"help": "The height and width of the latents. 64 corresponds to 512 pixels."}
    )
    terms: list[str] = field(
        default_factory=lambda: ["denoising", "kept_states"],
        metadata={"help": "The terms of the loss, each with a weight of 1. The target is for the default."},
    )
    card_gib: list[float] = field(
        default_factory=lambda: [23.0],
        metadata={
            "help": "The memory that is available on each card, in GiB. Of 24, the driver and the screen take "
            "about one."
        },
    )
    tiny: bool = field(
        default=False, metadata={"help": "Whether to use narrow models with 2 layers, as a test of this script."}
    )
    seed: int = field(default=0, metadata={"help": "The random seed for weights and noise."})
    check: bool = field(default=False, metadata={"help": "Whether to exit with an error if the target is missed."})

    def __post_init__(self) -> None:
        known = [name for name, term in TERMS.items() if term.reads not in ("teacher", "facts")]
        if unknown := set(self.terms) - set(known):
            raise SystemExit(f"--terms has {', '.join(sorted(unknown))}: choose among {', '.join(known)}.")


def make_parts(args: Arguments) -> Parts:
    """A Stable Diffusion with random weights on the device, the UNet in the precision of autocast."""
    dtype = dtype_of(args)
    text, unet_size = TEXT | (TINY if args.tiny else {}), UNET | (TINY_UNET if args.tiny else {})
    tokens = {"vocab_size": VOCAB_SIZE, "bos_token_id": VOCAB_SIZE - 2, "eos_token_id": VOCAB_SIZE - 1}
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        unet = UNet2DConditionModel(**unet_size, sample_size=args.latent_size)
        long, stock = (
            CLIPTextModel(CLIPTextConfig(**text, **tokens, max_position_embeddings=length))
            for length in (MAX_LENGTH, STOCK_POSITIONS)
        )
    for part in (unet.eval(), stock.eval(), long.train()):
        part.requires_grad_(part is long)
    for weight in unet.parameters():
        weight.data = weight.data.to(dtype)
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=VAE_CHANNELS))
    pipeline: Any = SimpleNamespace(unet=unet, vae=vae)
    tokenizer: Any = None
    parts = Parts(pipeline, {"text_encoder": Place(long, tokenizer, stock, tokenizer)}, DDPMScheduler())
    if any(TERMS[name].reads == "restated" for name in args.terms):
        keep_start(parts)
    return parts


def dtype_of(args: Arguments) -> torch.dtype:
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]


def make_batch(args: Arguments, size: int, length: int) -> dict[str, Tensor]:
    """Captions of `length` tokens, and short prompts for every fourth of them."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (size, UNET["in_channels"], args.latent_size, args.latent_size)
    kept = torch.arange(0, size, KEPT_EVERY)

    def ids(rows: int, columns: int) -> Tensor:
        tokens = torch.randint(1, 1000, (rows, columns), generator=generator)
        tokens[:, 0], tokens[:, -1] = VOCAB_SIZE - 2, VOCAB_SIZE - 1
        return tokens

    batch = {
        "latents": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "timesteps": torch.randint(0, 1000, (size,), generator=generator),
        "time_ids": torch.zeros(size, 6),
        "input_ids": ids(size, length),
        "restated_ids": ids(size, length),
        "kept_ids": ids(len(kept), STOCK_POSITIONS),
        "kept_rows": kept,
    }
    return {name: value.to(args.device) for name, value in batch.items()}


class Update:
    """An update of the encoder, as the script does it."""

    def __init__(self, parts: Parts, args: Arguments):
        self.args, self.step = args, TuningStep(parts, dict.fromkeys(args.terms, 1.0))
        self.trained = list(self.step.trained.values())
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True)
        self.average = EMAModel(self.trained, decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)

    def __call__(self, batch: dict[str, Tensor]) -> None:
        """One update."""
        with torch.autocast(self.args.device, dtype_of(self.args), enabled=self.args.mixed_precision != "no"):
            terms = self.step(batch)
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.trained)


def bare(parts: Parts, batch: dict[str, Tensor], states: Tensor) -> None:
    """The UNet's forward and backward pass, with a gradient of the states alone."""
    noisy = parts.scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"]).to(parts.unet.dtype)
    prediction = parts.unet(noisy, batch["timesteps"], states.detach().requires_grad_(True), return_dict=False)[0]
    F.mse_loss(prediction.float(), batch["noise"]).backward()


def seconds(run: Callable[[], None], device: str) -> float:
    """By the clock, the device's queue emptied before and after."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def print_time(parts: Parts, update: Update, args: Arguments) -> list[float]:
    """Seconds of both by the number of states; the ratios."""
    rows, ratios = [], []
    for length in (STOCK_POSITIONS, MAX_LENGTH):
        batch = make_batch(args, args.batch_size, length)
        width = parts.unet.config.cross_attention_dim
        states = torch.randn(args.batch_size, length, width, device=args.device, dtype=parts.unet.dtype)
        runs: list[Callable[[], None]] = [partial(bare, parts, batch, states), partial(update, batch)]
        for run in runs:  # what libraries do on their first call
            run()
        taken = [[seconds(run, args.device) for run in runs] for _ in range(args.rounds)]
        alone, whole = (statistics.median(each) for each in zip(*taken, strict=True))
        ratio = statistics.median(one[1] / one[0] for one in taken)
        ratios.append(ratio)
        rows.append([f"{length}", f"{1e3 * alone:.1f}", f"{1e3 * whole:.1f}", f"{ratio:.3f}"])
    print(f"\n{args.batch_size} images, n = {args.rounds} rounds\n")
    print("\n".join(markdown_table(["states", "bare UNet, ms", "an update, ms", "times"], rows)))
    print(f"\nhalf the batches are padded: {statistics.mean(ratios):.3f} times; the bar is {TIME_BAR:g}")
    return ratios


def checkpoint(parts: Parts, on: bool) -> None:
    """Switches the recomputing of activations on or off."""
    encoder = parts.places["text_encoder"].encoder
    if on:
        parts.unet.enable_gradient_checkpointing()
        encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        parts.unet.disable_gradient_checkpointing()
        encoder.gradient_checkpointing_disable()


def peak(update: Update, args: Arguments, size: int) -> int:
    """Bytes that the allocator held at most, weights included."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    update(make_batch(args, size, MAX_LENGTH))
    return torch.cuda.max_memory_allocated()


def largest_batch(update: Update, args: Arguments, limit: float, peaks: dict[int, int]) -> int:
    """The largest batch whose update runs in `limit` bytes; 0 if none does.

    Peaks of two batches say where to begin, a little above; from there one after the other is tried.
    """
    one, two = sorted(peaks)
    each = (peaks[two] - peaks[one]) / (two - one)
    size = max(1, int(1.02 * ((limit - peaks[one]) / each + one)) + 1)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        while size:
            try:
                torch.cuda.empty_cache()
                update(make_batch(args, size, MAX_LENGTH))
                break
            except torch.cuda.OutOfMemoryError:
                update.optimizer.zero_grad()
                size -= 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return size


def print_memory(parts: Parts, update: Update, args: Arguments) -> None:
    """Peaks with and without checkpointing, what was counted beforehand, and the batches that fit."""
    rows = []
    side = args.latent_size * 2 ** (len(VAE_CHANNELS) - 1)
    for on in (False, True):
        checkpoint(parts, on)
        count = activation_bytes(parts, args.batch_size, MAX_LENGTH, side, dtype_of(args), on)
        cells = [f"{'with' if on else 'without'} checkpointing", f"{count / GIB:.2f}"]
        if args.device == "cuda":
            update(make_batch(args, 1, MAX_LENGTH))
            torch.cuda.empty_cache()
            held = torch.cuda.memory_allocated()
            peaks = {size: peak(update, args, size) for size in (args.batch_size, 2 * args.batch_size)}
            batch = make_batch(args, args.batch_size, MAX_LENGTH)
            taken = statistics.median(seconds(partial(update, batch), args.device) for _ in range(5))
            cells += [f"{(peaks[args.batch_size] - held) / GIB:.2f}", f"{peaks[args.batch_size] / GIB:.2f}"]
            cells += [f"{1e3 * taken / args.batch_size:.1f}"]
            cells += [f"{largest_batch(update, args, card * GIB, peaks)}" for card in args.card_gib]
        rows.append(cells)
    heads = ["", "activations, counted, GiB"]
    if args.device == "cuda":
        heads += ["measured, with gradients, GiB", "peak, GiB", "ms an image"]
        heads += [f"batch in {card:g} GiB" for card in args.card_gib]
    print(f"\n{args.batch_size} images of {side} pixels, {MAX_LENGTH} states\n")
    print("\n".join(markdown_table(heads, rows)))


def main(args: Arguments) -> None:
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "one CPU thread"
    print(f"{where}, torch {torch.__version__}, {args.mixed_precision}")
    parts = make_parts(args)
    update = Update(parts, args)
    ratios = print_time(parts, update, args)
    print_memory(parts, update, args)
    if args.check and statistics.mean(ratios) > TIME_BAR:
        raise SystemExit(f"an update takes {statistics.mean(ratios):.3f} times the bare UNet; the bar is {TIME_BAR:g}")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
