"""What latents cost: what the autoencoder loses, what a UNet of the same training loses on top, and its time.

Each shape gets an autoencoder, half as wide as the bundled one, and a UNet by `train/train_scenes.py`, with the
bundled text encoder and as many updates as every other. Held-out scenes of one to three objects, whose captions the
stock encoder mostly reads whole, are drawn and compared: pictures after the autoencoder with the pictures (its cost),
drawn ones with those (the UNet's), and drawn ones with the pictures (both), as squared Frechet distances of
EfficientNet features. The updates are far fewer than the bundled model's, so the numbers compare shapes, and do not
say what a shape can reach.

    python benchmarks/latents.py --output_dir runs/latents        # an hour of one core; goes on where it was
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor
from transformers import HfArgumentParser

from finelip_diffusion.evaluation.features import extract, load_extractor
from finelip_diffusion.evaluation.intervals import bootstrap_interval, markdown_table, shown
from finelip_diffusion.files import writing
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.metrics import frechet_intervals
from finelip_diffusion.scenes import IMAGE_SIZE, describe, render, sample_scene
from finelip_diffusion.validation import counts_of, draw

TRAIN_SCENES = Path(__file__).parents[1] / "train" / "train_scenes.py"
LEVELS = {36: [16, 24, 32], 18: [16, 24, 32, 32], 9: [16, 24, 32, 32, 32]}  # half the bundled channels, by the side
DECODED_AT_ONCE = 32


@dataclass
class Arguments:
    """The defaults make the table in docs/scenes.md, in an hour of one core."""

    output_dir: Path = field(
        default=Path("runs/latents"), metadata={"help": "The folder where models and figures are written."}
    )
    shapes: list[str] = field(
        default_factory=lambda: ["9x4", "9x8", "9x16", "9x32"],
        metadata={"help": "The shapes of the latents, each as SIDExCHANNELS with a side of 9, 18 or 36."},
    )
    autoencoder_steps: int = field(default=400, metadata={"help": "The number of training steps of each autoencoder."})
    autoencoder_batch_size: int = field(
        default=8, metadata={"help": "The number of scenes per batch for an autoencoder."}
    )
    unet_steps: int = field(default=200, metadata={"help": "The number of training steps of each UNet."})
    unet_batch_size: int = field(default=32, metadata={"help": "The number of scenes per batch for a UNet."})
    num_captions: int = field(default=4096, metadata={"help": "The number of captions for training the UNets."})
    num_pictures: int = field(default=400, metadata={"help": "The number of held-out scenes to compare."})
    num_inference_steps: int = field(default=20, metadata={"help": "The number of denoising steps."})
    num_resamples: int = field(
        default=100, metadata={"help": "The number of bootstrap resamples for the intervals of the distances."}
    )
    seed: int = field(default=0, metadata={"help": "The random seed for training and for the noise of the pictures."})

    def __post_init__(self) -> None:
        for shape in self.shapes:
            side, _, channels = shape.partition("x")
            if not channels.isdigit() or not int(channels) or side not in map(str, LEVELS):
                raise SystemExit(
                    f"--shapes has {shape}: give SIDExCHANNELS, such as 9x16, with a side of "
                    f"{', '.join(map(str, sorted(LEVELS)))}."
                )


def train(args: Arguments, shape: str, stage: str, folder: Path) -> None:
    """One stage of the world's training."""
    side, channels = map(int, shape.split("x"))
    flags = {
        "output_dir": folder, "stage": stage, "seed": args.seed, "latent_channels": channels,
        "mixed_precision": "no", "num_captions": args.num_captions, "num_latents": args.num_captions,
        "autoencoder_steps": args.autoencoder_steps, "autoencoder_batch_size": args.autoencoder_batch_size,
        "unet_steps": args.unet_steps, "unet_batch_size": args.unet_batch_size,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in flags.items()]
    levels = ["--autoencoder_channels", *map(str, LEVELS[side])]
    subprocess.run([sys.executable, str(TRAIN_SCENES), *words, *levels], check=True)


def trained(args: Arguments, shape: str) -> Path:
    """The model of a shape; what has been trained stays."""
    captions, folder = args.output_dir / "captions", args.output_dir / shape
    if not captions.is_dir():
        train(args, shape, "captions", args.output_dir)
    model = folder / "model"
    if not model.is_dir():
        model.mkdir(parents=True)
        os.symlink(captions.resolve(), folder / "captions")
    if not (model / "vae").is_dir():
        train(args, shape, "autoencoder", folder)
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(BUNDLED_MODEL / name, model / name, dirs_exist_ok=True)
    if not (model / "unet").is_dir():
        train(args, shape, "unet", folder)
    return model


def pixels(images: Tensor) -> list[np.ndarray]:
    """(N, 3, H, W) in 0..1 -> pictures of bytes."""
    return list((images.permute(0, 2, 3, 1) * 255).round().byte().numpy())


@torch.no_grad()
def rebuilt(pipe: StableDiffusionPipeline, images: Tensor) -> Tensor:
    """Pictures after the autoencoder, (N, 3, H, W) in 0..1."""
    parts = [pipe.vae.decode(pipe.vae.encode(batch * 2 - 1).latent_dist.mean).sample
             for batch in images.split(DECODED_AT_ONCE)]  # fmt: skip
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def milliseconds(unets: list[UNet2DConditionModel], rounds: int = 9) -> list[float]:
    """Of each UNet, for one step of one picture with guidance; they take turns."""
    taken: list[list[float]] = [[] for _ in unets]
    for _ in range(rounds + 1):
        for unet, times in zip(unets, taken, strict=True):
            config = unet.config
            noisy = torch.zeros(2, config.in_channels, config.sample_size, config.sample_size)
            started = time.perf_counter()
            unet(noisy, 500, torch.zeros(2, 77, config.cross_attention_dim))
            times.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(times[1:]) for times in taken]


def measure(args: Arguments, shape: str) -> dict[str, object]:
    """Distances and recall of a shape."""
    pipe = StableDiffusionPipeline.from_pretrained(trained(args, shape), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    scenes = [sample_scene(seed, "test", (1, 3)) for seed in range(args.num_pictures)]
    prompts = [describe(scene, seed) for seed, scene in enumerate(scenes)]
    images = torch.stack([torch.from_numpy(np.array(render(scene))).permute(2, 0, 1) / 255 for scene in scenes])
    drawn = draw(pipe, prompts, IMAGE_SIZE, args.num_inference_steps, 3.0, args.seed)
    extractor, kinds = load_extractor("effnet_fd"), {"pictures": images, "rebuilt": rebuilt(pipe, images)}
    seen = {name: torch.cat(list(extract([Image.fromarray(each) for each in pixels(some)], extractor)))
            for name, some in (kinds | {"drawn": drawn}).items()}  # fmt: skip
    pairs = {"autoencoder": ("rebuilt", "pictures"), "unet": ("drawn", "rebuilt"), "both": ("drawn", "pictures")}
    distances = {
        name: frechet_intervals({name: seen[one]}, seen[other], num_resamples=args.num_resamples)[name]
        for name, (one, other) in pairs.items()
    }
    counts = torch.tensor(counts_of(prompts, drawn, pipe.tokenizer))[:, :2]
    rows = torch.arange(len(counts)).repeat_interleave(counts[:, 1])
    hits = torch.cat([torch.arange(stated) < found for found, stated in counts.tolist()])
    return distances | {
        "found": bootstrap_interval(hits.double(), rows),
        "decibels": -10 * torch.log10((kinds["rebuilt"] - images).square().mean()).item(),
    }


def main(args: Arguments) -> None:
    diffusers_logging.set_verbosity_error()
    file = args.output_dir / "report.json"
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "shapes")}
    report = json.loads(file.read_text()) if file.is_file() else {"settings": settings}
    if report["settings"] != settings:
        raise SystemExit(
            f"{file} was made with {report['settings']}: give the same settings, or another --output_dir."
        )
    for shape in args.shapes:
        if shape not in report:
            report[shape] = measure(args, shape)
            with writing(file) as part:
                part.write_text(json.dumps(report, indent=1))
    unets = [UNet2DConditionModel.from_pretrained(trained(args, shape) / "unet") for shape in args.shapes]
    times = milliseconds(unets)
    heads = ["latents", "numbers", "autoencoder", "UNet", "both", "objects found", "PSNR, dB", "UNet, ms a step"]
    rows = []
    for shape, taken in zip(args.shapes, times, strict=True):
        side, channels = map(int, shape.split("x"))
        found = report[shape]
        rows.append([
            f"{side}x{side}x{channels}", f"{side * side * channels:,}",
            *(shown(found[name], 1) for name in ("autoencoder", "unet", "both")), shown(found["found"]),
            f"{found['decibels']:.1f}", f"{taken:.1f}",
        ])  # fmt: skip
    print("\n".join(markdown_table(heads, rows)))


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
