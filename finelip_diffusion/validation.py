"""What a run draws of held-out prompts while it trains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .scenes import Caption, describe, findings, read, sample_scene

DRAWN_AT_ONCE = 16


def prompts_of(file: Path | None, number: int, data: str) -> list[str]:
    """Held-out prompts: lines of a file, or captions of held-out scenes in the wording of the data.

    Args:
        file: UTF-8, a prompt a line; None is scenes.
        number: How many, at most.
        data: What is trained on.

    Raises:
        ValueError: If the file cannot be read or is empty.
    """
    if file is None:
        return [describe(sample_scene(seed, "test"), seed) for seed in range(number)]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--validation_prompts {file} cannot be read ({error}): give a text file.") from error
    if not any(lines):
        raise ValueError(f"--validation_prompts {file} is empty: write a prompt a line.")
    return [line.strip() for line in lines if line.strip()][:number]


@torch.no_grad()
def draw(pipe: Any, prompts: Sequence[str], side: int, steps: int, guidance_scale: float, seed: int) -> Tensor:
    """Draws each prompt from the noise of a seed of its own.

    Args:
        pipe: Diffusers' pipeline.
        prompts: Prompt i has the seed `seed + i`.
        side: Pixels.
        steps: Denoising steps.
        guidance_scale: Of guidance without a classifier.
        seed: Of the first.

    Returns:
        (N, 3, H, W) in 0..1.
    """
    parts = []
    for first in range(0, len(prompts), DRAWN_AT_ONCE):
        texts = [str(prompt) for prompt in prompts[first : first + DRAWN_AT_ONCE]]
        generators = [torch.Generator().manual_seed(seed + first + place) for place in range(len(texts))]
        drawn = pipe(texts, height=side, width=side, num_inference_steps=steps, guidance_scale=guidance_scale,
                     generator=generators, output_type="pt")  # fmt: skip
        parts.append(drawn.images.float().cpu())
    return torch.cat(parts)


def recall(prompts: Sequence[str], images: Tensor, tokenizer: Any) -> dict[str, float]:
    """Shares of the facts of scenes that images show, before and after token 77; nothing for other prompts.

    Args:
        prompts: Captions of scenes, or others.
        images: (N, 3, H, W) in 0..1.
        tokenizer: Counts the tokens.
    """
    found: dict[bool, list[bool]] = {False: [], True: []}
    for prompt, image in zip(prompts, images, strict=True):
        if isinstance(prompt, Caption):
            shown = read((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
            for finding in findings(prompt, shown, tokenizer):
                found[finding.after].append(finding.found)
    names = {False: "found_before_77", True: "found_after_77"}
    return {names[after]: float(np.mean(values)) for after, values in found.items() if values}
