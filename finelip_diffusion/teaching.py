"""What a frozen UNet does with prompts that it is taught by: its own sampling trajectories from noise, kept on disk.

Prompts need no images then (arXiv 2503.19897 distills text encoders so): where the teacher goes from noise, and what
it predicts there under a strategy that reads the whole prompt, is what the long encoder is held to.
"""

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils.data import Dataset

from .data.datasets import stable_hash
from .files import writing

ARRAYS = ("noisy", "predictions", "timesteps")


class Prompts:
    """The prompts of a text file, one a line; a collection of captions without images.

    Raises:
        ValueError: If the file cannot be read or is empty. One sentence.
    """

    def __init__(self, file: Path):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read ({error}): give a text file of prompts.") from error
        self.file, self.lines = file, [line.strip() for line in lines if line.strip()]
        if not self.lines:
            raise ValueError(f"{file} is empty: write a prompt a line.")

    def __len__(self) -> int:
        return len(self.lines)

    def caption(self, index: int, draw: int) -> str:
        """A prompt; nothing is drawn."""
        return self.lines[index]

    def name(self, index: int) -> str:
        """Where it stands."""
        return f"{self.file}:{index}"


@dataclass(frozen=True)
class Trajectories:
    """Points of sampling trajectories.

    Attributes:
        prompts: What each trajectory was drawn for.
        noisy: (N, K, C, h, w), float16: what the UNet is given at K of the teacher's steps.
        predictions: (N, K, C, h, w), float16: what it predicts there for the prompt, without guidance.
        timesteps: (N, K), float32.
    """

    prompts: list[str]
    noisy: np.ndarray
    predictions: np.ndarray
    timesteps: np.ndarray


def open_trajectories(folder: Path) -> Trajectories:
    """Reads a cache that `write_trajectories` wrote."""
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    return Trajectories(prompts, *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS))


@torch.no_grad()
def write_trajectories(
    folder: Path,
    teacher: Any,
    prompts: Sequence[str],
    *,
    side: int,
    steps: int,
    points: int,
    guidance_scale: float,
    seed: int,
    batch_size: int = 16,
    progress: Callable[[Iterable[list[int]]], Any] = iter,
) -> Trajectories:
    """Samples each prompt from noise of its own with the teacher's scheduler, and keeps some points of the way.

    Args:
        folder: Of the cache.
        teacher: One of this package's pipelines, whose `long_prompt` and `blend` say how prompts are read.
        prompts: Texts of any length.
        side: Pixels of the images that would be drawn.
        steps: Denoising steps.
        points: How many steps of each trajectory are kept, drawn at random.
        guidance_scale: Of the way; what is kept are predictions without guidance.
        seed: Of the noise and of the points; prompt i draws by `seed` and i.
        batch_size: Prompts sampled at once, all of one length.
        progress: Wraps the batches, to show how far it is.

    Raises:
        ValueError: If a prediction is not finite, or the disk is full.
    """
    unet, device = teacher.unet, teacher.unet.device
    latent = side // teacher.vae_scale_factor
    shape = (unet.config.in_channels, latent, latent)
    scheduler = copy.deepcopy(teacher.scheduler)
    scheduler.set_timesteps(steps, device=device)
    moments = [float(step) for step in scheduler.timesteps]
    points = min(points, len(moments))
    sizes = [max(reading.length for reading in teacher.describe_prompt(prompt).readings) for prompt in prompts]
    batches = [rows[first : first + batch_size]
               for size in sorted(set(sizes))
               for rows in [[row for row, own in enumerate(sizes) if own == size]]
               for first in range(0, len(rows), batch_size)]  # fmt: skip
    found = {"noisy": np.zeros((len(prompts), points, *shape), np.float16),
             "predictions": np.zeros((len(prompts), points, *shape), np.float16),
             "timesteps": np.zeros((len(prompts), points), np.float32)}  # fmt: skip
    for rows in progress(batches):
        embeds = teacher.encode([prompts[row] for row in rows])
        states = torch.cat([embeds.negative_prompt_embeds, embeds.prompt_embeds]).to(unet.dtype)
        added = None
        if embeds.pooled_prompt_embeds is not None:
            pooled = torch.cat([embeds.negative_pooled_prompt_embeds, embeds.pooled_prompt_embeds]).to(unet.dtype)
            added = {"text_embeds": pooled, "time_ids": square_time_ids(side, device).repeat(len(pooled), 1)}
        generators = [torch.Generator().manual_seed(stable_hash("trajectory", seed, row)) for row in rows]
        latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
        latents = latents * scheduler.init_noise_sigma
        kept = [torch.randperm(len(moments), generator=generator)[:points].tolist() for generator in generators]
        scheduler = copy.deepcopy(teacher.scheduler)
        scheduler.set_timesteps(steps, device=device)
        for place, step in enumerate(scheduler.timesteps):
            noisy = scheduler.scale_model_input(latents, step)
            both = unet(torch.cat([noisy, noisy]).to(unet.dtype), step, states, added_cond_kwargs=added,
                        return_dict=False)[0].float()  # fmt: skip
            without, prediction = both.chunk(2)
            for number, row in enumerate(rows):
                if place in kept[number]:
                    point = kept[number].index(place)
                    found["noisy"][row, point] = noisy[number].half().cpu()
                    found["predictions"][row, point] = prediction[number].half().cpu()
                    found["timesteps"][row, point] = float(step)
            guided = without + guidance_scale * (prediction - without)
            latents = scheduler.step(guided, step, latents, return_dict=False)[0]
    if not np.isfinite(found["predictions"]).all():
        raise ValueError("the teacher's predictions are not finite in half precision: try --mixed_precision no.")
    with writing(folder) as part:
        part.mkdir()
        for name in ARRAYS:
            np.save(part / f"{name}.npy", found[name])
        (part / "prompts.json").write_text(json.dumps(list(prompts)), encoding="utf-8")
    return open_trajectories(folder)


def square_time_ids(side: int, device: torch.device | str = "cpu") -> Tensor:
    """What SDXL is told of a square image that is not cut, (1, 6)."""
    return torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32, device=device)


def make_teacher(pipeline: DiffusionPipeline, kind: Any, stock: dict[str, Any], **settings: Any) -> Any:
    """A pipeline of this package that reads prompts by a strategy, of the parts of diffusers' own.

    Args:
        pipeline: diffusers' own, with long encoders.
        kind: The pipeline class of this package.
        stock: The stock encoders and tokenizers beside them, by name.
        **settings: `long_prompt`, `blend`.
    """
    parts = {name: part for name, part in pipeline.components.items() if not name.startswith("stock_")}
    extra = {} if hasattr(pipeline, "text_encoder_2") else {"requires_safety_checker": False}
    teacher = kind(**parts, **stock, **settings, **extra)
    teacher.set_progress_bar_config(disable=True)
    return teacher


class TrajectoryDataset(Dataset[dict[str, Any]]):
    """Points of trajectories with their prompts, by (number, draw).

    Args:
        trajectories: Of the teacher.
        kept: Has the captions for the terms that keep, taken around where it is the smaller; None is the prompts.
        side: Pixels of the images.
    """

    def __init__(self, trajectories: Trajectories, kept: Any, side: int):
        self.trajectories, self.kept, self.side = trajectories, kept, side

    def __len__(self) -> int:
        return self.trajectories.timesteps.size

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        number, draw = place
        row, point = divmod(number, self.trajectories.timesteps.shape[1])
        prompt = self.trajectories.prompts[row]
        kept = prompt if self.kept is None or not prompt else self.kept.caption(row % len(self.kept), draw)
        arrays = {name: torch.from_numpy(np.array(getattr(self.trajectories, name)[row, point], np.float32))
                  for name in ARRAYS}  # fmt: skip
        return arrays | {"time_ids": square_time_ids(self.side)[0], "caption": prompt, "kept": kept, "draw": draw}
