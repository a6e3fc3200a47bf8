"""Measures what the pipeline itself costs: a run of ours (`truncate`) against diffusers', at equal token count.

Both pipelines hold the very same UNet, decoder and scheduler and draw the same images in turns, ours first in every
other pair; random weights cost what trained ones do.

    python benchmarks/pipeline_overhead.py --pairs 40 --steps 10

With `--mixed`, what it costs that the batch decides nothing: a call with prompts of several lengths, drawn in groups
of one length, against the same prompts in one batch, all brought to the longest.

    python benchmarks/pipeline_overhead.py --mixed 20 20 20 20 20 20 100 300 --pairs 10
"""

import argparse
import random
import statistics
import time
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from finelip_diffusion import FineLIPStableDiffusionPipeline
from finelip_diffusion.tokenizer import VOCAB_SIZE, clip_tokenizer


def build_pipelines(width: int = 128) -> tuple[StableDiffusionPipeline, FineLIPStableDiffusionPipeline]:
    """A pipeline of the bundled model's size, and ours over the same parts."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=VOCAB_SIZE - 2,
        eos_token_id=VOCAB_SIZE - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(96, 192),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    stock = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=clip_tokenizer(77),
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    ours = FineLIPStableDiffusionPipeline(**stock.components, requires_safety_checker=False, long_prompt="truncate")
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
    return stock, ours


def seconds(pipe: StableDiffusionPipeline, prompt: str, steps: int) -> float:
    """CPU seconds of one image; the process's own, so that other load on the machine does not count."""
    generator = torch.Generator().manual_seed(0)
    start = time.process_time()
    pipe(prompt, num_inference_steps=steps, generator=generator, output_type="np")
    return time.process_time() - start


def grouped_and_whole(pipe: FineLIPStableDiffusionPipeline, lengths: list[int], steps: int) -> tuple[float, float]:
    """CPU seconds of prompts of some lengths: drawn in groups, and in one batch of the longest."""
    prompts = [" ".join(["cat"] * length) for length in lengths]
    took = []
    for how in ("groups", "whole"):
        generator = torch.Generator().manual_seed(0)
        start = time.process_time()
        given: dict[str, Any] = {"prompt": prompts, "long_prompt": "chunk"}
        if how == "whole":
            given = dict(pipe.encode(prompts, long_prompt="chunk"))
        pipe(**given, num_inference_steps=steps, generator=generator, output_type="np")
        took.append(time.process_time() - start)
    return took[0], took[1]


def interval(ratios: list[float]) -> str:
    """A median with its interval."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return (
        f"median ratio {statistics.median(ratios):.4f} "
        f"(95% bootstrap interval {medians[49]:.4f} to {medians[1949]:.4f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pairs", type=int, default=40, help="The number of runs of each pipeline. The default is 40."
    )
    parser.add_argument(
        "--steps", type=int, default=10, help="The number of denoising steps per run. The default is 10."
    )
    parser.add_argument(
        "--tokens", type=int, default=70, help="The number of tokens in the prompt, at most 75. The default is 70."
    )
    parser.add_argument(
        "--mixed", type=int, nargs="+", metavar="TOKENS", help="The lengths in tokens of the prompts of one call."
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    stock, ours = build_pipelines()
    if args.mixed:
        grouped_and_whole(ours, args.mixed, 1)  # warm-up
        runs = [grouped_and_whole(ours, args.mixed, args.steps) for _ in range(args.pairs)]
        ratios = [groups / whole for groups, whole in runs]
        print(
            f"{args.mixed} tokens, {args.steps} steps, n = {args.pairs} pairs, CPU seconds: "
            f"in groups {statistics.median(groups for groups, _ in runs):.3f} s, "
            f"in one batch {statistics.median(whole for _, whole in runs):.3f} s, {interval(ratios)}"
        )
        return
    prompt = " ".join(["cat"] * args.tokens)
    for pipe in (stock, ours):
        seconds(pipe, prompt, args.steps)  # warm-up
    pairs = []
    for number in range(args.pairs):
        order = [stock, ours] if number % 2 else [ours, stock]
        took = {id(pipe): seconds(pipe, prompt, args.steps) for pipe in order}
        pairs.append((took[id(stock)], took[id(ours)]))
    ratios = [ours_took / stock_took for stock_took, ours_took in pairs]
    print(
        f"{args.tokens} tokens, {args.steps} steps, n = {args.pairs} pairs, CPU seconds: "
        f"stock {statistics.median(stock_took for stock_took, _ in pairs):.3f} s, "
        f"ours {statistics.median(ours_took for _, ours_took in pairs):.3f} s, "
        f"{interval(ratios)}; target at most 1.02"
    )


if __name__ == "__main__":
    main()
