"""Tunes a long text encoder through the frozen UNet of a Stable Diffusion, so that it draws what a caption says.

    accelerate launch train/finetune_text_to_image.py --preset scenes --output_dir runs/tuned

    accelerate launch --config_file train/configs/ddp.yaml train/finetune_text_to_image.py --preset sd15 \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --finelip runs/finelip-l14 \\
        --train_data data/docci --output_dir runs/tuned-sd15

The autoencoder and the UNet stay as they are; the encoder learns from the UNet's own denoising loss on whole captions.
`--train unet_lora` is the other way round, and `--train text_encoder unet_lora` one after the other. `--output_dir`
gets `text_encoder/` and `tokenizer/`, stock classes that a pipeline loads as `finelip=` and that plain diffusers loads
as they are, a LoRA of the UNet if one was trained, and a model card with figures.

The batch of a step, its noise and its timesteps are a function of the seed and the step alone, and a checkpoint holds
weights, their average, optimizer, schedule and random states: a run that is killed and resumed ends with the weights
of one that was not. docs/image_tuning.md has the rest.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from finelip_diffusion.data.batches import Collator, make_loader
from finelip_diffusion.data.datasets import (
    CaptionDataset,
    RecordDataset,
    ScenesDataset,
    SkipLog,
    open_dataset,
    stable_hash,
)
from finelip_diffusion.data.latents import (
    BucketSampler,
    LatentCollator,
    LatentDataset,
    Latents,
    bucket_sizes,
    latents_key,
    open_latents,
    write_latents,
)
from finelip_diffusion.denoising import sample_timesteps
from finelip_diffusion.files import writing
from finelip_diffusion.gathering import gather_with_gradients, longest_of_all
from finelip_diffusion.heads import HEADS_FILE
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.low_rank import adapt_encoder, adapt_unet, fuse, save_unet_lora
from finelip_diffusion.memory import activation_bytes
from finelip_diffusion.model import load_clip
from finelip_diffusion.probing import FactProbe, fit_probe
from finelip_diffusion.recipes import Recipe, read_recipe
from finelip_diffusion.resuming import find_checkpoint, save_checkpoint, step_of
from finelip_diffusion.rotary import mark_trained
from finelip_diffusion.runs import (
    MIB,
    Means,
    RunFlags,
    count_updates,
    describe_groups,
    make_accelerator,
    make_schedule,
    model_card,
    run_script,
    training_memory,
    upload,
    write_card,
)
from finelip_diffusion.teaching import (
    Prompts,
    TrajectoryDataset,
    make_teacher,
    open_trajectories,
    write_trajectories,
)
from finelip_diffusion.text_encoder import save_text_encoder
from finelip_diffusion.tuning import (
    TERMS,
    Parts,
    TuningStep,
    encode,
    keep_start,
    load_parts,
    prepare_frozen,
    retrieval_step,
    share_tower,
)
from finelip_diffusion.validation import Curve, counts_of, draw, prompts_of, recall

PRESETS = Path(__file__).parent / "tunings"
RECIPES = Path(__file__).parent / "recipes"
STOCK_LENGTH = 77
STAGES = ("text_encoder", "unet_lora")
PLACES = ("text_encoder", "text_encoder_2")
OF_STATES = {"kept_states", "stated_facts"}  # terms that no UNet has a part in
NUM_PROBED, PROBED_AT_ONCE = 1200, 40  # captions that the probe of stated_facts is fitted to


@dataclass
class Arguments(RunFlags):
    """Names follow diffusers' training examples."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "The name of a preset in train/tunings, or the path of a YAML file, with defaults for the "
            "other flags."
        },
    )
    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The Stable Diffusion model: a folder, a hub id or a single file. The default is the "
            "bundled model."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "The branch, tag or commit of a hub id."})
    config: str | None = field(
        default=None,
        metadata={
            "help": "The folder or hub id with the configurations for a single file. The default is the hub id "
            "that diffusers chooses."
        },
    )
    finelip: str | None = field(
        default=None,
        metadata={
            "help": "The long encoder to start from, or stretched for the model's own encoder with stretched "
            "positions. The default is the bundled long encoder for the bundled model, and stretched "
            "for other models."
        },
    )
    train: list[str] = field(
        default_factory=lambda: ["text_encoder"],
        metadata={"help": "What to train: text_encoder, unet_lora, or both names to train one after the other."},
    )
    encoders: list[str] | None = field(
        default=None,
        metadata={"help": "The text encoders of SDXL to train: text_encoder, text_encoder_2. The default is both."},
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "The rank of the LoRA adapters in the encoder. The default trains the whole encoder instead."
        },
    )
    unet_lora_rank: int = field(default=16, metadata={"help": "The rank of the UNet's LoRA."})
    terms: list[str] = field(
        default_factory=lambda: ["denoising=1", "kept_states=1"],
        metadata={
            "help": f"The terms of the loss, each as NAME=WEIGHT: {', '.join(TERMS)}, or the name of a recipe "
            "in train/recipes."
        },
    )

    resolution: int = field(
        default=0,
        metadata={"help": "The side length of the images in pixels. 0, the default, uses the model's own size."},
    )
    aspect_ratio_buckets: bool = field(
        default=False,
        metadata={
            "help": "Whether to crop each image to the nearest of several aspect ratios of about equal area, "
            "instead of to a square."
        },
    )
    cache_dir: Path | None = field(
        default=None,
        metadata={"help": "The folder for cached latents and trajectories. The default is cache/ in --output_dir."},
    )
    empty_captions: float = field(
        default=0.1, metadata={"help": "The share of captions that are replaced with empty strings."}
    )
    padded_batches: float = field(
        default=0.5,
        metadata={
            "help": "The share of batches that are padded to the encoder's full length. The others end at "
            "their longest caption."
        },
    )
    length_bucketing: bool = field(
        default=False, metadata={"help": "Whether to put captions of similar length into the same batch."}
    )
    kept_every: int = field(
        default=4,
        metadata={
            "help": "The number of examples for each short prompt of kept_states and kept_predictions. 4 gives "
            "every fourth example a short prompt."
        },
    )
    kept_data: str | None = field(
        default=None,
        metadata={
            "help": "The data with the captions for kept_states and kept_predictions, in any format of "
            "--train_data or as a text file. The stock encoder should understand these captions. The "
            "default is the training captions."
        },
    )
    restated_data: str | None = field(
        default=None,
        metadata={
            "help": "The data with other captions of the training images, in the same order and in any format "
            "of --train_data. restated_predictions and restated_attention read them with --restated_finelip, "
            "which should understand them."
        },
    )
    restated_finelip: str | None = field(
        default=None,
        metadata={
            "help": "The long encoder that reads --restated_data and that the probe of stated_facts is fitted to. "
            "The default is the encoder as it was before training."
        },
    )
    timestep_sampling: str = field(
        default="uniform", metadata={"help": "The distribution of the timesteps: uniform or high_noise."}
    )
    min_snr_gamma: float | None = field(
        default=None,
        metadata={"help": "The gamma of min-SNR loss weighting, 5 in its paper. The default is no weighting."},
    )
    teacher: str = field(
        default="segment",
        metadata={
            "help": "How the teacher reads prompts: segment, chunk, or the long encoder's share in a blend, "
            "such as 0.5."
        },
    )
    teacher_data: str | None = field(
        default=None,
        metadata={
            "help": "The data with the prompts for teacher_predictions, in any format of --train_data or as a "
            "text file with one prompt per line. The default is the training captions."
        },
    )
    num_teacher_prompts: int = field(
        default=4000, metadata={"help": "The maximum number of prompts that the teacher draws."}
    )
    teacher_points: int = field(default=4, metadata={"help": "The number of points that are kept of each trajectory."})
    retrieval_model: str | None = field(
        default=None,
        metadata={
            "help": "The CLIP with which a recipe compares images and captions: a folder, a hub id or a file. "
            "The default is finelip_model in the folder of --finelip, or the bundled CLIP for the "
            "bundled model."
        },
    )
    recipe_batch_size: int = field(
        default=32, metadata={"help": "The number of pairs per batch for a recipe, for each process."}
    )

    train_batch_size: int = field(default=16, metadata={"help": "The number of examples per batch, for each process."})
    learning_rate: float = field(default=1e-5, metadata={"help": "The learning rate of the encoder."})
    unet_learning_rate: float = field(default=1e-4, metadata={"help": "The learning rate of the UNet's LoRA."})
    lr_warmup_steps: int = field(
        default=100, metadata={"help": "The number of updates for the warmup of the learning rate."}
    )
    adam_weight_decay: float = field(
        default=0.01, metadata={"help": "The weight decay of AdamW. It does not apply to positions."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "The maximum gradient norm. 0 turns clipping off."})
    ema_decay: float = field(
        default=0.999,
        metadata={
            "help": "The decay of the averaged weights (EMA), which are the ones that are saved. 0 turns "
            "averaging off."
        },
    )

    validation_prompts: Path | None = field(
        default=None,
        metadata={
            "help": "The path of a text file with the prompts to draw, one per line. The default is held-out scenes."
        },
    )
    num_validation_prompts: int = field(
        default=8, metadata={"help": "The number of prompts to draw in each validation. 0 turns validation off."}
    )
    validation_batch_size: int = field(default=16, metadata={"help": "The number of prompts to draw at a time."})
    validation_steps: int = field(default=500, metadata={"help": "The number of updates between validations."})
    validation_inference_steps: int = field(
        default=30, metadata={"help": "The number of denoising steps for validation and for the teacher."}
    )
    validation_guidance_scale: float = field(
        default=7.5, metadata={"help": "The guidance scale for validation and for the teacher."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(train_batch_size=1, validation_steps=1, num_validation_prompts=0, resolution=0, kept_every=1,
                      min_snr_gamma=0, validation_inference_steps=1, learning_rate=0, unet_learning_rate=0,
                      lora_rank=1, unet_lora_rank=1, teacher_points=1, num_teacher_prompts=1, recipe_batch_size=2,
                      validation_batch_size=1, max_grad_norm=0)  # fmt: skip
        for name in ("empty_captions", "padded_batches", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, but a share lies in 0..1.")
        for name, known in (("train", STAGES), ("encoders", PLACES)):
            given = getattr(self, name)
            if given is not None and (not given or set(given) - set(known) or len(set(given)) < len(given)):
                raise ValueError(f"--{name} is {' '.join(given)}: choose among {', '.join(known)}, each once.")
        if any(reads(self.weights(stage), "restated") for stage in self.train) != bool(self.restated_data):
            raise ValueError(
                "--restated_data and a term restated_predictions or restated_attention need each other: give both, "
                "or none."
            )
        if self.restated_finelip and not any(reads(self.weights(each), "restated", "facts") for each in self.train):
            raise ValueError(
                "--restated_finelip is for restated_predictions, restated_attention and stated_facts, and --terms has "
                "none of them: leave it out."
            )
        self.teacher_settings  # noqa: B018  # refuses what is unknown before anything is loaded
        for stage in self.train:
            if not self.weights(stage):
                raise ValueError(
                    f"--terms {' '.join(self.terms)} has nothing that trains {stage}: give "
                    f"{', '.join(sorted(set(TERMS) - OF_STATES))}."
                )

    def weights(self, stage: str = "text_encoder") -> dict[str, float]:
        """Weights by name of the terms that train something of a stage; 0 leaves a term out.

        Raises:
            ValueError: For a term that is unknown, given twice, or has a weight that is not a number of at least 0.
        """
        found: dict[str, float] = {}
        recipes = sorted(file.stem for file in RECIPES.glob("*.yaml"))
        for term in self.terms:
            name, _, weight = term.partition("=")
            try:
                value = float(weight or 1)
            except ValueError:
                raise ValueError(f"--terms has {term}, but a weight is a number: {name}=1.") from None
            if name not in (*TERMS, *recipes) or not 0 <= value < math.inf or name in found:
                raise ValueError(
                    f"--terms has {term}: choose among {', '.join(TERMS)} and the recipes {', '.join(recipes)}, each "
                    "once, with a weight of at least 0."
                )
            found[name] = value
        if len(found.keys() & set(recipes)) > 1:
            raise ValueError(f"--terms names {len(found.keys() & set(recipes))} recipes: give one of them.")
        if stage == "unet_lora":  # neither states nor embeddings depend on the UNet
            found = {name: weight for name, weight in found.items() if name in set(TERMS) - OF_STATES}
        return {name: weight for name, weight in found.items() if weight}

    @property
    def teacher_settings(self) -> dict[str, Any]:
        """How the teacher's pipeline reads prompts."""
        if self.teacher in ("segment", "chunk"):
            return {"long_prompt": self.teacher}
        try:
            share = float(self.teacher)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise ValueError(f"--teacher is {self.teacher}: give segment, chunk, or a share from 0 to below 1.")
        return {"long_prompt": "stretch", "blend": share}

    @property
    def own_model(self) -> bool:
        """Whether the base is the bundled one."""
        base = self.pretrained_model_name_or_path
        return base is None or Path(base).resolve() == BUNDLED_MODEL.resolve()


# ----------------------------------------------------------------------------------------------------- what is trained


def set_trained(stage: str, parts: Parts, args: Arguments) -> None:
    """Freezes everything but what a stage trains.

    Raises:
        ValueError: If an encoder that was asked for is not there. One sentence.
    """
    parts.unet.requires_grad_(False)
    for place in parts.places.values():
        place.encoder.requires_grad_(False).eval()
    if stage == "unet_lora":
        adapt_unet(parts.unet, args.unet_lora_rank)
        return
    for name in args.encoders or parts.places:
        if name not in parts.places:
            raise ValueError(f"--encoders has {name}, but the base has {' and '.join(parts.places)}.")
        encoder = parts.places[name].encoder.requires_grad_(True).train()
        encoder.get_input_embeddings().requires_grad_(not args.freeze_token_embedding)
        if args.lora_rank is not None:
            adapt_encoder(encoder, args.lora_rank)


@dataclass
class Retrieval:
    """What a recipe needs beside the encoder.

    Attributes:
        step: Of the recipe, whose text tower is the encoder.
        tokenizer, image_processor: Of its batches.
        recipe: Itself.
    """

    step: Any
    tokenizer: Any
    image_processor: Any
    recipe: Recipe


def load_retrieval(name: str, parts: Parts, args: Arguments) -> Retrieval:
    """The CLIP that a recipe compares captions with; its text tower becomes the first encoder.

    Raises:
        ValueError: If there is none, or it does not fit. One sentence.
    """
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    beside = Path(args.finelip) / "finelip_model" if args.finelip else None
    source = args.retrieval_model or (str(beside) if beside is not None and beside.is_dir() else None)
    if source is None and args.own_model:
        source = str(BUNDLED_MODEL / "clip")
    if source is None:
        raise ValueError(f"--terms {name} compares images with captions: give a CLIP as --retrieval_model.")
    place = parts.places["text_encoder"]
    refined = {f"refine_{side}": True if side in recipe.refine else None for side in ("image", "text")}
    model, tokenizer, image_processor = load_clip(source, refinement=recipe.refinement, **refined)
    share_tower(model, place.encoder)
    tokenizer.model_max_length = place.tokenizer.model_max_length
    teacher = load_clip(source)[0]
    share_tower(teacher, place.stock)
    step = retrieval_step(model, recipe, teacher, gather_with_gradients).train()
    return Retrieval(step, tokenizer, image_processor, recipe)


def parameter_groups(
    step: TuningStep, retrieval: Retrieval | None, args: Arguments, factor: float
) -> list[dict[str, Any]]:
    """What is trained, by rate and decay; the position table is not decayed, or its kept rows would shrink."""
    rates = {"encoder": args.learning_rate, "positions": args.learning_rate, "unet": args.unet_learning_rate,
             "heads": 0.0 if retrieval is None else retrieval.recipe.head_learning_rate}  # fmt: skip
    groups: dict[str, dict[str, Any]] = {
        name: {"name": name, "params": [], "lr": rate * factor,
               "weight_decay": 0.0 if name == "positions" else args.adam_weight_decay}
        for name, rate in rates.items()
    }  # fmt: skip
    for name, weight in step.trained.items():
        first = name.split("/")[0]
        kind = "unet" if first == "unet" else "heads" if first == "retrieval" else "encoder"
        groups["positions" if "position_embedding" in name else kind]["params"].append(weight)
    return [group for group in groups.values() if group["params"]]


def memory_of(parts: Parts, groups: list[dict[str, Any]], stage: str, args: Arguments, precision: torch.dtype) -> dict:
    """What a step keeps on a device, in MiB; activations are counted as autograd keeps them, on no device at all.

    Terms of the same captions share a pass; one of `restated_attention` alone is less, and counts as one. A recipe's
    own activations are not counted.
    """
    weights = args.weights(stage)
    passes = reads(weights, "images", "restated") + reads(weights, "teacher")
    rows = args.train_batch_size * passes + -(-args.train_batch_size // args.kept_every) * (
        weights.get("kept_predictions", 0) > 0
    )
    activations = activation_bytes(
        parts, max(1, rows), parts.places["text_encoder"].tokenizer.model_max_length, args.resolution, precision,
        args.gradient_checkpointing, args.lora_rank, args.unet_lora_rank if stage == "unet_lora" else None,
    )  # fmt: skip
    every = [encoder for place in parts.places.values() for encoder in (place.encoder, place.stock, place.start)]
    encoders = [encoder for encoder in every if encoder is not None]
    frozen = sum(weight.numel() for weight in parts.unet.parameters())
    trained = sum(weight.numel() for group in groups for weight in group["params"])
    memory = training_memory(sum(weight.numel() for each in encoders for weight in each.parameters()), trained,
                             activations)  # fmt: skip
    memory["average"] = 4 * trained * (args.ema_decay > 0) / MIB
    memory["frozen UNet"] = frozen * precision.itemsize / MIB
    return memory


def describe_run(stage: str, groups: list[dict[str, Any]], frozen: int, memory: dict[str, float],
                 args: Arguments) -> str:  # fmt: skip
    """What `--dry_run` prints of a stage."""
    terms = ", ".join(f"{name} {weight:g}" for name, weight in args.weights(stage).items())
    lines = [f"train {stage}: {terms}", "", *describe_groups(groups, frozen), "",
             f"memory of a process, {args.train_batch_size} images"]  # fmt: skip
    lines += [f"  {name}: {size:,.0f} MiB" for name, size in memory.items()]
    return "\n".join([*lines, f"  all: {sum(memory.values()):,.0f} MiB"])


# --------------------------------------------------------------------------------------------------------------- data


def open_captions(args: Arguments, source: str) -> CaptionDataset | Prompts:
    """Captioned images, or the prompts of a text file.

    Raises:
        ValueError: If it is neither, or a stream. One sentence.
    """
    if source.endswith(".txt"):
        return Prompts(Path(source))
    dataset = open_dataset(
        source, seed=args.seed, num_scenes=args.num_scenes, image_root=args.image_root,
        image_column=args.image_column, caption_column=args.caption_column,
    )  # fmt: skip
    if not isinstance(dataset, CaptionDataset):
        raise ValueError(f"{source} is a stream, whose latents cannot be kept: unpack the shards into a folder.")
    if isinstance(dataset, ScenesDataset):
        dataset.group_size = 1  # near-duplicates teach a contrastive loss, not this one
    return dataset


def open_restated(args: Arguments, dataset: CaptionDataset) -> CaptionDataset | None:
    """Other captions of the images of a dataset.

    Raises:
        ValueError: If they are of other images. One sentence.
    """
    if args.restated_data is None:
        return None
    world, _, wording = args.restated_data.partition(":")
    if isinstance(dataset, ScenesDataset) and world == "scenes":
        return dataset.retold(wording or "sentences")
    other = open_captions(args, args.restated_data)
    lists = [each for each in (dataset, other) if isinstance(each, RecordDataset)]
    images = [[each.record(index).image_id for index in range(len(each))] for each in lists]
    if len(lists) < 2 or images[0] != images[1]:
        raise ValueError(
            f"--restated_data {args.restated_data} is not of the images of --train_data, in the same order: give a "
            "list that differs from it in its captions alone."
        )
    return lists[1]


def cached_latents(args: Arguments, parts: Parts, dataset: CaptionDataset, accelerator: Accelerator) -> Latents:
    """Latents of the training images, from the cache where they are there; in single precision, as SDXL's must be."""
    sizes = bucket_sizes(args.resolution) if args.aspect_ratio_buckets else [(args.resolution, args.resolution)]
    source = {"data": args.train_data.partition(":")[0] if isinstance(dataset, ScenesDataset) else args.train_data,
              "examples": len(dataset), "first": dataset.name(0), "last": dataset.name(len(dataset) - 1),
              "sizes": sizes}  # fmt: skip
    if isinstance(dataset, ScenesDataset):
        source |= {"seed": args.seed, "arranged": dataset.arranged_share}
    folder = (args.cache_dir or args.output_dir / "cache") / f"latents-{latents_key(parts.vae, **source)}"
    if not folder.exists() and accelerator.is_main_process:
        parts.vae.to(accelerator.device).float()
        write_latents(folder, dataset, parts.vae, sizes, lambda rows: tqdm(rows, desc="latents", mininterval=5))
        parts.vae.to("cpu")
    accelerator.wait_for_everyone()
    return open_latents(folder)


def cached_trajectories(args: Arguments, parts: Parts, accelerator: Accelerator) -> Any:
    """The teacher's trajectories, from the cache where they are there. They are drawn before anything is trained."""
    captions = open_captions(args, args.teacher_data or args.train_data)
    number = min(args.num_teacher_prompts, len(captions))
    prompts = [captions.caption(index, stable_hash("teacher", args.seed, index)) for index in range(number)]
    empty = [stable_hash("empty", args.seed, index) % 1000 < 1000 * args.empty_captions for index in range(number)]
    prompts = ["" if left_out else str(prompt) for left_out, prompt in zip(empty, prompts, strict=True)]
    how: dict[str, Any] = {
        "side": args.resolution, "steps": args.validation_inference_steps, "points": args.teacher_points,
        "guidance_scale": args.validation_guidance_scale, "seed": args.seed,
    }  # fmt: skip
    read_by = [place.stock for place in parts.places.values()]
    if "blend" in args.teacher_settings:
        read_by += [place.encoder for place in parts.places.values()]
    key = stable_hash(*(latents_key(each) for each in (parts.unet, *read_by)), prompts, args.teacher_settings, how)
    folder = (args.cache_dir or args.output_dir / "cache") / f"trajectories-{key:016x}"
    if not folder.exists() and accelerator.is_main_process:
        teacher = make_teacher(parts.pipeline, parts.kind, parts.stock, **args.teacher_settings)
        parts.vae.to(accelerator.device)  # where a pipeline is, its first part says
        with accelerator.autocast():
            write_trajectories(folder, teacher, prompts, batch_size=args.validation_batch_size,
                               progress=lambda batches: tqdm(batches, desc="trajectories", mininterval=5),
                               **how)  # fmt: skip
        parts.vae.to("cpu")
    accelerator.wait_for_everyone()
    return open_trajectories(folder)


@torch.no_grad()
def fitted_probe(args: Arguments, parts: Parts, dataset: CaptionDataset, device: torch.device) -> FactProbe:
    """Reads objects from the states of training captions, by the encoders as they were before training.

    Raises:
        ValueError: If these captions do not say where they state what. One sentence.
    """
    tokenizers = [place.tokenizer for place in parts.places.values()]
    encoders = [place.start or place.encoder for place in parts.places.values()]
    collate = LatentCollator(tokenizers, 0.0, 0, STOCK_LENGTH, facts=True)
    names = ("input_ids", "input_ids_2")[: len(tokenizers)]
    draws = [(index % len(dataset), stable_hash("probe", args.seed, index)) for index in range(NUM_PROBED)]

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, NUM_PROBED, PROBED_AT_ONCE):
            batch = collate([{"caption": dataset.caption(*place), "draw": place[1]}
                             for place in draws[start : start + PROBED_AT_ONCE]])  # fmt: skip
            ids = [batch[name][:, : batch["longest"]].to(device) for name in names]
            yield encode(encoders, ids, parts.is_xl).states, batch["facts"].to(device)

    try:
        return fit_probe(read())
    except ValueError as error:
        raise ValueError(f"--train_data {args.train_data} is not for stated_facts: {error}") from None


def reads(weights: dict[str, float], *needs: str) -> bool:
    """Whether a term that counts reads one of these."""
    return any(weight and name in TERMS and TERMS[name].reads in needs for name, weight in weights.items())


class Batches:
    """The batch of each turn: of images or of a teacher's trajectories, and what other terms need beside it.

    Args:
        args: Of the script.
        weights: Of the terms of the stage.
        parts: Of the pipeline.
        retrieval: What a recipe needs.
        accelerator: Says which process of how many this is.
        first: The turn to begin with.
    """

    def __init__(self, args: Arguments, weights: dict[str, float], parts: Parts, retrieval: Retrieval | None,
                 accelerator: Accelerator, first: int):  # fmt: skip
        self.args, self.accelerator, self.total = args, accelerator, parts.scheduler.config.num_train_timesteps
        tokenizers = [place.tokenizer for place in parts.places.values()]
        keeps = args.kept_every if reads(weights, "kept") else 0
        self.cut_kept = not weights.get("kept_predictions")  # attention is causal: states depend on no padding
        kept: Any = None if args.kept_data is None else open_captions(args, args.kept_data)
        self.main = self.taught = self.pairs = None
        self.skipped: list[Any] = []
        if reads(weights, "images", "restated", "facts"):
            dataset = open_captions(args, args.train_data)
            if isinstance(dataset, Prompts):
                by = next(name for name in weights if reads({name: weights[name]}, "images", "restated", "facts"))
                raise ValueError(
                    f"--train_data {args.train_data} has no images, which {by} needs: leave it out of --terms, and "
                    "give teacher_predictions."
                )
            latents = cached_latents(args, parts, dataset, accelerator)
            self.size, self.skipped = len(latents), latents.skipped
            facts = reads(weights, "facts")
            collator = LatentCollator(tokenizers, args.empty_captions, keeps, STOCK_LENGTH, facts)
            examples = LatentDataset(dataset, latents, kept, open_restated(args, dataset))
            if facts:
                parts.probe = fitted_probe(args, parts, dataset, accelerator.device)
            self.main = self._loader(examples, latents.rows[:, 0], collator, first,
                                     examples.lengths if args.length_bucketing else None)  # fmt: skip
        if reads(weights, "teacher"):
            trajectories = cached_trajectories(args, parts, accelerator)
            points = TrajectoryDataset(trajectories, kept, args.resolution)
            alone = self.main is None
            collator = LatentCollator(tokenizers, 0.0, keeps if alone else 0, STOCK_LENGTH)
            loader = self._loader(points, torch.zeros(len(points)).numpy(), collator, first)
            if alone:
                self.size, self.main = len(points), loader
            else:
                self.taught = loader
        if self.main is None:
            raise ValueError(
                "--terms has none of denoising, restated_predictions, restated_attention, stated_facts and "
                "teacher_predictions, which make the batches."
            )
        if retrieval is not None:
            self.pairs = self._pairs(retrieval, first)

    def _loader(self, dataset: Any, buckets: Any, collator: LatentCollator, first: int,
                lengths: Any = None) -> Iterator[dict[str, Any]]:  # fmt: skip
        sampler = BucketSampler(buckets, self.args.train_batch_size, self.args.seed, self.accelerator.process_index,
                                self.accelerator.num_processes, first, lengths)  # fmt: skip
        return iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=collator,
                               num_workers=self.args.dataloader_num_workers, generator=torch.Generator(),
                               pin_memory=self.accelerator.device.type == "cuda"))  # fmt: skip

    def _pairs(self, retrieval: Retrieval, first: int) -> Iterator[dict[str, Any]]:
        args, recipe = self.args, retrieval.recipe
        dataset = open_dataset(
            args.train_data, seed=args.seed, num_scenes=args.num_scenes, image_root=args.image_root,
            image_column=args.image_column, caption_column=args.caption_column, edits=recipe.num_edits > 0,
            rewrites=recipe.rewrites,
        )  # fmt: skip
        collator = Collator(retrieval.tokenizer, retrieval.image_processor, recipe.captions, recipe.num_sub_captions,
                            recipe.longest_sub_caption, recipe.prompts, retrieval.tokenizer.model_max_length,
                            recipe.num_edits, recipe.edit_place)  # fmt: skip
        return iter(make_loader(
            dataset, collator, args.recipe_batch_size, seed=args.seed, rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes, first_step=first, num_workers=args.dataloader_num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        ))  # fmt: skip

    def next(self, turn: int) -> tuple[dict[str, Any], int]:
        """The batch of a turn on the device, and how many of its captions are longer than the encoders read.

        Noise and timesteps are drawn for the joint batch of all processes, of which each takes its slice.
        """
        assert self.main is not None
        generator = torch.Generator().manual_seed(stable_hash("noise", self.args.seed, turn))
        batch = next(self.main)
        cut = batch["cut"]
        if "latents" in batch:
            latents, rank = batch["latents"], self.accelerator.process_index
            own = slice(rank * len(latents), (rank + 1) * len(latents))
            joint = len(latents) * self.accelerator.num_processes
            batch["noise"] = torch.randn(joint, *latents.shape[1:], generator=generator)[own]
            how: Any = self.args.timestep_sampling
            batch["timesteps"] = sample_timesteps(joint, self.total, how, generator)[own]
        padded = bool(torch.rand((), generator=generator) < self.args.padded_batches)
        self._cut(batch, padded)
        if self.taught is not None:
            batch["taught"] = next(self.taught)
            self._cut(batch["taught"], padded)
        if self.pairs is not None:
            batch["pairs"] = next(self.pairs)
        return self._moved(batch), cut

    def _cut(self, batch: dict[str, Any], padded: bool) -> None:
        """Cuts a batch that is not padded at its longest caption."""
        device = self.accelerator.device
        lengths: dict[str, int | None] = {"kept_ids": None if padded and not self.cut_kept else STOCK_LENGTH}
        for name, longest in {"input_ids": "longest", "restated_ids": "longest_restated"}.items():
            if longest in batch:
                lengths[name] = None if padded else longest_of_all(max(STOCK_LENGTH, batch[longest]), device)
        for name, length in lengths.items():
            for key in (name, f"{name}_2"):
                if key in batch:
                    batch[key] = batch[key][:, :length]

    def _moved(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {
            name: self._moved(value) if isinstance(value, dict)
            else value.to(self.accelerator.device, non_blocking=True)
            for name, value in batch.items() if isinstance(value, Tensor | dict)
        }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- validation


def validate(args: Arguments, parts: Parts, accelerator: Accelerator, update: int, curve: Curve,
             milliseconds: float) -> dict[str, float]:  # fmt: skip
    """Draws held-out prompts with the weights as they are, logs the images, and reads them where they are scenes."""
    prompts = prompts_of(args.validation_prompts, args.num_validation_prompts, args.train_data)
    parts.vae.to(accelerator.device)  # from the CPU, where it waits
    with accelerator.autocast():
        images = draw(parts.pipeline, prompts, args.resolution, args.validation_inference_steps,
                      args.validation_guidance_scale, args.seed, args.validation_batch_size)  # fmt: skip
    pictures = (images[:8].permute(0, 2, 3, 1) * 255).round().byte().numpy()
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": pictures}, update, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": pictures}, update)
    counts = counts_of(prompts, images, parts.places["text_encoder"].tokenizer)
    figures = recall(counts)
    curve.add(update, figures, counts, milliseconds)
    return figures


# -------------------------------------------------------------------------------------------------------------- result


def save_result(args: Arguments, parts: Parts, retrieval: Retrieval | None, curve: Curve, steps: int) -> None:
    """Writes the encoders as stock classes, a LoRA of the UNet, the retrieval model, and the model card."""
    for name, place in parts.places.items():
        mark_trained(place.encoder.config)
        save_text_encoder(place.encoder, place.tokenizer, args.output_dir, subfolder=name, overwrite=True)
    if "unet_lora" in args.train:
        save_unet_lora(parts.pipeline, args.output_dir)
    if retrieval is not None:
        with writing(args.output_dir / "finelip_model") as folder:
            retrieval.step.model.save_pretrained(folder)
            retrieval.tokenizer.save_pretrained(folder)
            retrieval.image_processor.save_pretrained(folder)
            heads = {name: tensor for name, tensor in retrieval.step.state_dict().items()
                     if name.startswith("objective.")}  # fmt: skip
            if heads:
                save_file(heads, folder / HEADS_FILE)
    base = args.pretrained_model_name_or_path or "the bundled model"
    length = parts.places["text_encoder"].encoder.config.max_position_embeddings
    lora = '\npipe.load_lora_weights("THIS FOLDER")' if "unet_lora" in args.train else ""
    kind = parts.kind._stock_class.__name__
    second = ""
    if "text_encoder_2" in parts.places:
        second = ('second = CLIPTextModelWithProjection.from_pretrained("THIS FOLDER", subfolder="text_encoder_2")\n'
                  'tokenizer_2 = CLIPTokenizer.from_pretrained("THIS FOLDER", subfolder="tokenizer_2")\n')  # fmt: skip
    more = ", text_encoder_2=second, tokenizer_2=tokenizer_2" if second else ""
    summary = [
        f"Trained ({', then '.join(args.train)}) by what the UNet of `{base}` predicts: {', '.join(args.terms)}.",
        f"```python\nfrom diffusers import {kind}\n"
        f"from transformers import CLIPTextModel, {'CLIPTextModelWithProjection, ' if second else ''}CLIPTokenizer\n\n"
        'encoder = CLIPTextModel.from_pretrained("THIS FOLDER", subfolder="text_encoder")\n'
        f'tokenizer = CLIPTokenizer.from_pretrained("THIS FOLDER", subfolder="tokenizer")\n{second}'
        f'pipe = {kind}.from_pretrained("BASE", text_encoder=encoder, tokenizer=tokenizer{more}){lora}\n```',
        f"Data: `{args.train_data}`. {steps} updates of {args.train_batch_size} examples a process, seed {args.seed}.",
    ]
    points = [point for point in curve.points if point["figures"]]
    if points:
        names = list(points[-1]["figures"])
        rows = [[f"{point['update']}", *(f"{point['figures'].get(name, math.nan):.3f}" for name in names)]
                for point in points]  # fmt: skip
        table = [f"| {' | '.join(row)} |" for row in [["updates", *names], ["---"] * (1 + len(names)), *rows]]
        summary.append(f"Held-out prompts, {len(points[-1]['counts'])} of them:\n\n" + "\n".join(table))
    title = f"{args.output_dir.name}: a text encoder of {length} tokens, tuned through a UNet"
    figures = curve.points[-1]["figures"] if curve.points else {}
    card = model_card(title, summary, figures, args, "train/finetune_text_to_image.py")
    write_card(args.output_dir, card, args, figures)


# --------------------------------------------------------------------------------------------------------------- main


def main(args: Arguments) -> None:
    logging.basicConfig(level=logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    given = {"revision": args.revision, "config": args.config}
    options = {name: value for name, value in given.items() if value is not None}
    set_seed(args.seed)
    parts = load_parts(args.pretrained_model_name_or_path, args.finelip, **options)
    args = replace(args, resolution=args.resolution or parts.side)
    retrieval: Retrieval | None = None
    result: Tuned | None = None
    for stage in args.train:
        folder = args.output_dir if len(args.train) == 1 else args.output_dir / stage
        result = tune(stage, folder, parts, args)
        retrieval = retrieval or (None if result is None else result.retrieval)
        if args.lora_rank is not None and stage == "text_encoder":
            for place in parts.places.values():
                fuse(place.encoder)
    accelerator = make_accelerator(args)
    if not args.dry_run:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            assert result is not None
            save_result(args, parts, retrieval, result.curve, result.steps)
            if args.push_to_hub:
                upload(args)
    accelerator.end_training()


@dataclass
class Tuned:
    """What a stage leaves beside the weights.

    Attributes:
        retrieval: Of a recipe.
        curve: Its validations.
        steps: Its updates.
    """

    retrieval: Retrieval | None
    curve: Curve
    steps: int


def tune(stage: str, folder: Path, parts: Parts, args: Arguments) -> Tuned | None:
    """Trains one stage, and leaves the parts with its averaged weights; None of a dry run."""
    accelerator = make_accelerator(replace(args, output_dir=folder),
                                   DistributedDataParallelKwargs(find_unused_parameters=True))  # fmt: skip
    set_seed(args.seed)
    weights = args.weights(stage)
    if reads(weights, "restated") or (args.restated_finelip and reads(weights, "facts")):
        keep_start(parts, args.restated_finelip)
    set_trained(stage, parts, args)
    recipe = next((name for name in weights if name not in TERMS), None)
    retrieval = None if recipe is None else load_retrieval(recipe, parts, args)
    step = TuningStep(parts, {name: weight for name, weight in weights.items() if name in TERMS}, args.min_snr_gamma,
                      None if retrieval is None else retrieval.step, weights.get(recipe or "", 0.0))  # fmt: skip
    images = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps  # of an update
    groups = parameter_groups(step, retrieval, args, images if args.scale_lr else 1)
    precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    if args.dry_run:
        memory = memory_of(parts, groups, stage, args, precision)
        frozen = sum(weight.numel() for weight in parts.unet.parameters() if not weight.requires_grad)
        accelerator.print(describe_run(stage, groups, frozen, memory, args))
        return None
    if accelerator.device.type == "cuda":
        there = torch.cuda.mem_get_info(accelerator.device)[0] / MIB
        needed = sum(memory_of(parts, groups, stage, args, precision).values())
        if needed > there:
            accelerator.print(
                f"A step needs about {needed:,.0f} MiB and {there:,.0f} MiB are free: give --gradient_checkpointing "
                "True, a smaller --train_batch_size with --gradient_accumulation_steps, or --mixed_precision bf16."
            )

    checkpoint = find_checkpoint(folder, args.resume_from_checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    prepare_frozen(parts, accelerator.device, precision)
    first = 0 if checkpoint is None else step_of(checkpoint)
    batches = Batches(args, weights, parts, retrieval, accelerator, first * args.gradient_accumulation_steps)
    skips = SkipLog(args.output_dir / "skipped.jsonl", args.max_bad_fraction, batches.size + len(batches.skipped),
                    accelerator.is_main_process)  # fmt: skip
    skips.add(batches.skipped)
    steps = count_updates(args, batches.size, images)

    if args.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
        for place in parts.places.values():
            place.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if retrieval is not None:
        retrieval.step.to(accelerator.device)
        for teacher in filter(None, retrieval.step._teacher):
            teacher.to(accelerator.device)
    trained = [weight for group in groups for weight in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, fused=True)
    schedule = make_schedule(args.lr_scheduler, optimizer, args.lr_warmup_steps, steps)
    wrapped, optimizer = accelerator.prepare(step, optimizer)
    average = EMAModel(trained, decay=args.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    accelerator.register_for_checkpointing(schedule, average)
    if args.report_to != "none":
        settings = {name: value for name, value in args.settings.items() if isinstance(value, str | int | float)}
        accelerator.init_trackers("finetune_text_to_image", settings)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        average.to(accelerator.device)
        accelerator.print(f"Going on from {checkpoint}.")
    curve = Curve(folder / "validation.jsonl", first)

    means, started, spent = Means(), time.perf_counter(), 0.0
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=stage,
               disable=not accelerator.is_main_process, mininterval=2)  # fmt: skip
    for update in bar:
        cut = 0
        for turn in range(args.gradient_accumulation_steps):
            batch, longer = batches.next(update * args.gradient_accumulation_steps + turn)
            cut += longer
            with nullcontext() if turn + 1 == args.gradient_accumulation_steps else accelerator.no_sync(wrapped):
                with accelerator.autocast():
                    terms = wrapped(batch)
                accelerator.backward(torch.stack(list(terms.values())).sum() / args.gradient_accumulation_steps)
            means.add(terms)
        norm = accelerator.clip_grad_norm_(trained, args.max_grad_norm or math.inf)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(trained)

        done = update + 1
        values = means.take(done, lambda terms: accelerator.reduce(terms, "mean"))
        spent, started = spent + time.perf_counter() - started, time.perf_counter()
        speed = (done - first) * images / spent
        bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()} | {"images/s": f"{speed:.0f}"}, False)
        rates = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
        accelerator.log(values | rates | {"images_per_second": speed, "gradient_norm": float(norm),
                                          "captions_cut": cut}, step=done)  # fmt: skip
        if done % args.checkpointing_steps == 0 or done == steps:
            save_checkpoint(accelerator, folder, done, args.checkpoints_total_limit)
        if accelerator.is_main_process and args.num_validation_prompts and done % args.validation_steps == 0:
            if args.ema_decay:
                average.store(trained)
                average.copy_to(trained)
            figures = validate(args, parts, accelerator, done, curve, 1e3 * spent / (done - first))
            if args.ema_decay:
                average.restore(trained)
            accelerator.log({f"validation/{name}": value for name, value in figures.items()}, step=done)
            tqdm.write(f"{done} updates: {figures}")
            started = time.perf_counter()
    if args.ema_decay:
        average.copy_to(trained)
    if accelerator.is_main_process and args.num_validation_prompts and steps % args.validation_steps:
        figures = validate(args, parts, accelerator, steps, curve, 1e3 * spent / max(1, steps - first))
        accelerator.log({f"validation/{name}": value for name, value in figures.items()}, step=steps)
        tqdm.write(f"{steps} updates: {figures}")
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return Tuned(retrieval, curve, steps)


if __name__ == "__main__":
    run_script(main, Arguments, __file__, PRESETS)
