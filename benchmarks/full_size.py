"""What long prompts cost at full size: Stable Diffusion 1.5 and SDXL's two text encoders, ours against diffusers' own.

Random weights cost what trained ones do. Ours reads with `long_prompt="auto"`. The stock pipeline holds an encoder of
as many positions as the prompt needs, and is given two windows by hand where the prompt is longer than 248 tokens. So
both do the same work, and the last column says how far their results differ. Rows take turns, every other round
backwards, and ratios are taken within a round, so that other load on the machine meets them all. Time is the
process's own CPU seconds, which neighbors disturb less than the clock; memory is the peak over what the process held
before the call, as Linux counts it.

    python benchmarks/full_size.py                                # about fifteen minutes of one core, 7 GB
    python benchmarks/full_size.py --parts step --latent_size 16  # a quick look
"""

import ctypes
import gc
import logging
import math
import random
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, HfArgumentParser

from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline
from finelip_diffusion.evaluation.intervals import markdown_table, shown
from finelip_diffusion.text_encoder import MAX_LENGTH, text_embeddings
from finelip_diffusion.tokenizer import VOCAB_SIZE, clip_tokenizer

LENGTHS = (77, 248, 496)
SAME_LENGTH_BAR = 1.01  # times the CPU seconds of the stock pipeline, at the same length
LONGER_BAR = 1.06  # times the CPU seconds of a step at 77 tokens, for one at 248

TEXT = {  # ViT-L/14: SD 1.5's encoder, and SDXL's first
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
TEXT_2 = {  # OpenCLIP's ViT-bigG/14: SDXL's second
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
UNET = {  # SD 1.5
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
PARAMETERS = {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "unet": 859_520_964}
"""Of the published checkpoints."""

SENTENCE = "a red cat under a green tree beside two blue dogs ."
Runs = dict[Any, Callable[[], list[Tensor]]]

TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_UNET = {"block_out_channels": (32,) * 4, "layers_per_block": 1, "cross_attention_dim": 64}


@dataclass
class Arguments:
    """The defaults are the sizes of the published models."""

    parts: list[str] = field(
        default_factory=lambda: ["step", "encoding", "very_long"],
        metadata={"help": "The parts to measure: step (5 GB), encoding (7 GB), very_long (2 GB)."},
    )
    rounds: int = field(default=5, metadata={"help": "The number of runs of each step and of each very long prompt."})
    encodings: int = field(default=12, metadata={"help": "The number of times that each prompt is encoded."})
    encodings_xl: int = field(default=4, metadata={"help": "The number of times that each prompt is encoded by SDXL."})
    latent_size: int = field(
        default=64, metadata={"help": "The height and width of the latents. 64 corresponds to 512 pixels."}
    )
    very_long: list[int] = field(
        default_factory=lambda: [500, 1000, 2000, 5000],
        metadata={"help": "The lengths of the very long prompts in tokens."},
    )
    tiny: bool = field(
        default=False, metadata={"help": "Whether to use narrow models with 2 layers, as a test of this script."}
    )
    seed: int = field(default=0, metadata={"help": "The random seed for weights and noise."})
    check: bool = field(default=False, metadata={"help": "Whether to exit with an error if a target is missed."})


class Cost(NamedTuple):
    """Of one call."""

    cpu: float
    wall: float
    megabytes: float


def empty(name: str, args: Arguments) -> Any:
    """A part of its published size, or a tiny one, without weights.

    Raises:
        ValueError: If it has not as many parameters as the published one.
    """
    tokens = {"vocab_size": VOCAB_SIZE, "bos_token_id": VOCAB_SIZE - 2, "eos_token_id": VOCAB_SIZE - 1}
    small = TINY if args.tiny else {}
    with torch.device("meta"):
        if name == "unet":
            size = UNET | (TINY_UNET if args.tiny else {})
            module = UNet2DConditionModel(**size, sample_size=args.latent_size)
        elif name == "text_encoder":
            module = CLIPTextModel(CLIPTextConfig(**TEXT | small, **tokens))
        else:
            module = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2 | small, **tokens))
    count = sum(parameter.numel() for parameter in module.parameters())
    if not args.tiny and count != PARAMETERS[name]:
        raise ValueError(f"the {name} has {count} parameters, not the {PARAMETERS[name]} of the published one.")
    return module


def build(name: str, args: Arguments) -> Any:
    """A part with cheap random weights; it was made empty, so that no time goes into an initialization of its own."""
    module = empty(name, args).to_empty(device="cpu").eval()
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.constant_(parameter, name.endswith("weight"))  # norms do nothing, biases add nothing
    if isinstance(module, CLIPTextModel | CLIPTextModelWithProjection):
        position_ids = text_embeddings(module).position_ids
        position_ids.copy_(torch.arange(position_ids.shape[1]))
    return module


def stable_diffusion(args: Arguments, unet: bool) -> tuple[StableDiffusionPipeline, StableDiffusionPipeline, Any]:
    """SD 1.5 without its decoder, which no step needs: stock, stock around our long encoder, and ours."""
    parts = {
        "vae": None,
        "unet": build("unet", args) if unet else None,
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    text_encoder, tokenizer = build("text_encoder", args), clip_tokenizer(77)
    stock = StableDiffusionPipeline(text_encoder=text_encoder, tokenizer=tokenizer, **parts)
    ours = FineLIPStableDiffusionPipeline(
        text_encoder=text_encoder, tokenizer=tokenizer, long_prompt="stretch", **parts
    )
    ours.long_prompt = "auto"
    long = StableDiffusionPipeline(text_encoder=ours.text_encoder, tokenizer=ours.tokenizer, **parts)
    for pipe in (stock, long, ours):
        pipe.set_progress_bar_config(disable=True)
    return stock, long, ours


def stable_diffusion_xl(args: Arguments) -> tuple[StableDiffusionXLPipeline, StableDiffusionXLPipeline, Any]:
    """SDXL's text encoders alone: stock, stock around our long ones, and ours."""
    encoders = {
        "text_encoder": build("text_encoder", args),
        "text_encoder_2": build("text_encoder_2", args),
        "tokenizer": clip_tokenizer(77),
        "tokenizer_2": clip_tokenizer(77, pad_token="!"),
    }
    parts = {"vae": None, "unet": None, "scheduler": DDIMScheduler(), "add_watermarker": False}
    stock = StableDiffusionXLPipeline(**encoders, **parts)
    ours = FineLIPStableDiffusionXLPipeline(**encoders, **parts, long_prompt="stretch", second_encoder="stretch")
    ours.long_prompt = "auto"
    long = StableDiffusionXLPipeline(**{name: getattr(ours, name) for name in encoders}, **parts)
    return stock, long, ours


def text_of(tokens: int, sentence: str = "cat") -> str:
    """A prompt of so many tokens, start and end not counted; without sentences, so that every window is full."""
    words = sentence.split()
    return " ".join(words[place % len(words)] for place in range(tokens)).replace(" .", ".")


@torch.no_grad()
def encode(pipe: Any, prompt: str | list[str], guided: bool = True) -> list[Tensor]:
    """States of the prompt, and of the empty negative prompt where there is guidance; SDXL's pooled outputs, too."""
    states = pipe.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guided, negative_prompt=""
    )
    return [tensor for tensor in states if tensor is not None]


def encode_halves(pipe: Any, first: str, second: str) -> list[Tensor]:
    """What the stock pipeline can be made to do with twice its tokens, in the work that it takes."""
    states, *pooled = encode(pipe, [first, second], guided=False)  # (2, T, D)
    empty, *empty_pooled = encode(pipe, "", guided=False)  # (1, T, D)
    pooled = [tensor[:1] for tensor in pooled]
    return [states.flatten(0, 1)[None], empty.repeat(1, 2, 1), *pooled, *empty_pooled]  # (1, 2 T, D), twice


def encodings_of(stock: Any, long: Any, ours: Any) -> Runs:
    """Encoding at each length, in both pipelines."""
    full = text_of(MAX_LENGTH - 2)
    return {
        (77, "stock"): partial(encode, stock, text_of(75)),
        (77, "ours"): partial(encode, ours, text_of(75)),
        (248, "stock"): partial(encode, long, full),
        (248, "ours"): partial(encode, ours, full),
        (496, "stock"): partial(encode_halves, long, full, full),
        (496, "ours"): partial(encode, ours, f"{full} {full}"),
    }


def steps_of(stock: Any, long: Any, ours: Any, args: Arguments) -> Runs:
    """One denoising step with guidance at each length, from states that are ready, in both pipelines."""
    generator = torch.Generator().manual_seed(args.seed)
    latents = torch.randn(1, 4, args.latent_size, args.latent_size, generator=generator)

    def step(pipe: Any, states: list[Tensor]) -> list[Tensor]:
        call = {"latents": latents, "prompt_embeds": states[0], "negative_prompt_embeds": states[1]}
        return [pipe(**call, num_inference_steps=1, output_type="latent").images]

    return {
        (length, side): partial(step, ours if side == "ours" else stock, run())
        for (length, side), run in encodings_of(stock, long, ours).items()
    }


def cost(run: Callable[[], list[Tensor]]) -> tuple[Cost, list[Tensor]]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that taking it again shows
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    cpu, wall = time.process_time(), time.perf_counter()
    result = run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Cost(cpu, wall, (resident("VmHWM") - before) / 1e6), result


def resident(name: str) -> int:
    """Bytes that the process holds (`VmRSS`), or held at most (`VmHWM`)."""
    (kilobytes,) = re.findall(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def take_turns(runs: Runs, rounds: int) -> tuple[dict[Any, list[Cost]], dict[Any, list[Tensor]]]:
    """Runs all of them in each round, every other round backwards."""
    costs: dict[Any, list[Cost]] = {name: [] for name in runs}
    results = {}
    for number in range(rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            spent, results[name] = cost(runs[name])
            costs[name].append(spent)
    return costs, results


def ratio(costs: list[Cost], others: list[Cost], what: str = "cpu") -> tuple[float, float, float]:
    """Median of the ratios within each round, and its 95% bootstrap interval."""
    ratios = [getattr(one, what) / getattr(other, what) for one, other in zip(costs, others, strict=True)]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[49], medians[1949]


def median(costs: list[Cost], what: str) -> float:
    return statistics.median(getattr(spent, what) for spent in costs)


def print_table(title: str, costs: dict[Any, list[Cost]], results: dict[Any, list[Tensor]]) -> None:
    heads = ["tokens", "CPU s, stock", "ours", "ours / stock", "by the clock", "of 77 tokens"]
    heads += ["MB, stock", "ours", "apart"]
    rows = []
    for length in LENGTHS:
        stock, ours = costs[length, "stock"], costs[length, "ours"]
        ratios = [ratio(ours, stock), ratio(ours, stock, "wall"), ratio(ours, costs[77, "ours"])]
        pairs = zip(results[length, "stock"], results[length, "ours"], strict=True)
        difference = max((one - other).abs().max().item() for one, other in pairs)
        rows.append(
            [
                f"{length}",
                *(f"{median(side, 'cpu'):.2f}" for side in (stock, ours)),
                *(shown(dict(zip(("value", "low", "high"), found, strict=True))) for found in ratios),
                *(f"{median(side, 'megabytes'):.0f}" for side in (stock, ours)),
                f"{difference:.0e}",
            ]
        )
    print(f"\n{title}, n = {len(costs[77, 'ours'])} rounds\n", *markdown_table(heads, rows), sep="\n")


def print_growth(ours: Any, args: Arguments) -> None:
    """What very long prompts cost, and the exponents of their growth."""
    runs: Runs = {tokens: partial(encode, ours, text_of(tokens, SENTENCE)) for tokens in args.very_long}
    encode(ours, text_of(MAX_LENGTH))  # what libraries do on their first call
    costs, results = take_turns(runs, args.rounds)
    states = {tokens: results[tokens][0].shape[1] for tokens in runs}
    rows = []
    for tokens, length in states.items():
        cpu, megabytes = (median(costs[tokens], what) for what in ("cpu", "megabytes"))
        each = [f"{1e3 * cpu / length:.2f}", f"{megabytes:.0f}", f"{1e3 * megabytes / length:.0f}"]
        rows.append([f"{tokens}", f"{length}", f"{cpu:.2f}", *each])
    heads = ["tokens", "states", "CPU s", "ms a state", "MB", "KB a state"]
    print(f"\nencoding very long prompts, n = {args.rounds} rounds\n", *markdown_table(heads, rows), sep="\n")
    lengths = [math.log(length) for length in states.values()]
    exponents = [
        statistics.linear_regression(lengths, [math.log(median(costs[tokens], what)) for tokens in runs]).slope
        for what in ("cpu", "megabytes")
    ]
    print(f"\nover states, time grows with the power {exponents[0]:.2f}, memory with {exponents[1]:.2f}; 1 is linear")


def print_operations(args: Arguments) -> None:
    """What no load disturbs: the floating-point operations of the UNet, which are nearly all of a step."""
    counts = {}
    unet = empty("unet", args)
    for length in LENGTHS:
        states = torch.empty(2, length, unet.config.cross_attention_dim, device="meta")
        latents = torch.empty(2, 4, args.latent_size, args.latent_size, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(latents, torch.zeros(2, device="meta"), states)
        counts[length] = counter.get_total_flops()
    ratios = ", ".join(f"{count / counts[77]:.3f} at {length}" for length, count in counts.items())
    print(f"\noperations of a step, of those at 77 tokens: {ratios}")


def missed_bars(part: str, costs: dict[Any, list[Cost]]) -> list[str]:
    """A sentence for each bar that is missed by the median ratio of CPU seconds."""
    ratios = {length: ratio(costs[length, "ours"], costs[length, "stock"])[0] for length in LENGTHS}
    missed = [
        f"{part}: {value:.3f} times the stock pipeline's CPU seconds at {length}; the bar is {SAME_LENGTH_BAR:g}"
        for length, value in ratios.items()
        if value > SAME_LENGTH_BAR
    ]
    longer = ratio(costs[248, "ours"], costs[77, "ours"])[0]
    if part == "step" and longer > LONGER_BAR:
        missed.append(f"step: {longer:.3f} times the CPU seconds of 77 tokens at 248; the bar is {LONGER_BAR:g}")
    return missed


def gigabytes(pipe: Any) -> float:
    """Of all weights, shared ones counted once."""
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return sum(parameter.nbytes for parameter in nn.ModuleList(modules).parameters()) / 1e9


def main(args: Arguments) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    logging.getLogger("finelip_diffusion").setLevel(logging.ERROR)  # that nobody trained the weights is known
    missed: list[str] = []
    print(f"float32, one CPU thread, torch {torch.__version__}, ratios with 95% bootstrap intervals of their medians")

    def compare(part: str, title: str, runs: Runs, rounds: int) -> None:
        runs[77, "ours"]()  # what libraries do on their first call
        costs, results = take_turns(runs, rounds)
        print_table(title, costs, results)
        missed.extend(missed_bars(part, costs))

    if "step" in args.parts:
        size = args.latent_size
        pipes = stable_diffusion(args, unet=True)
        print(f"SD 1.5 without its decoder: stock {gigabytes(pipes[0]):.2f} GB, ours {gigabytes(pipes[2]):.2f} GB")
        compare("step", f"SD 1.5, one step of {size}x{size} latents, guided", steps_of(*pipes, args), args.rounds)
        print_operations(args)
        del pipes
    if "encoding" in args.parts or "very_long" in args.parts:
        pipes = stable_diffusion(args, unet=False)
        print(f"\nSD 1.5's text encoder: stock {gigabytes(pipes[0]):.2f} GB, ours {gigabytes(pipes[2]):.2f} GB")
        if "encoding" in args.parts:
            compare("encoding", "SD 1.5, encoding", encodings_of(*pipes), args.encodings)
        if "very_long" in args.parts:
            print_growth(pipes[2], args)
        del pipes
    if "encoding" in args.parts:
        pipes = stable_diffusion_xl(args)
        print(f"\nSDXL's text encoders: stock {gigabytes(pipes[0]):.2f} GB, ours {gigabytes(pipes[2]):.2f} GB")
        compare("encoding of SDXL", "SDXL, encoding", encodings_of(*pipes), args.encodings_xl)
    print(f"\nbars: {SAME_LENGTH_BAR:g} times the stock pipeline; a step at 248 tokens {LONGER_BAR:g} times one at 77")
    if args.check and missed:
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
