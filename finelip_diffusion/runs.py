"""What every training script has: its flags, its start, its figures on the way, its model card."""

import argparse
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from safetensors import SafetensorError
from torch import Tensor
from transformers import HfArgumentParser

from .files import writing

MIB = 2**20

logger = logging.getLogger(__name__)


@dataclass
class RunFlags:
    """Flags of every training script; names follow diffusers' training examples."""

    output_dir: Path = field(metadata={"help": "The folder where checkpoints, logs and the result are written."})

    train_data: str = field(
        default="scenes",
        metadata={
            "help": "The training data: scenes, scenes:WORDING, a folder, a JSON or CSV file, tar shards "
            "(for finetune_encoder.py only), or the hub id of a dataset."
        },
    )
    image_root: Path | None = field(
        default=None,
        metadata={"help": "The folder that contains the images of a JSON or CSV file, if they are not beside it."},
    )
    image_column: str | None = field(
        default=None,
        metadata={
            "help": "The name of the field that holds the image. The default is the first of image, file_name, "
            "image_file, image_path and filename that exists."
        },
    )
    caption_column: str | None = field(
        default=None,
        metadata={
            "help": "The name of the field that holds the caption. The default is the first of caption, text, "
            "description, captions and conversations that exists."
        },
    )
    num_scenes: int = field(
        default=40_000, metadata={"help": "The number of images to render for --train_data scenes."}
    )
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "The maximum share of unusable examples. The run stops if there are more."}
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "The number of subprocesses that load the data. 0 loads it in the main process."}
    )

    seed: int = field(
        default=0, metadata={"help": "The random seed for new weights, the order of the data, captions and noise."}
    )
    train_batch_size: int = field(default=64, metadata={"help": "The number of examples per batch, for each process."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "The number of batches whose gradients are averaged for each update."}
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "Whether to recompute activations in the backward pass. It saves memory and takes a third to a "
            "half more time."
        },
    )
    num_train_epochs: int = field(
        default=6, metadata={"help": "The number of training epochs, unless --max_train_steps is given."}
    )
    max_train_steps: int | None = field(
        default=None, metadata={"help": "The total number of updates. It overrides --num_train_epochs."}
    )
    scale_lr: bool = field(
        default=False,
        metadata={
            "help": "Whether to multiply the learning rates by the number of processes, the batch size and the "
            "gradient accumulation steps."
        },
    )
    lr_scheduler: str = field(
        default="cosine", metadata={"help": "The type of learning rate scheduler, by its name in diffusers."}
    )
    adam_beta1: float = field(
        default=0.9, metadata={"help": "The beta1 parameter of AdamW, the decay rate of the first moment."}
    )
    adam_beta2: float = field(
        default=0.999, metadata={"help": "The beta2 parameter of AdamW, the decay rate of the second moment."}
    )
    adam_epsilon: float = field(default=1e-8, metadata={"help": "The epsilon parameter of AdamW."})
    freeze_token_embedding: bool = field(
        default=False, metadata={"help": "Whether to freeze the token embeddings, for encoders that share them."}
    )
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "The precision of autocast: no, fp16 or bf16. The default is the setting of accelerate."},
    )
    allow_tf32: bool = field(
        default=False, metadata={"help": "Whether to allow TF32 matrix products on Ampere and newer GPUs."}
    )

    checkpointing_steps: int = field(default=500, metadata={"help": "The number of updates between checkpoints."})
    checkpoints_total_limit: int | None = field(
        default=None,
        metadata={
            "help": "The maximum number of checkpoints to keep. The oldest are deleted. The default keeps all of them."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "The checkpoint to resume from: a checkpoint folder, or latest for the newest one."},
    )
    report_to: str = field(
        default="tensorboard",
        metadata={"help": "The integration that receives the logs: tensorboard, wandb, comet_ml, all or none."},
    )
    logging_dir: str = field(
        default="logs", metadata={"help": "The name of the folder for the logs, inside --output_dir."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Whether to upload the result to the hub."})
    hub_model_id: str | None = field(
        default=None,
        metadata={"help": "The name of the repository on the hub. The default is the name of --output_dir."},
    )
    hub_token: str | None = field(
        default=None, metadata={"help": "The access token for the hub. The default is the stored token."}
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Whether to print the settings, the parameters and the memory that is needed, and then stop."
        },
    )

    def __post_init__(self) -> None:
        self.at_least(
            gradient_accumulation_steps=1, num_train_epochs=1, max_train_steps=1, checkpointing_steps=1,
            checkpoints_total_limit=1, num_scenes=1,
        )  # fmt: skip
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max_bad_fraction is {self.max_bad_fraction}, but a share lies in 0..1.")

    def at_least(self, **bounds: float) -> None:
        """Refuses flags below their bounds; one that is None is not given."""
        for name, bound in bounds.items():
            if (value := getattr(self, name)) is not None and value < bound:
                raise ValueError(f"--{name} is {value}, but must be at least {bound}.")

    @property
    def settings(self) -> dict[str, Any]:
        """The flags as plain data, for logs and files; without the token."""
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        del plain["hub_token"]
        return plain


def run_script(main: Callable[[Any], None], flags: type, file: str, presets: Path | None = None) -> None:
    """Reads the command line and runs a script; errors that a user can fix end it in one sentence.

    Args:
        main: Gets the flags.
        flags: Their dataclass.
        file: The script's `__file__`.
        presets: Folder of YAML files, where the script has `--preset`.

    Raises:
        SystemExit: With the sentence.
    """
    try:
        parser = HfArgumentParser(flags)
        if presets is not None:
            parser.set_defaults(**read_preset(sys.argv[1:], presets, flags))
        (arguments,) = parser.parse_args_into_dataclasses()
        check_launch()
        main(arguments)
    except (ValueError, OSError, SafetensorError) as error:
        raise SystemExit(f"{Path(file).name}: {error}") from error


def read_preset(words: Sequence[str], folder: Path, flags: type) -> dict[str, Any]:
    """The defaults that `--preset` names; other flags on the command line override them.

    Args:
        words: The command line.
        folder: Of presets by name.
        flags: The dataclass whose fields they may set.

    Raises:
        ValueError: If there is no such preset, or it sets what is not a flag. One sentence.
    """
    import yaml

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    name = parser.parse_known_args(words)[0].preset
    if name is None:
        return {}
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ValueError(f"--preset {name} does not exist: choose among {others}, or give a YAML file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a readable YAML file ({' '.join(str(error).split())}).") from error
    known = {entry.name for entry in fields(flags)} - {"preset", "output_dir"}
    wrong = sorted(set(values) - known) if isinstance(values, dict) else [str(values)]
    if wrong:
        raise ValueError(f"{path} sets {wrong[0]!r}, which is not a flag: --help lists them.")
    return values


def check_launch() -> None:
    """Refuses a launch that starts one process of several.

    `accelerate launch --cpu --num_processes N` does so without MPI (accelerate 1.15): it sets MASTER_ADDR for N > 1,
    but no WORLD_SIZE, and starts a single process.

    Raises:
        ValueError: If so. One sentence, with the command that works.
    """
    several = "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if several and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate launch --cpu started one process of several: use torchrun --nproc_per_node N instead."
        )


def make_accelerator(flags: RunFlags, *handlers: Any) -> Any:
    """Accelerate's `Accelerator` of a run.

    Where there is no accelerator it is asked for the CPU: accelerate 1.15 would take each process of torchrun for one
    that runs alone.

    Args:
        flags: Precision, logging, folders.
        *handlers: Of accelerate, for distributed training.

    Raises:
        ValueError: If there are other processes than those that were launched.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=flags.mixed_precision,
        log_with=None if flags.report_to == "none" else flags.report_to,
        project_config=ProjectConfiguration(str(flags.output_dir), str(flags.output_dir / flags.logging_dir)),
        kwargs_handlers=list(handlers),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}: "
            "use torchrun or accelerate launch."
        )
    return accelerator


# ------------------------------------------------------------------------------------------------------- length, rate


def count_updates(flags: RunFlags, size: int | None, images: int) -> int:
    """The updates of a run.

    Args:
        flags: `max_train_steps`, or else `num_train_epochs`.
        size: Examples of an epoch; None for a stream.
        images: Examples of an update, of all processes.

    Raises:
        ValueError: If neither says where a stream ends.
    """
    if flags.max_train_steps is not None:
        return flags.max_train_steps
    if size is None:
        raise ValueError("a stream has no epochs: give --max_train_steps.")
    return flags.num_train_epochs * max(1, size // images)


def make_schedule(name: str, optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> Any:
    """The learning-rate schedule by diffusers' name; warns if the run ends before the warm-up does.

    Raises:
        ValueError: If the name is not one of diffusers'.
    """
    if warmup >= steps:
        logger.warning(
            "the warm-up of the learning rate takes %d updates and the run %d: it never reaches its full rate "
            "(--lr_warmup_steps).",
            warmup, steps,
        )  # fmt: skip
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


# ------------------------------------------------------------------------------------------------------------ figures


class Means:
    """Means of the terms of the loss over the batches of an update."""

    def __init__(self) -> None:
        self._terms: list[dict[str, Tensor]] = []

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Takes the terms of one batch, scalars, without waiting for the device."""
        self._terms.append({name: value.detach().float() for name, value in terms.items()})

    def take(self, update: int, reduce: Callable[[Tensor], Tensor] = lambda values: values) -> dict[str, float]:
        """Gives the means, and begins anew.

        Args:
            update: The number of the update, for the sentence.
            reduce: Averages a tensor over processes.

        Raises:
            ValueError: If one of the batches has a loss that is not finite; in all processes at once, which `reduce`
                tells of each other.
        """
        names = list(self._terms[0])
        table = torch.stack([torch.stack([terms[name] for name in names]) for terms in self._terms])
        values = dict(zip(names, reduce(table.mean(0)).tolist(), strict=True))
        self._terms.clear()
        if not math.isfinite(sum(values.values())):
            raise ValueError(f"the loss is not finite at update {update}: {values}; try a lower --learning_rate.")
        return values


# ------------------------------------------------------------------------------------------------------------ dry run


def training_memory(weights: int, trained: int, activations: float) -> dict[str, float]:
    """What training keeps on a device, in MiB, with weights and AdamW in single precision.

    Args:
        weights: Parameters, frozen ones included.
        trained: Those that are trained.
        activations: Bytes of activations, a rule of thumb.
    """
    parts = {
        "weights": 4 * weights,
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "activations (about)": activations,
    }
    return {name: size / MIB for name, size in parts.items()}


def transformer_activations(tokens: int, width: int, heads: int, layers: int, checkpointing: bool) -> float:
    """Bytes that a transformer keeps for its backward pass in half precision, of one example.

    A layer keeps about 34 bytes a token and channel, and 5 bytes for each pair of positions and head (arXiv
    2205.05198, section 4.1); a checkpointed one keeps 2 bytes a token and channel.
    """
    layer = 2 * tokens * width if checkpointing else 34 * tokens * width + 5 * heads * tokens**2
    return float(layer * layers)


def describe_groups(groups: Iterable[Mapping[str, Any]], frozen: int) -> list[str]:
    """Lines of `--dry_run`: the optimizer's groups, and how many parameters are frozen."""
    lines = ["parameters"]
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        lines.append(f"  {group['name']}: {count:,}, lr {group['lr']:g}, weight decay {group['weight_decay']:g}")
    return [*lines, f"  frozen: {frozen:,}"]


# ------------------------------------------------------------------------------------------------------------- result


def model_card(title: str, summary: Sequence[str], figures: Mapping[str, Any], flags: RunFlags, script: str) -> str:
    """The model card of what was trained, in Markdown.

    Args:
        title: Its heading.
        summary: Its first paragraphs.
        figures: By name; what is not a number is left out.
        flags: Of the run.
        script: Its path in the repository.
    """
    lines = [
        "---", "library_name: diffusers", "pipeline_tag: text-to-image",
        "tags: [clip, long-text, finelip, text-encoder]", "---", f"# {title}",
    ]  # fmt: skip
    for paragraph in summary:
        lines += ["", paragraph]
    numbers = [f"- {name}: {value:.4g}" for name, value in figures.items() if isinstance(value, int | float)]
    if numbers:
        lines += ["", "## Figures", "", *numbers]
    words = [f"--{name} {_words(value)}" for name, value in flags.settings.items()
             if value is not None and value is not False and name != "resume_from_checkpoint"]  # fmt: skip
    lines += ["", "## Command", "", "```bash", f"accelerate launch {script} {' '.join(words)}", "```", ""]
    return "\n".join(lines)


def _words(value: Any) -> str:
    """A flag's value as a shell takes it."""
    return shlex.join(map(str, value if isinstance(value, list) else [value]))


def write_card(folder: Path, card: str, flags: RunFlags, figures: Mapping[str, Any]) -> None:
    """Writes the model card, `README.md`, and flags and figures, `training.json`."""
    with writing(folder / "README.md") as readme, writing(folder / "training.json") as record:
        readme.write_text(card, encoding="utf-8")
        record.write_text(json.dumps({"settings": flags.settings, "figures": figures}, indent=1), encoding="utf-8")


def upload(flags: RunFlags) -> None:
    """Puts everything but checkpoints and logs on the hub."""
    from huggingface_hub import create_repo, upload_folder

    name = flags.hub_model_id or flags.output_dir.name
    repository = create_repo(name, exist_ok=True, token=flags.hub_token).repo_id
    ignored = ["checkpoint-*", ".writing-*", f"{flags.logging_dir}/*"]
    upload_folder(repo_id=repository, folder_path=flags.output_dir, ignore_patterns=ignored, token=flags.hub_token)
