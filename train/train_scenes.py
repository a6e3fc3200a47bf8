"""Builds the bundled model from nothing: a small Stable Diffusion, and a long text encoder with a UNet adapted to it.

    python train/train_scenes.py --output_dir runs/scenes                 # every stage in turn, two hours on two cores
    python train/train_scenes.py --output_dir runs/scenes --stage unet    # one stage; it resumes where it stopped

The stages follow the making of Stable Diffusion, then of FineLIP:

1. `autoencoder`: 96 x 96 pixels to 6 x 6 latents of 16 channels, and back.
2. `clip`: a 77-token CLIP by InfoNCE. A batch holds groups of near-duplicates (same objects elsewhere; same places,
   other attributes), without which text states forget places, and no UNet can put anything where the text says.
3. `unet`: v-prediction on the latents, captions cut at 77 tokens.
4. `long_clip`: positions stretched to 248, whole captions, the recipe `finelip_sparc`, by `finetune_encoder.py`.
5. `adapt`: the UNet goes on with whole captions through the long encoder.
6. `bundle`: a copy of the folder in half precision, `OUTPUT_DIR/bundled`.

A batch is a function of the seed and the step alone, so a stage that is stopped and started again sees what it would
have seen. Each stage leaves a log for tensorboard, a picture, and its part of the pipeline folder `OUTPUT_DIR/model`.
"""

import copy
import gzip
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
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
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import trange
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    HfArgumentParser,
)

from finelip_diffusion.files import remove, remove_stages, writing
from finelip_diffusion.scenes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Scene,
    describe,
    render,
    sample_scene,
    vary,
)
from finelip_diffusion.text_encoder import save_text_encoder

STOCK_LENGTH = 77
LONG_CLIP_RECIPE = "finelip_sparc"
COMMON_MERGES = 1500  # merges of CLIP's vocabulary kept for their frequency, beside those that the captions need
FEW, MANY = (1, 3), (4, 9)  # numbers of objects
NEEDS = {  # what earlier stages must have left in the output folder
    "unet": ("model/vae", "model/text_encoder"),
    "long_clip": ("clip_model",),
    "adapt": ("model/vae", "model/unet", "model/finelip/text_encoder"),
    "bundle": ("clip_model", "model/unet", "model/finelip/unet"),
}


@dataclass
class Arguments:
    """The defaults make the bundled model."""

    output_dir: Path = field(default=Path("runs/scenes"), metadata={"help": "Where stages and the model are written."})
    stage: Literal["all", "autoencoder", "clip", "unet", "long_clip", "adapt", "bundle"] = field(
        default="all", metadata={"help": "One stage, or all of them in turn."}
    )
    seed: int = field(default=0, metadata={"help": "Seeds the weights, the scenes, the captions and the noise."})
    autoencoder_steps: int = field(default=2500, metadata={"help": "Steps of 8 scenes."})
    image_steps: int = field(default=1000, metadata={"help": "Steps of 12 groups of eight scenes, image tower."})
    clip_steps: int = field(default=1500, metadata={"help": "Steps of 12 groups of eight scenes."})
    unet_steps: int = field(default=4000, metadata={"help": "Steps of 64 scenes, captions cut at 77 tokens."})
    long_clip_steps: int = field(default=800, metadata={"help": "Updates of 12 groups of eight, whole captions."})
    adapt_steps: int = field(default=5000, metadata={"help": "Steps of 64 scenes, whole captions."})
    num_scenes: int = field(default=40_000, metadata={"help": "Training scenes whose latents are kept in memory."})
    checkpointing_steps: int = field(default=500, metadata={"help": "Steps from one checkpoint to the next."})
    mixed_precision: str = field(default="bf16", metadata={"help": "no or bf16: the precision of autocast."})


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
        model: what is trained (parameters that require gradients).
        loss_at: the loss terms of a step by name; their sum is minimised.
        steps: the last step; the rate warms up over 100 steps and falls to zero over the last fifth.
        learning_rate: of AdamW.
        args: the script's.
        ema_decay: of the average of the weights.
    """
    folder = args.output_dir / stage
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, log_with="tensorboard", project_dir=args.output_dir / "logs"
    )
    accelerator.init_trackers(stage)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    _, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, power=0.75)
    accelerator.register_for_checkpointing(ema)
    latest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), default=None)
    first = 0
    if latest is not None:
        accelerator.load_state(latest)
        first = int(latest.name.split("-")[1])
    for step in (bar := trange(first, steps, initial=first, total=steps, desc=stage, mininterval=5)):
        rate = learning_rate * min(1.0, (step + 1) / 100, (steps - step) / (0.2 * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with accelerator.autocast():
            terms = loss_at(step)
            loss = sum(terms.values())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        if step % 25 == 0:
            values = {name: value.item() for name, value in terms.items()}
            if not math.isfinite(sum(values.values())):
                raise SystemExit(f"The loss of {stage} is not finite at step {step}: {values}.")
            bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()}, refresh=False)
            accelerator.log(values | {"learning_rate": rate}, step=step)
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == steps:
            save_checkpoint(accelerator, folder, step + 1)
    ema.copy_to(parameters)
    accelerator.end_training()
    accelerator.free_memory()


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Writes `folder/checkpoint-STEP` whole or not at all, then removes the older ones."""
    remove_stages(folder)
    older = list(folder.glob("checkpoint-*"))
    with writing(folder / f"checkpoint-{step}") as part:
        accelerator.save_state(part)
    for path in older:
        remove(path)


# ------------------------------------------------------------------------------------------------------------- data


def pixels(scenes: Iterable[Scene]) -> Tensor:
    """Pictures of scenes in -1..1, (B, 3, H, W)."""
    array = np.stack([np.asarray(render(scene)) for scene in scenes])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def tokens(tokenizer: CLIPTokenizer, captions: list[str], length: int) -> Tensor:
    """Token ids padded, and cut, to `length`, (B, length)."""
    batch = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return batch.input_ids


def trimmed(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """Cuts a padded batch behind its longest caption; attention is causal, so nothing in front of the cut changes."""
    ends = (input_ids == eos_token_id).int().argmax(1)
    return input_ids[:, : int(ends.max()) + 1]


def groups(args: Arguments, step: int, number: int, share_of_few: float) -> list[Scene]:
    """`number` groups of eight: a scene, its objects elsewhere (four times), its attributes dealt out anew (three)."""
    scenes = []
    for index in range(number):
        seed = (args.seed * 10_000_000 + step) * number + index
        few = random.Random(f"few {seed}").random() < share_of_few
        scene = sample_scene(seed, num_objects=FEW if few else MANY)
        other = "exchange" if len(scene.objects) > 1 else "alter"
        kinds = ("move",) * 4 + (other,) * 3
        scenes += [scene, *(vary(scene, kind, 8 * seed + turn) for turn, kind in enumerate(kinds))]
    return scenes


def scenes_tokenizer() -> CLIPTokenizer:
    """CLIP's own byte pair encoding, cut to its most frequent merges and those that captions of scenes need.

    Captions of scenes get the very tokens that CLIP's full vocabulary gives them.
    """
    import open_clip.tokenizer

    with gzip.open(open_clip.tokenizer.default_bpe()) as file:
        lines = file.read().decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    full = open_clip.tokenizer.SimpleTokenizer()
    parts = {"".join(merge): merge for merge in reversed(merges)}
    needed = {"".join(merge) for merge in merges[:COMMON_MERGES]}
    captions = [describe(sample_scene(seed, num_objects=(1, 9)), seed) for seed in range(2000)]
    todo = [full.decoder[token] for token in {token for caption in captions for token in full.encode(caption)}]
    while todo:  # a token needs the tokens that it is merged from
        token = todo.pop()
        if token in parts and token not in needed:
            needed.add(token)
            todo += parts[token]
        elif token in parts:
            todo += [part for part in parts[token] if part in parts and part not in needed]
    kept = [merge for merge in merges if "".join(merge) in needed]
    letters = list(full.byte_encoder.values())
    vocabulary = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in kept]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=kept, model_max_length=STOCK_LENGTH
    )


# ----------------------------------------------------------------------------------------------------------- stages


def train_autoencoder(args: Arguments) -> None:
    """Stage 1. The mean squared error, and a weak pull of the latents to a standard normal."""
    channels = (16, 32, 64, 64, 96)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=1,  # groups of few channels would be instance norms: colours mixed up with backgrounds
        sample_size=IMAGE_SIZE,
    )

    for block in vae.modules():  # the network starts out linear, and almost finds the few dimensions of a cell so
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)

    def loss_at(step: int) -> dict[str, Tensor]:
        images = pixels(sample_scene(seed, num_objects=(4, 9)) for seed in range(step * 8, step * 8 + 8))
        posterior = vae.encode(images).latent_dist
        generator = torch.Generator().manual_seed(step)
        error = vae.decode(posterior.sample(generator=generator)).sample.float() - images
        return {
            "squared": error.square().mean(),
            "kl": 1e-4 * posterior.kl().mean() / posterior.mean[0].numel(),
        }

    fit("autoencoder", vae, loss_at, args.autoencoder_steps, 2e-3, args)
    with torch.no_grad():
        images = pixels(sample_scene(seed, "test") for seed in range(64))
        latents = vae.encode(images).latent_dist.mean
        vae.register_to_config(scaling_factor=float(1 / latents.std()))
        rebuilt = vae.decode(latents).sample
    (args.output_dir / "autoencoder.txt").write_text(f"mean squared error {F.mse_loss(rebuilt, images):.5f}\n")
    save_picture(torch.cat([images[:8], rebuilt[:8]]), 8, args.output_dir / "autoencoder.png")
    for stale in args.output_dir.glob("latents-*.pt"):  # of the autoencoder as it was
        stale.unlink()
    vae.save_pretrained(args.output_dir / "model" / "vae")


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of two narrow towers, its weights drawn so that words and positions are not drowned by the layers."""
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = tower | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": STOCK_LENGTH,
        "projection_dim": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"image_size": IMAGE_SIZE, "patch_size": 16, "projection_dim": 256}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=256, attn_implementation="eager")
    clip = CLIPModel(config)
    for layer in clip.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=0.3)
    nn.init.normal_(clip.text_model.embeddings.position_embedding.weight, std=0.2)
    nn.init.normal_(clip.vision_model.embeddings.patch_embedding.weight, std=0.1)
    nn.init.normal_(clip.vision_model.embeddings.position_embedding.weight, std=1.0)
    return clip


def facts(scenes: list[Scene]) -> Tensor:
    """Which cell holds which shape, colour and size, and the background, as zeros and ones, (B, 148)."""
    values = [*SHAPES, *COLOURS, *SIZES]
    table = torch.zeros(len(scenes), 9 * len(values) + len(BACKGROUNDS))
    for row, scene in zip(table, scenes, strict=True):
        row[9 * len(values) + list(BACKGROUNDS).index(scene.background)] = 1
        for item in scene.objects:
            for value in (item.shape, item.colour, item.size):
                row[item.cell * len(values) + values.index(value)] = 1
    return table


def infonce(one: Tensor, other: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of matching rows, (B, D) each; CLIP, figure 3."""
    logits = logit_scale.exp().clamp(max=100) * F.normalize(one.float(), dim=-1) @ F.normalize(other.float(), dim=-1).T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def image_embeddings(clip: CLIPModel, scenes: list[Scene]) -> Tensor:
    """Projected image embeddings, (B, E)."""
    return clip.visual_projection(clip.vision_model(pixels(scenes)).pooler_output)


def text_embeddings(clip: CLIPModel, input_ids: Tensor) -> Tensor:
    """Projected text embeddings, (B, E); positions behind the longest caption are not computed."""
    ids = trimmed(input_ids, clip.config.text_config.eos_token_id)
    return clip.text_projection(clip.text_model(ids).pooler_output)


def train_clip(args: Arguments) -> None:
    """Stage 2, as locked-image tuning does it: the image tower learns to tell scenes apart by their facts, then it is
    locked, and the text tower learns to match it. Two fresh towers stay for long at telling backgrounds apart.

    Captions are cut at 77 tokens; scenes grow from few objects to many.
    """
    tokenizer = scenes_tokenizer()
    clip = build_clip(tokenizer)
    table = nn.Linear(facts([sample_scene(0)]).shape[1], clip.config.projection_dim)

    def image_loss_at(step: int) -> dict[str, Tensor]:
        scenes = groups(args, 2_000_000 + step, 12, share_of_few=1.0 if step < args.image_steps // 4 else 0.3)
        return {"infonce": infonce(image_embeddings(clip, scenes), table(facts(scenes)), clip.logit_scale)}

    images = nn.ModuleList([clip.vision_model, clip.visual_projection, table])
    images.register_parameter("logit_scale", clip.logit_scale)
    fit("clip_image", images, image_loss_at, args.image_steps, 1e-3, args)
    images.requires_grad_(False)
    clip.logit_scale.requires_grad_(True)

    def loss_at(step: int) -> dict[str, Tensor]:
        scenes = groups(args, step, 12, share_of_few=1.0 if step < args.clip_steps // 4 else 0.5)
        input_ids = tokens(tokenizer, [describe(scene, step) for scene in scenes], STOCK_LENGTH)
        return {"infonce": infonce(image_embeddings(clip, scenes), text_embeddings(clip, input_ids), clip.logit_scale)}

    fit("clip", clip, loss_at, args.clip_steps, 1e-3, args)
    clip.save_pretrained(args.output_dir / "clip_model")
    tokenizer.save_pretrained(args.output_dir / "clip_model")
    image_processor().save_pretrained(args.output_dir / "clip_model")
    save_text_encoder(text_encoder(clip), tokenizer, args.output_dir / "model", overwrite=True)


def image_processor() -> CLIPImageProcessor:
    """Does what `pixels` does."""
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


def training_latents(args: Arguments, vae: AutoencoderKL) -> tuple[list[Scene], Tensor]:
    """The training scenes, one to nine objects each, and their scaled latents, written once."""
    file = args.output_dir / f"latents-{args.num_scenes}.pt"
    rows = (FEW, (1, 9), MANY, MANY)
    scenes = [sample_scene(seed, num_objects=rows[seed % 4]) for seed in range(args.num_scenes)]
    if not file.exists():
        parts = []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            for first in trange(0, len(scenes), 64, desc="latents", mininterval=5):
                parts.append(vae.encode(pixels(scenes[first : first + 64])).latent_dist.mean.float())
        with writing(file) as part:
            torch.save(torch.cat(parts) * vae.config.scaling_factor, part)
    return scenes, torch.load(file, weights_only=True)


@torch.no_grad()
def encode(args: Arguments, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token states of captions padded, and cut, to the encoder's length, (N, T, D) in bfloat16."""
    length, width = encoder.config.max_position_embeddings, encoder.config.hidden_size
    states = torch.empty(len(captions), length, width, dtype=torch.bfloat16)
    for first in trange(0, len(captions), 64, desc="states", mininterval=5):
        rows = slice(first, first + 64)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            states[rows] = encoder(tokens(tokenizer, captions[rows], length)).last_hidden_state
    return states


def train_denoiser(
    args: Arguments,
    stage: str,
    unet: UNet2DConditionModel,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    steps: int,
) -> StableDiffusionPipeline:
    """Stages 3 and 5. Captions are padded to the encoder's length, in training as in sampling; a tenth is empty.

    Noise levels lean to the high end, where the layout is decided.
    """
    model = args.output_dir / "model"
    vae = AutoencoderKL.from_pretrained(model / "vae").eval()
    scenes, latents = training_latents(args, vae)
    noise_scheduler = scheduler()
    unet.set_attn_processor(AttnProcessor())  # faster than the fused kernel in bfloat16 on a CPU
    captions = ["", *(describe(scene, seed) for seed, scene in enumerate(scenes))]
    states = encode(args, encoder, tokenizer, captions)  # (1 + scenes, T, D)

    def loss_at(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(args.seed * 10_000_000 + step)
        rows = torch.randint(len(scenes), (64,), generator=generator)
        empty = torch.rand(64, generator=generator) < 0.1
        noise = torch.randn(latents[rows].shape, generator=generator)
        timesteps = ((1 - torch.rand(64, generator=generator).square()) * 1000).long().clamp(max=999)
        noisy = noise_scheduler.add_noise(latents[rows], noise, timesteps)
        target = noise_scheduler.get_velocity(latents[rows], noise, timesteps)
        velocity = unet(noisy, timesteps, states[(rows + 1).masked_fill(empty, 0)]).sample
        return {"velocity": F.mse_loss(velocity.float(), target)}

    fit(stage, unet, loss_at, steps, 1e-3, args, ema_decay=0.9995)
    pipe = StableDiffusionPipeline(vae, encoder, tokenizer, unet, noise_scheduler, None, None, None, False)
    draw_examples(pipe, args.output_dir / f"{stage}.png")
    return pipe


def draw_examples(pipe: StableDiffusionPipeline, file: Path) -> None:
    """Writes eight held-out scenes above what the pipeline makes of their captions."""
    pipe.set_progress_bar_config(disable=True)
    scenes = [sample_scene(seed, "test") for seed in range(8)]
    images = pipe(
        [str(describe(scene)) for scene in scenes],
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(8)],
        output_type="pt",
    ).images
    save_picture(torch.cat([pixels(scenes), images * 2 - 1]), 8, file)


def train_unet(args: Arguments) -> None:
    """Stage 3."""
    model = args.output_dir / "model"
    unet = UNet2DConditionModel(
        sample_size=6,
        in_channels=16,
        out_channels=16,
        block_out_channels=(96, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128,
        attention_head_dim=4,  # the number of heads, by diffusers' naming
        norm_num_groups=16,
    )
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder")
    pipe = train_denoiser(
        args, "unet", unet, encoder, CLIPTokenizer.from_pretrained(model / "tokenizer"), args.unet_steps
    )
    unet.save_pretrained(model / "unet")
    pipe.scheduler.save_pretrained(model / "scheduler")
    pipe.save_config(model)


def train_long_clip(args: Arguments) -> None:
    """Stage 4, by the project's own script."""
    flags = {
        "recipe": LONG_CLIP_RECIPE,
        "pretrained_model_name_or_path": args.output_dir / "clip_model",
        "train_data": "scenes",
        "output_dir": args.output_dir / "long_clip",
        "train_batch_size": 96,
        "learning_rate": 5e-4,
        "head_learning_rate": 5e-4,
        "lr_warmup_steps": min(60, args.long_clip_steps),
        "max_train_steps": args.long_clip_steps,
        "length_bucketing": True,
        "num_validation_examples": min(512, args.num_scenes),
        "mixed_precision": args.mixed_precision,
        "checkpointing_steps": args.checkpointing_steps,
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "seed": args.seed,
    }
    script = Path(__file__).with_name("finetune_encoder.py")
    command = [sys.executable, script, *(word for name, value in flags.items() for word in (f"--{name}", value))]
    if status := subprocess.run([str(word) for word in command]).returncode:
        raise SystemExit(status)
    for part in ("text_encoder", "tokenizer"):
        folder = args.output_dir / "model" / "finelip" / part
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(args.output_dir / "long_clip" / part, folder)


def train_adapt(args: Arguments) -> None:
    """Stage 5."""
    model = args.output_dir / "model"
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    encoder = CLIPTextModel.from_pretrained(model / "finelip" / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(model / "finelip" / "tokenizer")
    train_denoiser(args, "adapt", unet, encoder, tokenizer, args.adapt_steps)
    unet.save_pretrained(model / "finelip" / "unet")


def write_bundle(args: Arguments) -> None:
    """Stage 6. The same folder in half precision; what is no weight is copied."""
    model, bundled = args.output_dir / "model", args.output_dir / "bundled"
    shutil.rmtree(bundled, ignore_errors=True)
    shutil.copytree(model, bundled)
    write_clip(args.output_dir / "clip_model", bundled / "clip")
    for file in bundled.rglob("*.safetensors"):
        save_file({name: weight.half() for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})


def write_clip(source: Path, folder: Path) -> None:
    """The 77-token CLIP, which fine-tuning starts from, beside the pipeline's folders.

    Its text tower is the pipeline's text encoder, weight for weight, so the index names that file instead of a copy.
    """
    folder.mkdir()
    weights = load_file(source / "model.safetensors")
    text = {name for name in weights if name.startswith("text_model.")}
    image = {name: weight for name, weight in weights.items() if name not in text}
    save_file(image, folder / "image_tower.safetensors", metadata={"format": "pt"})
    size = 2 * sum(weight.numel() for weight in weights.values())
    files = {
        name: "../text_encoder/model.safetensors" if name in text else "image_tower.safetensors" for name in weights
    }
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(source / name, folder)


# ---------------------------------------------------------------------------------------------------------- pictures


def save_picture(images: Tensor, columns: int, file: Path) -> None:
    """Writes images in -1..1, (B, 3, H, W), as one contact sheet."""
    array = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(array[first : first + columns], axis=1) for first in range(0, len(array), columns)]
    Image.fromarray(np.concatenate(rows)).save(file)


def main(args: Arguments) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stages = {
        "autoencoder": train_autoencoder,
        "clip": train_clip,
        "unet": train_unet,
        "long_clip": train_long_clip,
        "adapt": train_adapt,
        "bundle": write_bundle,
    }
    for stage in stages if args.stage == "all" else (args.stage,):
        missing = [name for name in NEEDS.get(stage, ()) if not (args.output_dir / name).exists()]
        if missing:
            raise SystemExit(f"--stage {stage} needs {args.output_dir / missing[0]}: run the stages before it first.")
        set_seed(args.seed)
        stages[stage](args)


if __name__ == "__main__":
    try:
        main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
    except ValueError as error:  # a full disk
        raise SystemExit(f"{Path(__file__).name}: {error}") from error
