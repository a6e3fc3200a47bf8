"""Fine-tunes a CLIP on long captions, by a recipe, into a long-text encoder for Stable Diffusion.

    accelerate launch train/finetune_encoder.py --recipe finelip --train_data scenes --output_dir runs/finelip \\
        --train_batch_size 96 --learning_rate 5e-4 --max_train_steps 300 --checkpointing_steps 100

    accelerate launch --config_file train/configs/ddp.yaml train/finetune_encoder.py --recipe finelip \\
        --pretrained_model_name_or_path openai/clip-vit-large-patch14 --train_data data/sharegpt4v.json \\
        --image_root data/images --output_dir runs/finelip-l14 --train_batch_size 64 --mixed_precision bf16

`--output_dir` gets `text_encoder/` and `tokenizer/`, stock classes that a pipeline loads as `finelip=`; the whole
model with its image tower in `finelip_model/`; the recipe as it was resolved; a model card with its figures.

The batch of a step is a function of the seed and the step alone, and a checkpoint holds weights, optimizer, schedule
and random states: a run that is killed and goes on with `--resume_from_checkpoint latest` ends with the weights of one
that was not. docs/training.md has the rest.
"""

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, gather_object, set_seed
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm

from finelip_diffusion.data.batches import Collator, make_loader
from finelip_diffusion.data.datasets import SkipLog, open_dataset
from finelip_diffusion.data.stored import TensorStore, fingerprint
from finelip_diffusion.evaluation import retrieval
from finelip_diffusion.files import writing
from finelip_diffusion.gathering import average_gradients, gather_with_gradients
from finelip_diffusion.heads import HEADS_FILE, OWN_SCORES
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.model import FineLIPConfig, FineLIPModel, load_clip
from finelip_diffusion.objective import IMAGE, TEACHER, Objective, TrainingStep, cached_backward
from finelip_diffusion.recipes import Recipe, read_recipe
from finelip_diffusion.resuming import find_checkpoint, save_checkpoint, step_of
from finelip_diffusion.rotary import mark_trained
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
from finelip_diffusion.sharding import Sharded, ShardedState, clip_norm
from finelip_diffusion.singular_values import VALUES, multiplied_out, train_singular_values
from finelip_diffusion.text_encoder import MAX_LENGTH, save_text_encoder

RECIPES = Path(__file__).parent / "recipes"
BUNDLED_CLIP = BUNDLED_MODEL / "clip"
MAX_LOGIT_SCALE = math.log(100)


@dataclass
class Arguments(RunFlags):
    """Names follow diffusers' training examples. Where a default is none, the recipe decides."""

    recipe: str = field(
        default="finelip", metadata={"help": "The name of a recipe in train/recipes, or the path of a YAML file."}
    )
    pretrained_model_name_or_path: str = field(
        default=str(BUNDLED_CLIP),
        metadata={
            "help": "The CLIP to train: a folder, a hub id or a file. The default is the bundled 77-token CLIP "
            "for scenes."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "The branch, tag or commit of a hub id."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "The number of tokens that the encoder reads. The default is the recipe's, or 248."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "The attention implementation, such as eager or sdpa. The default is eager on a CPU, where "
            "it is faster, and sdpa elsewhere."
        },
    )

    length_bucketing: bool = field(
        default=False, metadata={"help": "Whether to put captions of similar length into the same batch."}
    )
    micro_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "The number of pairs to encode at a time. The gradients are still those of the whole "
            "batch. The default encodes the whole batch at once."
        },
    )
    cache_dir: Path | None = field(
        default=None,
        metadata={
            "help": "The folder where the outputs of a frozen image tower and of a teacher, for images and "
            "prompts, are cached. The default is no cache."
        },
    )
    shard: bool = field(
        default=False, metadata={"help": "Whether to shard weights and optimizer states across the processes (FSDP2)."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "The learning rate of the towers. The default is the recipe's."}
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "The learning rate of the modules that a CLIP does not have, such as the refinement. The "
            "default is the recipe's."
        },
    )
    lr_warmup_steps: int | None = field(
        default=None,
        metadata={"help": "The number of updates for the warmup of the learning rates. The default is the recipe's."},
    )
    loss_warmup_steps: int | None = field(
        default=None,
        metadata={
            "help": "The number of updates over which the loss is scaled from 0 to 1. The default comes from "
            "the recipe's loss_warmup_epochs."
        },
    )
    adam_weight_decay: float | None = field(
        default=None,
        metadata={
            "help": "The weight decay of AdamW. It does not apply to positions, the logit scale and singular "
            "values. The default is the recipe's."
        },
    )
    max_grad_norm: float | None = field(
        default=None,
        metadata={"help": "The maximum gradient norm. 0 turns clipping off. The default is the recipe's."},
    )
    validation_data: str | None = field(
        default=None,
        metadata={
            "help": "The held-out data, in any format of --train_data. The default is a gallery of "
            "near-duplicates if --train_data is scenes, and no validation otherwise."
        },
    )
    validation_split: str = field(
        default="test", metadata={"help": "The split of --validation_data to use, if it has splits."}
    )
    validation_steps: int = field(default=500, metadata={"help": "The number of updates between validations."})
    num_validation_examples: int = field(
        default=512, metadata={"help": "The number of image-caption pairs for validation."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(train_batch_size=2, micro_batch_size=1, validation_steps=1, num_validation_examples=8)


# ------------------------------------------------------------------------------------------------------------- parts


def resolve_recipe(args: Arguments) -> Recipe:
    """The recipe by its name or path, with the flags that were given in place of its own values.

    A length that was not given is the recipe's, in `args`, too.
    """
    path = Path(args.recipe)
    recipe = read_recipe(path if path.suffix in (".yaml", ".yml") else RECIPES / f"{args.recipe}.yaml")
    flags = {
        "learning_rate": args.learning_rate,
        "head_learning_rate": args.head_learning_rate,
        "weight_decay": args.adam_weight_decay,
        "lr_warmup_steps": args.lr_warmup_steps,
        "max_grad_norm": args.max_grad_norm,
        "max_length": args.max_length,
    }
    values: dict[str, Any] = {key: getattr(recipe, key) if flag is None else flag for key, flag in flags.items()}
    args.max_length = values["max_length"] = values["max_length"] or MAX_LENGTH
    return replace(recipe, **values, resolved=recipe.resolved | values)


def build_step(args: Arguments, recipe: Recipe, accelerator: Accelerator) -> tuple[TrainingStep, Any, Any]:
    """Model, objective and teacher as one module; tokenizer; image processor."""
    attention = args.attn_implementation or ("eager" if accelerator.device.type == "cpu" else "sdpa")
    options: dict[str, Any] = {"attn_implementation": attention, "revision": args.revision}
    model, tokenizer, image_processor = load_clip(
        args.pretrained_model_name_or_path,
        max_length=args.max_length,
        position=recipe.position,
        refine_image="image" in recipe.refine,
        refine_text="text" in recipe.refine,
        refinement=recipe.refinement,
        **options,
    )
    if recipe.logit_scale is not None:
        model.clip.logit_scale.data.fill_(math.log(recipe.logit_scale))
    if args.gradient_checkpointing:
        model.clip.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.image_tower == "frozen":
        model.clip.vision_model.requires_grad_(False)
        model.clip.visual_projection.requires_grad_(False)
    if args.freeze_token_embedding:
        model.clip.text_model.get_input_embeddings().requires_grad_(False)
    if recipe.parameters != "full":
        adapt(model, recipe)
    objective = Objective(recipe, model.config.clip_config.projection_dim, model.config.num_refined_tokens)
    teacher = None
    if objective.needs_teacher:
        teacher = load_clip(args.pretrained_model_name_or_path, **options)[0].clip.requires_grad_(False)
        teacher.to(accelerator.device)
    return TrainingStep(model.train(), objective, teacher, gather_with_gradients), tokenizer, image_processor


def adapt(model: FineLIPModel, recipe: Recipe) -> None:
    """Low-rank adapters, or singular values, in every layer of the trained towers; all else but positions and scale is
    frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    frozen = {id(weight) for weight in model.clip.parameters() if not weight.requires_grad}
    targets = [
        name
        for name, module in model.clip.named_modules()
        if name.split(".")[-1] in layers and id(module.weight) not in frozen
    ]
    model.clip.requires_grad_(False)
    if recipe.parameters == "svd":
        train_singular_values(model.clip.get_submodule(name) for name in targets)
    else:
        rank = recipe.lora_rank
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model.clip)
    if positions := getattr(model.clip.text_model.embeddings, "position_embedding", None):
        positions.weight.requires_grad_(True)
    model.clip.logit_scale.requires_grad_(True)


def whole_model(state: dict[str, Tensor], config: FineLIPConfig) -> FineLIPModel:
    """The model of a training step's state, in plain weights: adapters are added, singular values multiplied out."""
    state, weights = multiplied_out(state), {}
    for name, tensor in state.items():
        if name.startswith("model.") and ".lora_" not in name:
            stem = name.removesuffix(".base_layer.weight")
            if f"{stem}.lora_A.default.weight" in state:
                tensor = tensor + state[f"{stem}.lora_B.default.weight"] @ state[f"{stem}.lora_A.default.weight"]
            weights[name.removeprefix("model.").replace(".base_layer", "")] = tensor
    model = FineLIPModel(config)
    model.load_state_dict(weights)
    return model.eval()


def parameter_groups(step: TrainingStep, recipe: Recipe, factor: float) -> list[dict[str, Any]]:
    """What is trained, by rate and decay; the position table is not decayed, or its kept rows would shrink, and
    singular values are not, or layers would."""
    groups: dict[str, dict[str, Any]] = {
        "towers": {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay},
        "positions and scale": {"lr": recipe.learning_rate, "weight_decay": 0.0},
        "heads": {"lr": recipe.head_learning_rate, "weight_decay": recipe.weight_decay},
    }
    for name, group in groups.items():
        group |= {"name": name, "params": [], "lr": group["lr"] * factor}
    for name, parameter in step.named_parameters():
        if parameter.requires_grad:
            kept = name.endswith(("text_model.embeddings.position_embedding.weight", "logit_scale", VALUES))
            key = "positions and scale" if kept else "towers" if name.startswith("model.clip.") else "heads"
            groups[key]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def open_stores(step: TrainingStep, args: Arguments, accelerator: Accelerator) -> dict[str, TensorStore]:
    """What is looked up in --cache_dir, named by the weights, the precision, and what is read.

    Raises:
        ValueError: If the recipe has no frozen tower. One sentence.
    """
    if args.cache_dir is None:
        return {}
    towers = step.frozen_towers()
    if not towers:
        raise ValueError(
            "--cache_dir keeps what frozen towers make, but this recipe trains the image tower and has no teacher: "
            "leave it out."
        )
    how = (accelerator.mixed_precision, *sorted(step.objective.needs & {*IMAGE, *TEACHER}))
    return {
        name: TensorStore(args.cache_dir / f"{name}-{fingerprint(weights, *how)}", accelerator.process_index)
        for name, weights in towers.items()
    }


def memory_estimate(step: TrainingStep, args: Arguments, mixed_precision: str) -> dict[str, float]:
    """What a step keeps on a device, in MiB: exact for weights and optimizer, a rule of thumb for activations."""
    clip = step.model.config.clip_config
    vision = clip.vision_config
    towers = [(clip.text_config, args.max_length), (vision, (vision.image_size // vision.patch_size) ** 2 + 1)]
    activations = (args.micro_batch_size or args.train_batch_size) * sum(
        transformer_activations(
            length, tower.hidden_size, tower.num_attention_heads, tower.num_hidden_layers, args.gradient_checkpointing
        )
        for tower, length in towers
    )
    if mixed_precision == "no":
        activations *= 2
    trained = sum(parameter.numel() for parameter in step.parameters() if parameter.requires_grad)
    return training_memory(sum(parameter.numel() for parameter in step.parameters()), trained, activations)


def describe_run(step: TrainingStep, groups: list[dict[str, Any]], args: Arguments, recipe: Recipe,
                 mixed_precision: str) -> str:  # fmt: skip
    """What `--dry_run` prints."""
    frozen = sum(parameter.numel() for parameter in step.parameters() if not parameter.requires_grad)
    lines = [f"recipe {recipe.name}", yaml.safe_dump(recipe.resolved, sort_keys=False).rstrip(), ""]
    lines += [*describe_groups(groups, frozen), "", f"memory of a process, {args.train_batch_size} pairs"]
    lines += [f"  {name}: {size:,.0f} MiB" for name, size in memory_estimate(step, args, mixed_precision).items()]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- result


def save_result(state: dict[str, Tensor], config: FineLIPConfig, tokenizer: Any, image_processor: Any,
                args: Arguments, recipe: Recipe, steps: int, figures: dict[str, Any]) -> None:  # fmt: skip
    """Writes the encoder as stock classes, the whole model, the recipe and the model card."""
    if (term := recipe.local_loss) is not None and term.name in OWN_SCORES:
        config.score, config.score_settings = term.name, term.settings
    mark_trained(config.clip_config.text_config)
    model = whole_model(state, config)
    save_text_encoder(model.text_encoder(), tokenizer, args.output_dir, overwrite=True)
    with writing(args.output_dir / "finelip_model") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        if heads := {name: tensor for name, tensor in state.items() if name.startswith("objective.")}:
            save_file(heads, folder / HEADS_FILE)
    with writing(args.output_dir / "recipe.yaml") as file:
        file.write_text(yaml.safe_dump(recipe.resolved, sort_keys=False), encoding="utf-8")
    summary = [
        f"Trained by the recipe `{recipe.name}`: {recipe.description.strip()}",
        "```python\nfrom finelip_diffusion import FineLIPStableDiffusionPipeline\n\n"
        'pipe = FineLIPStableDiffusionPipeline.from_pretrained("BASE MODEL", finelip="THIS FOLDER")\n```',
        f"Base: `{args.pretrained_model_name_or_path}`. Data: `{args.train_data}`. {steps} updates of "
        f"{args.train_batch_size} pairs a process, seed {args.seed}.",
    ]
    title = f"{args.output_dir.name}: a CLIP text encoder of {args.max_length} tokens"
    write_card(args.output_dir, model_card(title, summary, figures, args, "train/finetune_encoder.py"), args, figures)


# --------------------------------------------------------------------------------------------------------------- main


def open_data(args: Arguments, recipe: Recipe) -> tuple[Any, Any]:
    """What is trained on, and the held-out examples, or None."""
    columns: dict[str, Any] = {"image_column": args.image_column, "caption_column": args.caption_column}
    dataset = open_dataset(
        args.train_data, seed=args.seed, num_scenes=args.num_scenes, image_root=args.image_root,
        edits=recipe.num_edits > 0, rewrites=recipe.rewrites, **columns,
    )  # fmt: skip
    if args.shard:  # retrieval needs whole weights
        return dataset, None
    if args.validation_data is None and args.train_data.partition(":")[0] == "scenes":
        return dataset, retrieval.scenes_gallery(args.num_validation_examples // 8)
    if args.validation_data is None:
        return dataset, None
    held_out: Any = open_dataset(
        args.validation_data, split=args.validation_split, image_root=args.image_root, **columns
    )
    return dataset, list(islice(held_out, args.num_validation_examples))


def check_sharding(args: Arguments, accelerator: Accelerator) -> None:
    """Refuses what does not go with weights that are shared out over processes.

    Raises:
        ValueError: One sentence.
    """
    if accelerator.distributed_type is DistributedType.FSDP:
        raise ValueError("accelerate is set up for FSDP: launch with train/configs/ddp.yaml and give --shard True.")
    if not args.shard:
        return
    if accelerator.num_processes == 1:
        raise ValueError("--shard shares weights out over processes: start several, torchrun --nproc_per_node N.")
    if args.micro_batch_size is not None or args.validation_data is not None or args.cache_dir is not None:
        raise ValueError(
            "--micro_batch_size, --validation_data and --cache_dir need whole weights: leave them out, or --shard."
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError("--shard trains in bf16 or no mixed precision, not in fp16: choose another.")


def loss_warmup(args: Arguments, recipe: Recipe, size: int | None, images: int, steps: int) -> int:
    """The updates over which the loss rises: of an epoch, as the recipe says, unless the flag says otherwise."""
    if args.loss_warmup_steps is not None:
        return args.loss_warmup_steps
    epoch = steps if size is None else size // images
    return round(recipe.loss_warmup_epochs * min(epoch, steps))


def backward(step: TrainingStep, wrapped: nn.Module | Sharded, batch: dict[str, Tensor], micro_batch_size: int | None,
             accelerator: Accelerator, factor: float, last: bool) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of one batch, times `factor`; processes share them with the last batch of an update."""
    if micro_batch_size is not None:
        with accelerator.autocast():
            terms = cached_backward(step, batch, micro_batch_size, accelerator.backward, factor)
        if last:
            average_gradients(step.parameters())
        return terms
    if isinstance(wrapped, Sharded):
        with accelerator.autocast():
            terms = wrapped.step(batch)
        wrapped.backward(factor * torch.stack(list(terms.values())).sum(), last)
        return {name: value.detach() for name, value in terms.items()}
    with nullcontext() if last else accelerator.no_sync(wrapped):
        with accelerator.autocast():
            terms = wrapped(batch)
        accelerator.backward(factor * torch.stack(list(terms.values())).sum())
    return {name: value.detach() for name, value in terms.items()}


def validate(step: TrainingStep, tokenizer: Any, image_processor: Any, examples: Any, args: Arguments) -> dict:
    """Retrieval on the validation set, with the weights as they are: figures by name."""
    step.model.eval()
    gallery = retrieval.embed_gallery(step.model, tokenizer, image_processor, examples, args.train_batch_size)
    step.model.train()
    figures = retrieval.evaluate(gallery, device=step.model.device)["figures"]
    return {name: figure["value"] for name, figure in figures.items() if figure["value"] is not None}


def main(args: Arguments) -> None:
    recipe = resolve_recipe(args)
    accelerator = make_accelerator(args, DistributedDataParallelKwargs(find_unused_parameters=True))
    logging.basicConfig(level=logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    set_seed(args.seed)
    step, tokenizer, image_processor = build_step(args, recipe, accelerator)
    joint = args.train_batch_size * accelerator.num_processes
    images = joint * args.gradient_accumulation_steps  # of an update
    factor = images if args.scale_lr else 1
    if args.dry_run:
        groups = parameter_groups(step, recipe, factor)
        accelerator.print(describe_run(step, groups, args, recipe, accelerator.mixed_precision))
        return

    check_sharding(args, accelerator)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    dataset, examples = open_data(args, recipe)
    collator = Collator(tokenizer, image_processor, recipe.captions, recipe.num_sub_captions,
                        recipe.longest_sub_caption, recipe.prompts, recipe.max_length or MAX_LENGTH,
                        recipe.num_edits, recipe.edit_place, keyed=args.cache_dir is not None)  # fmt: skip
    step.stores = open_stores(step, args, accelerator)
    size = None if isinstance(dataset, IterableDataset) else len(dataset)
    steps = count_updates(args, size, images)
    rise = loss_warmup(args, recipe, size, images, steps)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    total = None if size is None else size + len(dataset.skipped)
    skips = SkipLog(args.output_dir / "skipped.jsonl", args.max_bad_fraction, total, accelerator.is_main_process)
    skips.add(dataset.skipped)

    wrapped: Any = Sharded(step.to(accelerator.device)) if args.shard else step
    betas = args.adam_beta1, args.adam_beta2
    optimizer = torch.optim.AdamW(parameter_groups(step, recipe, factor), betas=betas, eps=args.adam_epsilon,
                                  fused=True)  # fmt: skip
    schedule = make_schedule(args.lr_scheduler, optimizer, recipe.lr_warmup_steps, steps)
    if args.shard:
        accelerator.register_for_checkpointing(ShardedState(step, optimizer))
    else:
        wrapped, optimizer = accelerator.prepare(step, optimizer)
    accelerator.register_for_checkpointing(schedule)
    if args.report_to != "none":
        settings = {name: value for name, value in args.settings.items() if value is not None}
        accelerator.init_trackers("finetune_encoder", settings)
    first = 0
    if checkpoint is not None:
        if args.shard == (checkpoint / "model.safetensors").is_file():
            raise ValueError(
                f"{checkpoint} was written {'without' if args.shard else 'with'} --shard: go on as it was."
            )
        accelerator.load_state(str(checkpoint))
        first = step_of(checkpoint)
        accelerator.print(f"Going on from {checkpoint}.")

    loader = iter(make_loader(
        dataset, collator, args.train_batch_size, seed=args.seed, rank=accelerator.process_index,
        world_size=accelerator.num_processes, first_step=first * args.gradient_accumulation_steps,
        num_workers=args.dataloader_num_workers, bucket_by_length=args.length_bucketing,
        pin_memory=accelerator.device.type == "cuda",
        rising_steps=round(recipe.length_curriculum * steps * args.gradient_accumulation_steps),
    ))  # fmt: skip
    figures: dict[str, Any] = {}
    means = Means()
    started = time.perf_counter()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=recipe.name,
               disable=not accelerator.is_main_process, mininterval=2)  # fmt: skip
    for update in bar:
        warm = min(1.0, (update + 1) / rise) if rise else 1.0
        for turn in range(args.gradient_accumulation_steps):
            batch = next(loader)
            seen = (update * args.gradient_accumulation_steps + turn + 1) * joint
            skips.add(gather_object(batch["skipped"]), seen)  # so that all processes stop together
            batch["progress"] = torch.full((args.train_batch_size,), update / max(1, steps - 1))
            batch = {name: value.to(accelerator.device, non_blocking=True)
                     for name, value in batch.items() if isinstance(value, Tensor)}  # fmt: skip
            terms = backward(step, wrapped, batch, args.micro_batch_size, accelerator,
                             warm / args.gradient_accumulation_steps,
                             turn + 1 == args.gradient_accumulation_steps)  # fmt: skip
            means.add(terms)
        clip = clip_norm if args.shard else accelerator.clip_grad_norm_
        norm = clip(step.parameters(), recipe.max_grad_norm or math.inf)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step.model.clip.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)

        done = update + 1
        values = means.take(done, lambda terms: accelerator.reduce(terms, "mean"))
        speed = (done - first) * images / (time.perf_counter() - started)
        bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()} | {"images/s": f"{speed:.0f}"}, False)
        rates = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
        accelerator.log(values | rates | {"images_per_second": speed, "gradient_norm": float(norm)}, step=done)
        if done % args.checkpointing_steps == 0 or done == steps:
            save_checkpoint(accelerator, args.output_dir, done, args.checkpoints_total_limit)
            for store in step.stores.values():
                store.flush()
        if examples is not None and done % args.validation_steps == 0 and done < steps:
            if accelerator.is_main_process:
                figures = validate(step, tokenizer, image_processor, examples, args)
            accelerator.log({f"validation/{name}": value for name, value in figures.items()}, step=done)
    if examples is not None and accelerator.is_main_process:
        figures = validate(step, tokenizer, image_processor, examples, args)
        accelerator.log({f"validation/{name}": value for name, value in figures.items()}, step=steps)
    accelerator.wait_for_everyone()
    state = wrapped.weights() if args.shard else accelerator.get_state_dict(wrapped)
    if accelerator.is_main_process:
        save_result(state, step.model.config, tokenizer, image_processor, args, recipe, steps, figures)
        if args.push_to_hub:
            upload(args)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, Arguments, __file__)
