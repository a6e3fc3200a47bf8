"""What a run draws of held-out prompts while it trains, and what of them is found in the pictures."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import writing
from .scenes import Caption, describe, findings, read, sample_for, telling

Counts = list[list[int]]
"""For each prompt: facts found and facts stated before token 77, and the same after it."""


def prompts_of(file: Path | None, number: int, data: str) -> list[str]:
    """Held-out prompts: lines of a file, or captions of held-out scenes in the wording of the data.

    Args:
        file: UTF-8, a prompt a line; None is scenes.
        number: How many, at most.
        data: What is trained on; `scenes:WORDING` gives the wording, or several between commas, in turn.

    Raises:
        ValueError: If the file cannot be read or is empty.
    """
    if file is None:
        world, _, wording = data.partition(":")
        names = wording.split(",") if world == "scenes" and wording else ["sentences"]
        told = [(seed, names[seed % len(names)]) for seed in range(number)]
        return [describe(sample_for(name, seed, "test"), seed, **telling(name)) for seed, name in told]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--validation_prompts {file} cannot be read ({error}): give a text file.") from error
    if not any(lines):
        raise ValueError(f"--validation_prompts {file} is empty: write a prompt a line.")
    return [line.strip() for line in lines if line.strip()][:number]


@torch.no_grad()
def draw(
    pipe: Any, prompts: Sequence[str], side: int, steps: int, guidance_scale: float, seed: int, batch_size: int = 16
) -> Tensor:
    """Draws each prompt from the noise of a seed of its own; the autoencoder decodes in single precision.

    Args:
        pipe: diffusers' pipeline, its encoders and UNet on the device where it draws.
        prompts: Prompt i has the seed `seed + i`.
        side: Pixels.
        steps: Denoising steps.
        guidance_scale: Of guidance without a classifier.
        seed: Of the first.
        batch_size: Prompts drawn at once.

    Returns:
        (N, 3, H, W) in 0..1, on the CPU.
    """
    device, parts = pipe.unet.device, []
    place = pipe.vae.device
    pipe.vae.to(device).float()
    for first in range(0, len(prompts), batch_size):
        texts = [str(prompt) for prompt in prompts[first : first + batch_size]]
        generators = [torch.Generator().manual_seed(seed + first + number) for number in range(len(texts))]
        latents = pipe(texts, height=side, width=side, num_inference_steps=steps, guidance_scale=guidance_scale,
                       generator=generators, output_type="latent").images  # fmt: skip
        with torch.autocast(device.type, enabled=False):
            images = pipe.vae.decode(latents.float() / pipe.vae.config.scaling_factor).sample
        parts.append((images / 2 + 0.5).clamp(0, 1).cpu())
    pipe.vae.to(place)
    return torch.cat(parts)


def counts_of(prompts: Sequence[str], images: Iterable[Tensor], tokenizer: Any) -> Counts:
    """What of the facts of scenes images show; zeros for other prompts.

    Args:
        prompts: Captions of scenes, or others.
        images: (N, 3, H, W) in 0..1.
        tokenizer: Counts the tokens.
    """
    counts: Counts = []
    for prompt, image in zip(prompts, images, strict=True):
        row = [0, 0, 0, 0]
        if isinstance(prompt, Caption):
            shown = read((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
            for finding in findings(prompt, shown, tokenizer):
                row[2 * finding.after] += finding.found
                row[2 * finding.after + 1] += 1
        counts.append(row)
    return counts


def recall(counts: Counts) -> dict[str, float]:
    """Shares of the facts that were found, before and after token 77; nothing where none is stated."""
    found_before, before, found_after, after = np.array(counts).reshape(-1, 4).sum(0).tolist()
    figures = {"found_before_77": (found_before, before), "found_after_77": (found_after, after)}
    return {name: found / stated for name, (found, stated) in figures.items() if stated}


class Curve:
    """Figures over the updates of a run, a line of JSON each; a run that is resumed goes on from its checkpoint.

    Args:
        file: Of the lines.
        first: The update that the run goes on from; what came later is left out.
    """

    def __init__(self, file: Path, first: int):
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.points = [point for line in lines if (point := json.loads(line))["update"] <= first]

    def add(self, update: int, figures: dict[str, float], counts: Counts, milliseconds: float) -> None:
        """Takes the figures of an update and the time that updates took, in the place of older ones of it."""
        self.points = [point for point in self.points if point["update"] != update]
        self.points.append({"update": update, "figures": figures, "counts": counts, "milliseconds": milliseconds})
        with writing(self.file) as part:
            part.write_text("".join(json.dumps(point) + "\n" for point in self.points), encoding="utf-8")
