"""Tunes a long text encoder through the frozen UNet of a Stable Diffusion, so that it draws what a caption says.

    accelerate launch train/finetune_text_to_image.py --preset scenes --output_dir runs/tuned

    accelerate launch --config_file train/configs/ddp.yaml train/finetune_text_to_image.py --preset sd15 \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --finelip runs/finelip-l14 \\
        --train_data data/docci --output_dir runs/tuned-sd15

The autoencoder and the UNet stay as they are; the encoder learns from the UNet's own denoising loss on whole captions.
`--output_dir` gets `text_encoder/` and `tokenizer/`, stock classes that a pipeline loads as `finelip=` and that plain
diffusers loads as they are, and a model card with figures.

The batch of a step, its noise and its timesteps are a function of the seed and the step alone, and a checkpoint holds
weights, their average, optimizer, schedule and random states: a run that is killed and resumed ends with the weights
of one that was not. docs/image_tuning.md has the rest.
"""

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from finelip_diffusion.data.datasets import CaptionDataset, ScenesDataset, SkipLog, open_dataset, stable_hash
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
from finelip_diffusion.gathering import longest_of_all
from finelip_diffusion.resuming import find_checkpoint, save_checkpoint, step_of
from finelip_diffusion.runs import (
    Means,
    RunFlags,
    count_updates,
    describe_groups,
    make_accelerator,
    make_schedule,
    model_card,
    run_script,
    training_memory,
    transformer_activations,
    upload,
    write_card,
)
from finelip_diffusion.text_encoder import save_text_encoder
from finelip_diffusion.tuning import TERMS, Parts, TuningStep, load_parts, prepare_frozen
from finelip_diffusion.validation import draw, prompts_of, recall

PRESETS = Path(__file__).parent / "tunings"
STOCK_LENGTH = 77


@dataclass
class Arguments(RunFlags):
    """Names follow diffusers' training examples."""

    preset: str | None = field(
        default=None, metadata={"help": "A name in train/tunings, or a YAML file, of defaults for the other flags."}
    )
    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The Stable Diffusion: folder, hub id or one file. The default is the bundled model."},
    )
    revision: str | None = field(default=None, metadata={"help": "The branch, tag or commit of a hub id."})
    finelip: str | None = field(
        default=None,
        metadata={
            "help": "The long encoder to start from, or stretched for the base's own. The default is the bundled one "
            "for the bundled model, and stretched for others."
        },
    )
    terms: list[str] = field(
        default_factory=lambda: ["denoising=1", "kept_states=1"],
        metadata={"help": "The terms of the loss, NAME=WEIGHT: denoising, kept_states, kept_predictions."},
    )

    resolution: int = field(default=512, metadata={"help": "The side of the images in pixels."})
    aspect_ratio_buckets: bool = field(
        default=False, metadata={"help": "Keep the aspect ratios of images: one bucket for each, of equal area."}
    )
    cache_dir: Path | None = field(
        default=None, metadata={"help": "The folder of cached latents. The default is --output_dir/cache."}
    )
    empty_captions: float = field(default=0.1, metadata={"help": "The share of captions that are left out."})
    padded_batches: float = field(
        default=0.5,
        metadata={"help": "The share of batches padded to the encoder's length. Others end at the longest caption."},
    )
    kept_every: int = field(
        default=4, metadata={"help": "Every so many examples have a short prompt for the terms that keep."}
    )
    kept_data: str | None = field(
        default=None,
        metadata={
            "help": "The data, as for --train_data, whose captions the terms that keep are given: such as the stock "
            "encoder understands. The default is the captions that are trained on."
        },
    )
    timestep_sampling: str = field(default="uniform", metadata={"help": "The timesteps: uniform or high_noise."})
    min_snr_gamma: float | None = field(
        default=None, metadata={"help": "The bound of min-SNR weighting, 5 in its paper. The default does not weight."}
    )

    train_batch_size: int = field(default=16, metadata={"help": "The examples of a batch of one process."})
    learning_rate: float = field(default=1e-5, metadata={"help": "The learning rate of the encoder."})
    lr_warmup_steps: int = field(default=100, metadata={"help": "The updates over which the learning rate rises."})
    adam_weight_decay: float = field(default=0.01, metadata={"help": "The weight decay, of all but positions."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "The norm to clip gradients at. 0 does not clip."})
    ema_decay: float = field(
        default=0.999, metadata={"help": "The decay of the averaged weights, which are saved. 0 does not average."}
    )

    validation_prompts: Path | None = field(
        default=None, metadata={"help": "A text file of prompts to draw, one a line. The default is held-out scenes."}
    )
    num_validation_prompts: int = field(default=8, metadata={"help": "The number of prompts to draw. 0 draws none."})
    validation_steps: int = field(default=500, metadata={"help": "The updates between two validations."})
    validation_inference_steps: int = field(default=30, metadata={"help": "The denoising steps of a validation."})
    validation_guidance_scale: float = field(default=7.5, metadata={"help": "The guidance scale of a validation."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(train_batch_size=1, validation_steps=1, num_validation_prompts=0, resolution=8, kept_every=1,
                      min_snr_gamma=0, validation_inference_steps=1, learning_rate=0)  # fmt: skip
        for name in ("empty_captions", "padded_batches", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, but a share lies in 0..1.")
        self.weights  # noqa: B018  # refuses an unknown term before anything is loaded

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the terms by name."""
        found = {}
        for term in self.terms:
            name, _, weight = term.partition("=")
            try:
                found[name] = float(weight or 1)
            except ValueError:
                raise ValueError(f"--terms has {term}, but a weight is a number: {name}=1.") from None
            if name not in TERMS or found[name] < 0:
                raise ValueError(f"--terms has {term}: choose among {', '.join(TERMS)}, with a weight of at least 0.")
        return found


# ------------------------------------------------------------------------------------------------------------- parts


def parameter_groups(step: TuningStep, args: Arguments, factor: float) -> list[dict[str, Any]]:
    """What is trained; the position table is not decayed, or its kept rows would shrink."""
    named = [(name, weight) for name, weight in step.named_parameters() if weight.requires_grad]
    kept = [weight for name, weight in named if "position_embedding" in name]
    others = [weight for name, weight in named if "position_embedding" not in name]
    rate = args.learning_rate * factor
    return [
        {"name": "encoder", "params": others, "lr": rate, "weight_decay": args.adam_weight_decay},
        {"name": "positions", "params": kept, "lr": rate, "weight_decay": 0.0},
    ]


def open_data(args: Arguments, source: str) -> CaptionDataset:
    """What is trained on, or kept."""
    dataset = open_dataset(
        source, seed=args.seed, num_scenes=args.num_scenes, image_root=args.image_root,
        image_column=args.image_column, caption_column=args.caption_column,
    )  # fmt: skip
    if not isinstance(dataset, CaptionDataset):
        raise ValueError(f"{source} is a stream, whose latents cannot be kept: unpack the shards into a folder.")
    if isinstance(dataset, ScenesDataset):
        dataset.group_size = 1  # near-duplicates teach a contrastive loss, not this one
    return dataset


def cached_latents(args: Arguments, parts: Parts, dataset: CaptionDataset, accelerator: Accelerator) -> Latents:
    """Latents of the training images, from the cache where they are there."""
    sizes = bucket_sizes(args.resolution) if args.aspect_ratio_buckets else [(args.resolution, args.resolution)]
    source = {"data": args.train_data.partition(":")[0] if isinstance(dataset, ScenesDataset) else args.train_data,
              "examples": len(dataset), "first": dataset.name(0), "last": dataset.name(len(dataset) - 1),
              "seed": args.seed if isinstance(dataset, ScenesDataset) else None, "sizes": sizes}  # fmt: skip
    folder = (args.cache_dir or args.output_dir / "cache") / f"latents-{latents_key(parts.vae, **source)}"
    if not folder.exists() and accelerator.is_main_process:
        parts.vae.to(accelerator.device)
        with accelerator.autocast():
            write_latents(folder, dataset, parts.vae, sizes, lambda rows: tqdm(rows, desc="latents", mininterval=5))
        parts.vae.to("cpu")
    accelerator.wait_for_everyone()
    return open_latents(folder)


def draw_noise(args: Arguments, batch: dict[str, Any], turn: int, total: int, accelerator: Accelerator) -> None:
    """Adds the noise and the timesteps of a batch, and cuts or pads its prompts.

    All is drawn for the joint batch of all processes, of which each takes its slice.
    """
    generator = torch.Generator().manual_seed(stable_hash("noise", args.seed, turn))
    latents, rank = batch["latents"], accelerator.process_index
    own = slice(rank * len(latents), (rank + 1) * len(latents))
    joint = len(latents) * accelerator.num_processes
    batch["noise"] = torch.randn(joint, *latents.shape[1:], generator=generator)[own]
    batch["timesteps"] = sample_timesteps(joint, total, args.timestep_sampling, generator)[own]  # type: ignore[arg-type]
    if torch.rand((), generator=generator) >= args.padded_batches:
        longest = longest_of_all(max(STOCK_LENGTH, batch["longest"]), accelerator.device)
        for name in ("input_ids", "input_ids_2"):
            if name in batch:
                batch[name] = batch[name][:, :longest]
        for name in ("kept_ids", "kept_ids_2"):
            if name in batch:
                batch[name] = batch[name][:, :STOCK_LENGTH]


def describe_run(parts: Parts, groups: list[dict[str, Any]], args: Arguments) -> str:
    """What `--dry_run` prints."""
    weights = sum(sum(weight.numel() for weight in place.encoder.parameters()) for place in parts.places.values())
    trained = sum(weight.numel() for group in groups for weight in group["params"])
    frozen = sum(weight.numel() for weight in parts.unet.parameters())
    half = args.mixed_precision in ("fp16", "bf16")
    activations = 0.0
    for place in parts.places.values():
        config = place.encoder.config
        activations += args.train_batch_size * (1 if half else 2) * transformer_activations(
            config.max_position_embeddings, config.hidden_size, config.num_attention_heads, config.num_hidden_layers,
            args.gradient_checkpointing,
        )  # fmt: skip
    memory = training_memory(weights, trained, activations)
    memory["frozen UNet"] = (2 if half else 4) * frozen / 2**20
    lines = ["terms " + ", ".join(f"{name} {weight:g}" for name, weight in args.weights.items()), ""]
    lines += [*describe_groups(groups, frozen), "", f"memory of a process, {args.train_batch_size} images"]
    return "\n".join([*lines, *(f"  {name}: {size:,.0f} MiB" for name, size in memory.items())])


# -------------------------------------------------------------------------------------------------------- validation


def validate(args: Arguments, parts: Parts, accelerator: Accelerator, update: int) -> dict[str, float]:
    """Draws held-out prompts with the weights as they are, logs the images, and reads them where they are scenes."""
    prompts = prompts_of(args.validation_prompts, args.num_validation_prompts, args.train_data)
    with accelerator.autocast():
        images = draw(parts.pipeline, prompts, args.resolution, args.validation_inference_steps,
                      args.validation_guidance_scale, args.seed)  # fmt: skip
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            shown = images[:8]
            tracker.writer.add_images("validation", shown, update)
    return recall(prompts, images, parts.places["text_encoder"].tokenizer)


def save_result(args: Arguments, parts: Parts, figures: dict[str, Any]) -> None:
    """Writes the encoders as stock classes, and the model card."""
    for name, place in parts.places.items():
        save_text_encoder(place.encoder, place.tokenizer, args.output_dir, subfolder=name, overwrite=True)
    base = args.pretrained_model_name_or_path or "the bundled model"
    length = parts.places["text_encoder"].encoder.config.max_position_embeddings
    summary = [
        f"Trained through the frozen UNet of `{base}`, by {', '.join(args.terms)}.",
        "```python\nfrom diffusers import StableDiffusionPipeline\n"
        "from transformers import CLIPTextModel, CLIPTokenizer\n\n"
        'encoder = CLIPTextModel.from_pretrained("THIS FOLDER", subfolder="text_encoder")\n'
        'tokenizer = CLIPTokenizer.from_pretrained("THIS FOLDER", subfolder="tokenizer")\n'
        'pipe = StableDiffusionPipeline.from_pretrained("BASE", text_encoder=encoder, tokenizer=tokenizer)\n```',
        f"Data: `{args.train_data}`. {args.max_train_steps} updates of {args.train_batch_size} images a process, "
        f"seed {args.seed}.",
    ]
    title = f"{args.output_dir.name}: a text encoder of {length} tokens, tuned through a UNet"
    card = model_card(title, summary, figures, args, "train/finetune_text_to_image.py")
    write_card(args.output_dir, card, args, figures)


# --------------------------------------------------------------------------------------------------------------- main


def main(args: Arguments) -> None:
    accelerator = make_accelerator(args)
    logging.basicConfig(level=logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    set_seed(args.seed)
    options = {} if args.revision is None else {"revision": args.revision}
    parts = load_parts(args.pretrained_model_name_or_path, args.finelip, **options)
    for place in parts.places.values():
        place.encoder.requires_grad_(True).train()
    step = TuningStep(parts, args.weights, args.min_snr_gamma)
    joint = args.train_batch_size * accelerator.num_processes
    images = joint * args.gradient_accumulation_steps  # of an update
    groups = parameter_groups(step, args, images if args.scale_lr else 1)
    if args.dry_run:
        accelerator.print(describe_run(parts, groups, args))
        return

    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    dataset = open_data(args, args.train_data)
    kept = None if args.kept_data is None else open_data(args, args.kept_data)
    latents = cached_latents(args, parts, dataset, accelerator)
    skips = SkipLog(args.output_dir / "skipped.jsonl", args.max_bad_fraction, len(latents) + len(latents.skipped),
                    accelerator.is_main_process)  # fmt: skip
    skips.add(latents.skipped)
    steps = count_updates(args, len(latents), images)

    precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    prepare_frozen(parts, accelerator.device, precision)
    if args.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
        for place in parts.places.values():
            place.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [weight for group in groups for weight in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, fused=True)
    schedule = make_schedule(args.lr_scheduler, optimizer, args.lr_warmup_steps, steps)
    wrapped, optimizer = accelerator.prepare(step, optimizer)
    average = EMAModel(trained, decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    accelerator.register_for_checkpointing(schedule, average)
    if args.report_to != "none":
        settings = {name: value for name, value in args.settings.items() if isinstance(value, str | int | float)}
        accelerator.init_trackers("finetune_text_to_image", settings)
    first = 0
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        first = step_of(checkpoint)
        accelerator.print(f"Going on from {checkpoint}.")

    sampler = BucketSampler(latents.rows[:, 0], args.train_batch_size, args.seed, accelerator.process_index,
                            accelerator.num_processes, first * args.gradient_accumulation_steps)  # fmt: skip
    keeps = any(args.weights.get(name) for name in ("kept_states", "kept_predictions"))
    collator = LatentCollator([place.tokenizer for place in parts.places.values()], args.empty_captions,
                              args.kept_every if keeps else 0, STOCK_LENGTH)  # fmt: skip
    loader = iter(DataLoader(LatentDataset(dataset, latents, kept), batch_sampler=sampler, collate_fn=collator,
                             num_workers=args.dataloader_num_workers, generator=torch.Generator(),
                             pin_memory=accelerator.device.type == "cuda"))  # fmt: skip
    total = parts.scheduler.config.num_train_timesteps
    figures: dict[str, Any] = {}
    means, started = Means(), time.perf_counter()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="tuning",
               disable=not accelerator.is_main_process, mininterval=2)  # fmt: skip
    for update in bar:
        for turn in range(args.gradient_accumulation_steps):
            batch = next(loader)
            draw_noise(args, batch, update * args.gradient_accumulation_steps + turn, total, accelerator)
            batch = {name: value.to(accelerator.device) for name, value in batch.items() if isinstance(value, Tensor)}
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
        speed = (done - first) * images / (time.perf_counter() - started)
        bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()} | {"images/s": f"{speed:.0f}"}, False)
        rates = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
        accelerator.log(values | rates | {"images_per_second": speed, "gradient_norm": float(norm)}, step=done)
        if done % args.checkpointing_steps == 0 or done == steps:
            save_checkpoint(accelerator, args.output_dir, done, args.checkpoints_total_limit)
        last = done == steps
        if last and args.ema_decay:
            average.copy_to(trained)
        if accelerator.is_main_process and args.num_validation_prompts and (done % args.validation_steps == 0 or last):
            averaged = bool(args.ema_decay) and not last
            if averaged:
                average.store(trained)
                average.copy_to(trained)
            figures = validate(args, parts, accelerator, done)
            if averaged:
                average.restore(trained)
            accelerator.log({f"validation/{name}": value for name, value in figures.items()}, step=done)
            tqdm.write(f"{done} updates: {figures}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_result(args, parts, figures)
        if args.push_to_hub:
            upload(args)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, Arguments, __file__, PRESETS)
