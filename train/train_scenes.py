"""Builds the bundled model from nothing: a small Stable Diffusion, and a long text encoder that draws with it.

    python train/train_scenes.py --output_dir runs/scenes                       # every stage, on a GPU
    python train/train_scenes.py --output_dir runs/scenes --stage unet          # one; it resumes where it stopped
    python train/train_scenes.py --preset two_cores --output_dir runs/scenes    # smaller batches and fewer steps

The stages follow the making of Stable Diffusion, then of FineLIP, then tune the encoder through the UNet:

1. `captions`: scenes in everyone's words, as tokens, by as many processes as there are cores.
2. `autoencoder`: 144 x 144 pixels to 9 x 9 latents of 16 channels, and back.
3. `decoder`: the autoencoder's decoder alone, for sharper pictures of the same latents.
4. `clip`: a 77-token CLIP by InfoNCE. A batch holds groups of near-duplicates (same objects elsewhere; same places,
   other attributes), without which text states forget places, and no UNet can put anything where the text says.
5. `unet`: v-prediction on the latents, captions cut at 77 tokens.
6. `long_clip`: positions stretched to 248, whole captions, the recipe `finelip_sparc`, by `finetune_encoder.py`.
7. `tune`: the long encoder through the frozen UNet, by `finetune_text_to_image.py`.
8. `reword`: the same script again, its preset `reword`: captions in any words are held to the pictures that the
   encoder makes of plain sentences, and a little to the images themselves.
9. `bundle`: a copy of the folder in half precision, `OUTPUT_DIR/bundled`.

And one that `all` leaves out:

10. `restyle`: the UNet goes on in another style, with every color exchanged for another one, `OUTPUT_DIR/restyled`: as
    a user's own checkpoint, to see whether an encoder that was tuned through the first UNet serves it, too.

A batch is a function of the seed and the step alone, so a stage that is stopped and started again sees what it would
have seen. Each stage leaves a log for tensorboard, a picture, and its part of the pipeline folder `OUTPUT_DIR/model`.
"""

import copy
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import EMAModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm, trange
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from finelip_diffusion.denoising import denoising_target, sample_timesteps
from finelip_diffusion.files import writing
from finelip_diffusion.losses.primitives import infonce_loss
from finelip_diffusion.resuming import find_checkpoint, save_checkpoint, step_of
from finelip_diffusion.runs import run_script
from finelip_diffusion.scenes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    PALETTE,
    SHAPES,
    SIZES,
    Scene,
    cell_pictures,
    describe,
    sample_scene,
    telling,
    vary,
)
from finelip_diffusion.text_encoder import MAX_LENGTH, save_text_encoder
from finelip_diffusion.tokenizer import VOCAB_SIZE, clip_tokenizer

STOCK_LENGTH = 77
LONG_CLIP_RECIPE = "finelip_sparc"
WORDING = "all"  # of captions, see `telling`
GROUP = 8  # a scene, its objects elsewhere (four times), its attributes dealt out anew (three times)
SHARD = 8192  # captions of a file
STRAY_TOKENS = 0.3  # share of captions into which a few of the vocabulary's tokens stray
FEW, MANY = (1, 3), (4, 9)  # numbers of objects
SHARE_OF_FEW = 0.3
PRESETS = Path(__file__).parent / "worlds"

Stage = Literal[
    "all", "captions", "autoencoder", "decoder", "clip", "unet", "long_clip", "tune", "reword", "bundle", "restyle"
]  # fmt: skip
NEEDS = {  # what earlier stages must have left in the output folder
    "decoder": ("model/vae",),
    "clip": ("captions",),
    "unet": ("captions", "model/vae", "model/text_encoder"),
    "long_clip": ("clip_model",),
    "tune": ("model/vae", "model/unet", "long_clip/text_encoder"),
    "reword": ("model/vae", "model/unet", "tune/text_encoder"),
    "bundle": ("clip_model", "model/unet", "reword/text_encoder"),
    "restyle": ("captions",),
}


@dataclass
class Arguments:
    """The defaults make the bundled model."""

    output_dir: Path = field(
        default=Path("runs/scenes"), metadata={"help": "The folder where the stages and the model are written."}
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "The name of a preset in train/worlds, or the path of a YAML file, with defaults for the "
            "other flags."
        },
    )
    stage: Stage = field(default="all", metadata={"help": "The stage to run, or all to run every stage in order."})
    seed: int = field(default=0, metadata={"help": "The random seed for weights, scenes, captions and noise."})
    num_captions: int = field(
        default=1_000_000,
        metadata={"help": "The number of captions, which are written once, in groups of near-duplicates."},
    )
    num_latents: int = field(
        default=160_000, metadata={"help": "The number of captions whose images the UNet is trained on."}
    )
    latent_channels: int = field(default=16, metadata={"help": "The number of channels of the latents."})
    autoencoder_channels: list[int] = field(
        default_factory=lambda: [32, 48, 64, 64, 64],
        metadata={
            "help": "The numbers of channels of the autoencoder's levels. Each level after the first halves the sides."
        },
    )
    autoencoder_steps: int = field(default=4000, metadata={"help": "The number of training steps of the autoencoder."})
    autoencoder_batch_size: int = field(
        default=64, metadata={"help": "The number of scenes per batch for the autoencoder."}
    )
    decoder_steps: int = field(
        default=400, metadata={"help": "The number of additional training steps of the decoder, on 8 scenes each."}
    )
    image_steps: int = field(default=300, metadata={"help": "The number of training steps of the image tower."})
    clip_steps: int = field(default=2500, metadata={"help": "The number of training steps of the text tower."})
    clip_groups: int = field(
        default=96, metadata={"help": "The number of groups of eight scenes per batch for either tower."}
    )
    unet_steps: int = field(default=4000, metadata={"help": "The number of training steps of the UNet."})
    unet_batch_size: int = field(default=384, metadata={"help": "The number of scenes per batch for the UNet."})
    long_clip_steps: int = field(
        default=800,
        metadata={"help": "The number of updates of the long CLIP, on 12 groups of eight whole captions each."},
    )
    tune_steps: int = field(
        default=1700, metadata={"help": "The number of updates through the frozen UNet in the stage tune."}
    )
    tune_batch_size: int = field(default=192, metadata={"help": "The number of scenes per batch in the stage tune."})
    tune_scenes: int = field(default=24_000, metadata={"help": "The number of scenes in the stage tune."})
    reword_steps: int = field(
        default=2000, metadata={"help": "The number of updates on other wordings in the stage reword."}
    )
    reword_batch_size: int = field(
        default=32, metadata={"help": "The number of scenes per batch in the stage reword."}
    )
    reword_scenes: int = field(default=12_000, metadata={"help": "The number of scenes in the stage reword."})
    restyle_model: Path | None = field(
        default=None,
        metadata={"help": "The model whose UNet the stage restyle continues with. The default is OUTPUT_DIR/model."},
    )
    restyle_steps: int = field(
        default=600, metadata={"help": "The number of additional training steps of the UNet in the stage restyle."}
    )
    checkpointing_steps: int = field(default=500, metadata={"help": "The number of steps between checkpoints."})
    mixed_precision: str = field(default="bf16", metadata={"help": "The precision of autocast: no or bf16."})
    num_workers: int | None = field(
        default=None,
        metadata={
            "help": "The number of processes that write captions and, on a GPU, load data. The default is one "
            "per CPU core."
        },
    )


# ------------------------------------------------------------------------------------------------------ the one loop


def fit(
    stage: str,
    model: nn.Module,
    loss_at: Callable[[int], dict[str, Tensor]],
    steps: int,
    learning_rate: float,
    args: Arguments,
    ema_decay: float = 0.999,
) -> None:
    """Trains a model in place, and leaves it with its averaged weights.

    Stopped and started again with the same folder, it goes on from its last checkpoint.

    Args:
        stage: names the folder of checkpoints and logs.
        model: what is trained (parameters that require gradients); it moves to the accelerator's device.
        loss_at: the loss terms of a step by name; their sum is minimized.
        steps: the last step; the rate warms up over 100 steps and falls to zero over the last two fifths.
        learning_rate: of AdamW.
        args: the script's.
        ema_decay: of the average of the weights.
    """
    folder = args.output_dir / stage
    folder.mkdir(exist_ok=True)
    accelerator = accelerator_of(args, log_with="tensorboard", project_dir=args.output_dir / "logs")
    accelerator.init_trackers(stage)
    model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # the faster one for convolutions
    torch.backends.cudnn.benchmark = True
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    _, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    accelerator.register_for_checkpointing(ema)
    first = 0
    if latest := find_checkpoint(folder, "latest"):
        accelerator.load_state(str(latest))
        ema.to(accelerator.device)
        first = step_of(latest)
    for step in (bar := trange(first, steps, initial=first, total=steps, desc=stage, mininterval=5)):
        rate = learning_rate * min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with accelerator.autocast():
            terms = loss_at(step)
            loss = torch.stack(list(terms.values())).sum()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        if step % 25 == 0:
            values = {name: value.item() for name, value in terms.items()}
            if not math.isfinite(sum(values.values())):
                raise ValueError(f"the loss of {stage} is not finite at step {step}: {values}.")
            bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()}, refresh=False)
            accelerator.log(values | {"learning_rate": rate}, step=step)
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == steps:
            save_checkpoint(accelerator, folder, step + 1, limit=1)
    ema.copy_to(parameters)
    accelerator.end_training()
    accelerator.free_memory()


def accelerator_of(args: Arguments, **options: object) -> Accelerator:
    """Where and how precisely things are computed."""
    precision = args.mixed_precision
    return Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=precision, **options)


def draws(args: Arguments, stage: str, step: int) -> torch.Generator:
    """The random numbers of a step, on the CPU: the same on every device."""
    return torch.Generator().manual_seed(random.Random(f"{stage} {args.seed} {step}").getrandbits(63))


# ------------------------------------------------------------------------------------------------------------ captions


def group_of(seed: int) -> list[Scene]:
    """A scene and its near-duplicates."""
    few = random.Random(f"few {seed}").random() < SHARE_OF_FEW
    scene = sample_scene(seed, num_objects=FEW if few else MANY)
    other = "exchange" if len(scene.objects) > 1 else "alter"
    kinds = ("move",) * (GROUP // 2) + (other,) * (GROUP // 2 - 1)
    return [scene, *(vary(scene, kind, GROUP * seed + turn) for turn, kind in enumerate(kinds))]


def cell_numbers(scenes: Iterable[Scene]) -> Tensor:
    """Scenes as numbers, (B, 10): of each cell, its place in `cell_pictures`; of the background, its own."""
    kinds = {name: number for number, name in enumerate(cell_pictures(next(iter(BACKGROUNDS)))[0])}
    rows = []
    for scene in scenes:
        row = [0] * 9 + [list(BACKGROUNDS).index(scene.background)]
        for item in scene.objects:
            row[item.cell] = kinds[item.shape, item.colour, item.size]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.uint8)


def with_stray_tokens(ids: list[int], rng: random.Random) -> list[int]:
    """Some tokens of the vocabulary, any, put between those of a caption."""
    if rng.random() < STRAY_TOKENS:
        for _ in range(rng.randint(1, 6)):
            place = rng.randint(1, len(ids) - 1)
            ids = [*ids[:place], rng.randrange(VOCAB_SIZE - 2), *ids[place:]]
    return ids


def write_shard(args: Arguments, number: int) -> None:
    """One file of captions: `scenes` (N, 10) as `cell_numbers`, `input_ids` (N, 248), padded, uncut before that."""
    file = args.output_dir / "captions" / f"{number:05d}.safetensors"
    if file.exists():
        return
    torch.set_num_threads(1)
    tokenizer = clip_tokenizer(MAX_LENGTH)
    first = (args.seed * 10_000_000 + number * SHARD) // GROUP
    count = min(SHARD, args.num_captions - number * SHARD) // GROUP
    scenes = [scene for seed in range(first, first + count) for scene in group_of(seed)]
    captions = [str(describe(scene, first + turn, **telling(WORDING))) for turn, scene in enumerate(scenes)]
    rng = random.Random(f"stray {first}")
    table = torch.full((len(scenes), MAX_LENGTH), tokenizer.pad_token_id, dtype=torch.int32)
    for row, ids in zip(table, tokenizer(captions).input_ids, strict=True):
        ids = with_stray_tokens(ids, rng)[:MAX_LENGTH]
        ids[-1] = tokenizer.eos_token_id
        row[: len(ids)] = torch.tensor(ids)
    with writing(file) as part:
        save_file({"scenes": cell_numbers(scenes), "input_ids": table}, part)


def write_captions(args: Arguments) -> None:
    """Stage 1."""
    (args.output_dir / "captions").mkdir(exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shards = range(-(-args.num_captions // SHARD))
    with ProcessPoolExecutor(args.num_workers or os.cpu_count()) as processes:
        list(
            tqdm(processes.map(partial(write_shard, args), shards), total=len(shards), desc="captions", mininterval=5)
        )


def read_captions(args: Arguments, device: torch.device) -> tuple[Tensor, Tensor]:
    """All scenes, (N, 10), and their captions' tokens, (N, 248)."""
    shards = [load_file(file) for file in sorted((args.output_dir / "captions").glob("*.safetensors"))]
    scenes, input_ids = (torch.cat([shard[name] for shard in shards]) for name in ("scenes", "input_ids"))
    if len(scenes) < args.num_captions // GROUP * GROUP:
        raise ValueError(
            f"{args.output_dir / 'captions'} has {len(scenes)} captions of {args.num_captions}: run --stage captions."
        )
    return scenes.to(device), input_ids.to(device)


# ------------------------------------------------------------------------------------------------------------ pictures


def restyled(scenes: Tensor) -> Tensor:
    """The cell numbers of the same scenes in the colors of `PALETTE`."""
    kinds, _ = cell_pictures(next(iter(BACKGROUNDS)))
    painted = [0] + [kinds.index((shape, PALETTE[colour], size)) for shape, colour, size in filter(None, kinds)]
    grounds = [list(BACKGROUNDS).index(PALETTE[name]) for name in BACKGROUNDS]
    tables = [torch.tensor(numbers, dtype=scenes.dtype, device=scenes.device) for numbers in (painted, grounds)]
    return torch.cat([tables[0][scenes[:, :9].long()], tables[1][scenes[:, 9:].long()]], 1)


class Painter:
    """Paints scenes on a device, the very pixels of `scenes.render`."""

    def __init__(self, device: torch.device) -> None:
        tables = [torch.from_numpy(cell_pictures(name)[1]) for name in BACKGROUNDS]
        self.cells = torch.stack(tables).mul(255).add(0.5).byte().to(device)  # (backgrounds, kinds, H, W, 3)

    def __call__(self, scenes: Tensor) -> Tensor:
        """(B, 10) -> (B, 3, H, W) in -1..1."""
        cells = self.cells[scenes[:, 9:].long(), scenes[:, :9].long()]  # (B, 9, h, w, 3)
        rows = cells.unflatten(1, (3, 3)).permute(0, 5, 1, 3, 2, 4)  # (B, 3, 3, h, 3, w)
        return rows.reshape(len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE).float() / 127.5 - 1


def cut(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """Cuts captions at 77 tokens, as the stock tokenizer does."""
    input_ids = input_ids[:, :STOCK_LENGTH].long()
    input_ids[:, -1] = eos_token_id  # the end of what is cut; the others are padded with it
    return input_ids


# -------------------------------------------------------------------------------------------------------------- stages


def train_autoencoder(args: Arguments) -> None:
    """Stage 2. Squared and absolute errors, and a weak pull of the latents to a standard normal."""
    channels = args.autoencoder_channels
    vae = AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=args.latent_channels,
        layers_per_block=1,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
    )
    for block in vae.modules():  # the network starts out linear, and almost finds the few dimensions of a cell so
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)
    device = accelerator_of(args).device
    paint = Painter(device)
    known = cell_numbers(sample_scene(seed, num_objects=(1, 9)) for seed in range(min(args.num_latents, 40_000)))
    known = known.to(device)

    def loss_at(step: int) -> dict[str, Tensor]:
        generator = draws(args, "autoencoder", step)
        images = paint(known[torch.randint(len(known), (args.autoencoder_batch_size,), generator=generator)])
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample.float() - images
        return {
            "squared": error.square().mean(),
            "absolute": 0.05 * error.abs().mean(),
            "kl": 1e-4 * posterior.kl().mean() / posterior.mean[0].numel(),
        }

    fit("autoencoder", vae, loss_at, args.autoencoder_steps, 2e-3, args)
    with torch.no_grad():
        images = paint(cell_numbers(sample_scene(seed, "test") for seed in range(64)).to(device))
        latents = vae.encode(images).latent_dist.mean
        vae.register_to_config(scaling_factor=float(1 / latents.std()))
        rebuilt = vae.decode(latents).sample
    (args.output_dir / "autoencoder.txt").write_text(f"mean squared error {F.mse_loss(rebuilt, images):.6f}\n")
    save_picture(torch.cat([images[:8], rebuilt[:8]]), 8, args.output_dir / "autoencoder.png")
    for stale in args.output_dir.glob("latents-*.safetensors"):  # of the autoencoder as it was
        stale.unlink()
    vae.save_pretrained(args.output_dir / "model" / "vae")


def differences(images: Tensor) -> tuple[Tensor, Tensor]:
    """Of pixels from those above and from those to the left, (B, C, H - 1, W) and (B, C, H, W - 1)."""
    return images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]


def train_decoder(args: Arguments) -> None:
    """Stage 3. Absolute errors of pixels and of their differences, which leave flat areas flat and edges sharp.

    Squared errors leave ripples that the eye hardly sees, and features for Frechet distances do.
    """
    folder = args.output_dir / "model" / "vae"
    vae = AutoencoderKL.from_pretrained(folder)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    device = accelerator_of(args).device
    paint, number = Painter(device), min(8, args.autoencoder_batch_size)

    def loss_at(step: int) -> dict[str, Tensor]:
        first = 10_000_000 * (args.seed + 1) + number * step
        scenes = [sample_scene(seed, num_objects=(1, 9)) for seed in range(first, first + number)]
        images = paint(cell_numbers(scenes).to(device))
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
        rebuilt = vae.decode(latents).sample.float()
        pairs = zip(differences(rebuilt), differences(images), strict=True)
        return {
            "absolute": F.l1_loss(rebuilt, images),
            "edges": 0.5 * torch.stack([F.l1_loss(*pair) for pair in pairs]).sum(),
        }

    fit("decoder", vae, loss_at, args.decoder_steps, 3e-4, args)
    vae.to("cpu").save_pretrained(folder)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of two narrow towers, its weights drawn so that words and positions are not drowned by the layers."""
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 256}
    text = tower | {
        "num_hidden_layers": 8,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": STOCK_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": 16}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=256))
    for layer in clip.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    for block in clip.text_model.encoder.layers:  # the more layers, the less each adds at first
        for layer in (block.self_attn.out_proj, block.mlp.fc2):
            layer.weight.data.mul_(0.5)
    nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=0.3)
    nn.init.normal_(clip.text_model.embeddings.position_embedding.weight, std=0.2)
    nn.init.normal_(clip.vision_model.embeddings.patch_embedding.weight, std=0.1)
    nn.init.normal_(clip.vision_model.embeddings.position_embedding.weight, std=1.0)
    return clip


def facts(scenes: Tensor) -> Tensor:
    """Which cell holds which shape, color and size, and the background, as zeros and ones, (B, 10) -> (B, F)."""
    values = [*SHAPES, *COLOURS, *SIZES]
    kinds = torch.zeros(len(cell_pictures(next(iter(BACKGROUNDS)))[0]), len(values), device=scenes.device)
    for row, name in zip(kinds, cell_pictures(next(iter(BACKGROUNDS)))[0], strict=True):
        row[[values.index(value) for value in name or ()]] = 1
    backgrounds = F.one_hot(scenes[:, 9].long(), len(BACKGROUNDS)).float()
    return torch.cat([kinds[scenes[:, :9].long()].flatten(1), backgrounds], 1)


def infonce(one: Tensor, other: Tensor, logit_scale: Tensor) -> Tensor:
    """InfoNCE of matching rows, (B, D) each."""
    similarities = F.normalize(one.float(), dim=-1) @ F.normalize(other.float(), dim=-1).T
    return infonce_loss(logit_scale.exp().clamp(max=100) * similarities)


def train_clip(args: Arguments) -> None:
    """Stage 4, as locked-image tuning does it: the image tower learns to tell scenes apart by their facts, then it is
    locked, and the text tower learns to match it. Two fresh towers stay for long at telling backgrounds apart.

    Captions are cut at 77 tokens; scenes grow from few objects to many.
    """
    device = accelerator_of(args).device
    tokenizer = clip_tokenizer(STOCK_LENGTH)
    clip = build_clip(tokenizer).to(device)
    if device.type == "cpu":  # the faster one there
        clip.set_attn_implementation("eager")
    paint = Painter(device)
    scenes, input_ids = read_captions(args, device)
    objects = (scenes[::GROUP, :9] > 0).sum(1)  # of each group
    small = (objects <= FEW[1]).nonzero()[:, 0].cpu()
    table = nn.Linear(facts(scenes[:1]).shape[1], clip.config.projection_dim, device=device)

    def rows(stage: str, step: int, few: bool) -> Tensor:
        generator = draws(args, stage, step)
        groups = small if few and len(small) else torch.arange(len(objects))
        chosen = groups[torch.randint(len(groups), (args.clip_groups,), generator=generator)]
        return (GROUP * chosen[:, None] + torch.arange(GROUP)).flatten().to(device)

    def image_embeddings(chosen: Tensor) -> Tensor:
        return clip.visual_projection(clip.vision_model(paint(scenes[chosen])).pooler_output)

    def image_loss_at(step: int) -> dict[str, Tensor]:
        chosen = rows("clip_image", step, step < args.image_steps // 4)
        return {"infonce": infonce(image_embeddings(chosen), table(facts(scenes[chosen])), clip.logit_scale)}

    images = nn.ModuleList([clip.vision_model, clip.visual_projection, table])
    images.register_parameter("logit_scale", clip.logit_scale)
    fit("clip_image", images, image_loss_at, args.image_steps, 1e-3, args)
    images.requires_grad_(False)
    clip.logit_scale.requires_grad_(True)

    def loss_at(step: int) -> dict[str, Tensor]:
        chosen = rows("clip", step, step < args.clip_steps // 8)
        ids = cut(input_ids[chosen], tokenizer.eos_token_id)
        text = clip.text_projection(clip.text_model(ids).pooler_output)
        return {"infonce": infonce(image_embeddings(chosen), text, clip.logit_scale)}

    fit("clip", clip, loss_at, args.clip_steps, 1e-3, args)
    clip.to("cpu").save_pretrained(args.output_dir / "clip_model")
    tokenizer.save_pretrained(args.output_dir / "clip_model")
    image_processor().save_pretrained(args.output_dir / "clip_model")
    save_text_encoder(text_encoder(clip), tokenizer, args.output_dir / "model", overwrite=True)


def image_processor() -> CLIPImageProcessor:
    """Does what `Painter` does."""
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def text_encoder(clip: CLIPModel) -> CLIPTextModel:
    """The text tower of a CLIP, a model of its own."""
    encoder = CLIPTextModel(copy.deepcopy(clip.config.text_config))
    weights = {f"text_model.{name}": value for name, value in clip.text_model.state_dict().items()}
    own = encoder.state_dict()
    encoder.load_state_dict({name: weights[name if name in weights else f"text_model.{name}"] for name in own})
    return encoder.eval()


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, ended at pure noise, with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


@torch.no_grad()
def scaled_latents(args: Arguments, vae: AutoencoderKL, scenes: Tensor, stage: str) -> Tensor:
    """Latents of the first scenes, (N, C, h, w), written once for a stage."""
    file = args.output_dir / f"latents-{stage}-{args.num_latents}.safetensors"
    scenes = scenes[: args.num_latents]
    if not file.exists():
        paint, parts = Painter(scenes.device), []
        with accelerator_of(args).autocast():
            for first in trange(0, len(scenes), 256, desc="latents", mininterval=5):
                parts.append(vae.encode(paint(scenes[first : first + 256])).latent_dist.mean.half().cpu())
        with writing(file) as part:
            save_file({"latents": torch.cat(parts) * vae.config.scaling_factor}, part)
    return load_file(file)["latents"].to(scenes.device)


def train_denoiser(
    args: Arguments,
    stage: str,
    model: Path,
    unet: UNet2DConditionModel,
    steps: int,
    learning_rate: float = 1e-3,
    ema_decay: float = 0.9995,
    style: Callable[[Tensor], Tensor] = lambda scenes: scenes,
) -> StableDiffusionPipeline:
    """Captions are cut at 77 tokens and padded to as many, in training as in sampling; a tenth is empty.

    Noise levels lean to the high end, where the layout is decided. Pictures are of what `style` makes of the scenes.
    """
    device = accelerator_of(args).device
    vae = AutoencoderKL.from_pretrained(model / "vae").to(device).float().eval()
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder").to(device).float().eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    noise_scheduler = scheduler()
    if device.type == "cpu":  # the faster ones there in bfloat16
        unet.set_attn_processor(AttnProcessor())
        encoder.set_attn_implementation("eager")
    scenes, input_ids = read_captions(args, device)
    latents = scaled_latents(args, vae, style(scenes), stage)
    input_ids = cut(input_ids[: len(latents)], tokenizer.eos_token_id)
    empty_ids = torch.tensor(tokenizer("", padding="max_length").input_ids, device=device)

    def loss_at(step: int) -> dict[str, Tensor]:
        generator, size = draws(args, stage, step), args.unet_batch_size
        rows = torch.randint(len(latents), (size,), generator=generator).to(device)
        empty = (torch.rand(size, generator=generator) < 0.1).to(device)
        clean = latents[rows].float()
        noise = torch.randn(clean.shape, generator=generator).to(device)
        timesteps = sample_timesteps(size, 1000, "high_noise", generator).to(device)
        with torch.no_grad():
            states = encoder(torch.where(empty[:, None], empty_ids, input_ids[rows])).last_hidden_state
        velocity = unet(noise_scheduler.add_noise(clean, noise, timesteps), timesteps, states).sample
        return {"velocity": F.mse_loss(velocity.float(), denoising_target(noise_scheduler, clean, noise, timesteps))}

    fit(stage, unet, loss_at, steps, learning_rate, args, ema_decay)
    pipe = StableDiffusionPipeline(vae, encoder, tokenizer, unet, noise_scheduler, None, None, None, False)
    draw_examples(pipe, args.output_dir / f"{stage}.png", min(8, args.unet_batch_size), style)
    return pipe


def draw_examples(pipe: StableDiffusionPipeline, file: Path, number: int, style: Callable[[Tensor], Tensor]) -> None:
    """Writes held-out scenes, in their style, above what the pipeline makes of their captions."""
    pipe.set_progress_bar_config(disable=True)
    diffusers_logging.set_verbosity_error()  # captions are cut at 77 tokens here, it need not say so
    scenes = [sample_scene(seed, "test") for seed in range(number)]
    images = pipe(
        [str(describe(scene)) for scene in scenes],
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(number)],
        output_type="pt",
    ).images
    save_picture(torch.cat([Painter(images.device)(style(cell_numbers(scenes))), images * 2 - 1]), number, file)


def train_unet(args: Arguments) -> None:
    """Stage 5."""
    model = args.output_dir / "model"
    vae = AutoencoderKL.load_config(model / "vae")
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2 ** (len(vae["block_out_channels"]) - 1),
        in_channels=vae["latent_channels"],
        out_channels=vae["latent_channels"],
        block_out_channels=(96, 144),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128,
        attention_head_dim=3,  # the number of heads, by diffusers' naming
        norm_num_groups=16,
    )
    pipe = train_denoiser(args, "unet", model, unet, args.unet_steps)
    unet.to("cpu").save_pretrained(model / "unet")
    pipe.scheduler.save_pretrained(model / "scheduler")
    pipe.save_config(model)


def train_long_clip(args: Arguments) -> None:
    """Stage 6. The words' embeddings stay as they are: both encoders share them in the bundle."""
    run(
        "finetune_encoder.py",
        recipe=LONG_CLIP_RECIPE,
        pretrained_model_name_or_path=args.output_dir / "clip_model",
        train_data=f"scenes:{WORDING}",
        output_dir=args.output_dir / "long_clip",
        train_batch_size=GROUP * min(12, args.clip_groups),
        learning_rate=5e-4,
        head_learning_rate=5e-4,
        lr_warmup_steps=min(60, args.long_clip_steps),
        max_train_steps=args.long_clip_steps,
        length_bucketing=True,
        num_validation_examples=min(512, args.num_captions),
        freeze_token_embedding=True,
        **common_flags(args),
    )


def train_tune(args: Arguments) -> None:
    """Stage 7. The words' embeddings stay as they are, here, too."""
    model = args.output_dir / "model"
    run(
        "finetune_text_to_image.py",
        preset="scenes",
        pretrained_model_name_or_path=model,
        finelip=args.output_dir / "long_clip",
        output_dir=args.output_dir / "tune",
        train_batch_size=args.tune_batch_size,
        max_train_steps=args.tune_steps,
        num_scenes=args.tune_scenes,
        num_validation_prompts=min(64, args.tune_scenes // 4),
        freeze_token_embedding=True,
        **common_flags(args),
    )


def train_reword(args: Arguments) -> None:
    """Stage 8. What `tune` left is the teacher, of plain sentences, and the pupil, of all others."""
    model = args.output_dir / "model"
    run(
        "finetune_text_to_image.py",
        preset="reword",
        pretrained_model_name_or_path=model,
        finelip=args.output_dir / "tune",
        output_dir=args.output_dir / "reword",
        train_batch_size=args.reword_batch_size,
        max_train_steps=args.reword_steps,
        num_scenes=args.reword_scenes,
        num_validation_prompts=min(48, args.reword_scenes // 4),
        **common_flags(args),
    )
    for part in ("text_encoder", "tokenizer"):
        with writing(model / "finelip" / part) as folder:
            shutil.copytree(args.output_dir / "reword" / part, folder, dirs_exist_ok=True)


def common_flags(args: Arguments) -> dict[str, object]:
    """Of the project's own training scripts."""
    return {
        "mixed_precision": args.mixed_precision,
        "checkpointing_steps": args.checkpointing_steps,
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "dataloader_num_workers": (args.num_workers or os.cpu_count() or 1) if torch.accelerator.is_available() else 0,
        "seed": args.seed,
    }


def run(script: str, **flags: object) -> None:
    """Runs one of the project's own scripts."""
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    if status := subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *words]).returncode:
        raise SystemExit(status)


def train_restyle(args: Arguments) -> None:
    """Stage 10. Of the pipeline, only the UNet moves; it reads what it always read."""
    model = args.restyle_model or args.output_dir / "model"
    if not (model / "unet").is_dir():
        raise ValueError(f"--stage restyle continues with {model / 'unet'}, which is not there: give --restyle_model.")
    unet = UNet2DConditionModel.from_pretrained(model / "unet").float()
    train_denoiser(args, "restyle", model, unet, args.restyle_steps, 3e-4, 0.99, restyled)
    unet.to("cpu").save_pretrained(args.output_dir / "restyled")


# -------------------------------------------------------------------------------------------------------------- bundle


def write_bundle(args: Arguments) -> None:
    """Stage 9. The same folder in half precision; the encoders share one table of the embeddings of words."""
    model = args.output_dir / "model"
    with writing(args.output_dir / "bundled") as bundled:
        shutil.copytree(model, bundled, dirs_exist_ok=True)
        for file in bundled.rglob("*.safetensors"):
            weights = {name: weight.half() for name, weight in load_file(file).items()}
            save_file(weights, file, metadata={"format": "pt"})
        for file in bundled.rglob("tokenizer.json"):  # what vocab.json and merges.txt say, three times as long
            file.unlink()
        share_embeddings(bundled)
        write_clip(args.output_dir / "clip_model", bundled)


def share_embeddings(bundled: Path) -> None:
    """Puts the embeddings of words into a file of their own, which the indexes of both text encoders name.

    Raises:
        ValueError: If the long encoder has others.
    """
    words = "model-00001-of-00002.safetensors"
    table: dict[str, Tensor] = {}
    for folder, shared in (
        (bundled / "text_encoder", words),
        (bundled / "finelip" / "text_encoder", f"../../text_encoder/{words}"),
    ):
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if name.endswith("token_embedding.weight"))
        own = {name: weights.pop(name)}
        table = table or own
        if not torch.equal(table[name], own[name]):
            raise ValueError(f"{folder} has embeddings of words of its own: train it with --freeze_token_embedding.")
        (folder / "model.safetensors").unlink()
        save_file(weights, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
        write_index(
            folder, {**dict.fromkeys(weights, "model-00002-of-00002.safetensors"), name: shared}, [weights, table]
        )
    save_file(table, bundled / "text_encoder" / words, metadata={"format": "pt"})


def write_clip(source: Path, bundled: Path) -> None:
    """The 77-token CLIP, which fine-tuning starts from, beside the pipeline's folders.

    Its text tower is the pipeline's text encoder, weight for weight, so the index names its files instead of copies.
    """
    folder = bundled / "clip"
    folder.mkdir()
    weights = {name: weight.half() for name, weight in load_file(source / "model.safetensors").items()}
    files = json.loads((bundled / "text_encoder" / "model.safetensors.index.json").read_text())["weight_map"]
    text = {name: f"../text_encoder/{files[name]}" for name in weights if name in files}
    image = {name: weight for name, weight in weights.items() if name not in text}
    save_file(image, folder / "image_tower.safetensors", metadata={"format": "pt"})
    write_index(folder, {name: text.get(name, "image_tower.safetensors") for name in weights}, [weights])
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(source / name, folder)


def write_index(folder: Path, files: dict[str, str], weights: Sequence[dict[str, Tensor]]) -> None:
    """Says in which file each weight is, as transformers reads it."""
    size = sum(weight.nbytes for part in weights for weight in part.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


# ---------------------------------------------------------------------------------------------------------- pictures


def save_picture(images: Tensor, columns: int, file: Path) -> None:
    """Writes images in -1..1, (B, 3, H, W), as one contact sheet."""
    array = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.concatenate(array[first : first + columns], axis=1) for first in range(0, len(array), columns)]
    Image.fromarray(np.concatenate(rows)).save(file)


def main(args: Arguments) -> None:
    if args.num_captions < GROUP:
        raise ValueError(f"--num_captions is {args.num_captions}, but a group has {GROUP}.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stages = {
        "captions": write_captions,
        "autoencoder": train_autoencoder,
        "decoder": train_decoder,
        "clip": train_clip,
        "unet": train_unet,
        "long_clip": train_long_clip,
        "tune": train_tune,
        "reword": train_reword,
        "bundle": write_bundle,
        "restyle": train_restyle,
    }
    for stage in [name for name in stages if name != "restyle"] if args.stage == "all" else [args.stage]:
        missing = [name for name in NEEDS.get(stage, ()) if not (args.output_dir / name).exists()]
        if missing:
            raise ValueError(f"--stage {stage} needs {args.output_dir / missing[0]}: run the stages before it first.")
        set_seed(args.seed)
        stages[stage](args)


if __name__ == "__main__":
    run_script(main, Arguments, __file__, PRESETS)
