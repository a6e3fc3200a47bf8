"""Draws the same prompts under several text encoders, and measures what the images gain, what they lose, how surely.

    python train/evaluate_fid.py --config train/configs/scenes.yaml --num_prompts 100 --output_dir runs/t2i
    accelerate launch train/evaluate_fid.py --config train/configs/sd15.yaml --data data/docci \\
        --encoders truncate chunk untrained runs/finelip-l14 --output_dir runs/sd15
    python train/evaluate_fid.py --config train/configs/sd15.yaml --data dpg:ELLA/dpg_bench --images_per_prompt 4 \\
        --vqa Qwen/Qwen3-VL-8B-Instruct --output_dir runs/dpg

Every condition draws a prompt from the same noise, whatever the batch size and the number of processes. Images are
kept with their prompt, seed and settings inside; started again, the script draws what is missing.
`OUTPUT_DIR/report.html` is the page to look at, `report.md` its tables, `report.json` everything; docs/evaluation.md
says what the figures mean.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm
from transformers import CLIPTokenizer, HfArgumentParser

from finelip_diffusion.data.datasets import SkipLog, open_dataset
from finelip_diffusion.evaluation.adherence import (
    Judge,
    change_ending,
    change_scene,
    load_judge,
    prediction_drift,
    sentences_of,
)
from finelip_diffusion.evaluation.comparison import Eye, Panel, compare, firsts, reference_file
from finelip_diffusion.evaluation.features import load_extractor
from finelip_diffusion.evaluation.images import (
    BASELINE,
    STRATEGIES,
    Condition,
    Noise,
    Prompt,
    Settings,
    batches,
    draw,
    drawn_with,
    fingerprint,
    is_drawn,
    load_pipeline,
    load_refiner,
    located,
    named,
    read_conditions,
    save_image,
)
from finelip_diffusion.evaluation.judging import Asked, Kept, Sheet, Values, ask, sheet_of
from finelip_diffusion.evaluation.preferences import PREFERENCES, load_preference
from finelip_diffusion.evaluation.promptsets import (
    GRID,
    PROMPT_SETS,
    Item,
    read_dpg,
    read_set,
    split_source,
    write_pictures,
)
from finelip_diffusion.evaluation.questions import scene_questions
from finelip_diffusion.evaluation.references import REFERENCES, Autoencoder, load_autoencoder, with_wrong_facts
from finelip_diffusion.evaluation.report import SHOWN_AS_PIXELS, write_report
from finelip_diffusion.evaluation.vision import VisionJudge, load_vision_judge
from finelip_diffusion.files import writing
from finelip_diffusion.metrics import state_drift
from finelip_diffusion.runs import check_launch
from finelip_diffusion.scenes import STOCK_CONTENT_TOKENS, describe, render, sample_scene, stock_border, telling

FEW, MANY = (1, 3), (4, 9)  # objects in a short and in a long prompt of scenes
THUMBNAIL = 512  # pixels, the longer side of a reference image on the page


@dataclass
class Arguments(Settings):
    """A value on the command line goes before the one in the configuration."""

    output_dir: Path = field(
        default=Path("runs/evaluation"),
        metadata={"help": "The folder where images, features and reports are written."},
    )
    config: Path | None = field(
        default=None,
        metadata={"help": "The path of a YAML file with values for these flags, such as those in train/configs."},
    )
    encoders: list[str] = field(
        default_factory=lambda: [*STRATEGIES, "finelip"],
        metadata={
            "help": f"The text encoders: {', '.join(STRATEGIES)}, finelip (the model's own finelip/), or "
            "[NAME=]SOURCE for a long text encoder, whose source is a folder, a hub id or a "
            "checkpoint. finelip@0.5 and SOURCE@0.5 blend in the stock encoder."
        },
    )
    unets: list[str] = field(
        default_factory=lambda: ["base"],
        metadata={
            "help": "The UNets: base, adapted (the model's own finelip/unet), or [NAME=]FOLDER for a folder "
            "that contains unet/."
        },
    )
    data: str = field(
        default="scenes",
        metadata={
            "help": "The prompts and reference images: scenes[:WORDING] or any dataset. Or prompts alone, as "
            f"published: {', '.join(f'{name}:FOLDER' for name in PROMPT_SETS)}."
        },
    )
    split: str = field(default="test", metadata={"help": "The split of the data to use, if it has splits."})
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
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "The maximum share of unusable examples. The run stops if there are more."}
    )
    num_prompts: int = field(
        default=1000,
        metadata={"help": "The number of prompts, from the start of the data, with one for each reference image."},
    )
    num_short: int = field(
        default=200,
        metadata={"help": "The maximum number of short prompts, which show what is lost. 0 leaves them out."},
    )
    num_changed: int = field(
        default=100, metadata={"help": "The number of prompts to draw again with one thing after token 77 changed."}
    )
    num_drift: int = field(default=32, metadata={"help": "The number of short prompts on which drift is measured."})
    batch_size: int = field(default=8, metadata={"help": "The number of images per batch. It only affects speed."})
    features: list[str] = field(
        default_factory=lambda: ["effnet_fd"],
        metadata={
            "help": "The image features for the distances, each as NAME[=WEIGHTS]: effnet_fd, fid, clip_fd, "
            "dinov2_fd or cmmd. See docs/metrics.md."
        },
    )
    judges: list[str] = field(
        default_factory=list,
        metadata={"help": "The CLIPs that score the images, each as [NAME=]SOURCE, with any text length."},
    )
    vqa: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The vision-language models of transformers that answer questions about the images, each "
            "as [NAME=]SOURCE[@REVISION]. They are asked the questions of the prompts, and whether the "
            "images show the prompts."
        },
    )
    vqa_batch_size: int = field(
        default=8, metadata={"help": "The number of questions per batch. It only affects speed."}
    )
    preferences: list[str] = field(
        default_factory=list,
        metadata={"help": f"The models of human preference, each as NAME[=WEIGHTS]: {', '.join(PREFERENCES)}."},
    )
    images_per_prompt: int = field(
        default=1,
        metadata={
            "help": "The number of images per prompt of a prompt set. DPG-Bench has 4, which go into one file, "
            "two by two."
        },
    )
    official_layout: bool = field(
        default=True,
        metadata={
            "help": "Whether to also write the images of a prompt set where the set's own script looks for them."
        },
    )
    dpg_quirks: bool = field(
        default=False,
        metadata={
            "help": "Whether to count as DPG-Bench's own script does, including its oversights. Only for DPG-Bench."
        },
    )
    reference: list[str] = field(
        default_factory=lambda: list(REFERENCES),
        metadata={
            "help": "The images that distances are measured to: original for the reference images as they are, "
            "reconstructed for the same images after the model's autoencoder, which everything that "
            "the model draws has passed through."
        },
    )
    ladder: list[int] = field(
        default_factory=list,
        metadata={
            "help": "The numbers of wrong facts, such as 1 2 4, in rendered scenes whose distances serve as a "
            "yardstick. Only for scenes."
        },
    )
    kid_subset_size: int = field(
        default=1000,
        metadata={"help": "The number of images in a subset for the kernel distance, at most half of all images."},
    )
    num_resamples: int = field(
        default=100, metadata={"help": "The number of bootstrap resamples for Frechet distances and CMMD."}
    )
    num_examples: int = field(
        default=4, metadata={"help": "The number of prompts of each kind on the page: best, worst, first and changed."}
    )

    def __post_init__(self) -> None:
        least = {"num_prompts": 2, "num_short": 0, "num_changed": 0, "num_drift": 0, "num_inference_steps": 1,
                 "batch_size": 1, "kid_subset_size": 2, "num_resamples": 2, "num_examples": 0, "seed": 0,
                 "images_per_prompt": 1, "vqa_batch_size": 1}  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be at least {bound}.")
        if self.prompt_set is not None:
            self.features, self.reference = [], []  # there is nothing to compare with
        if self.images_per_prompt > 1 and (self.prompt_set is None or self.noise == "in_order"):
            raise ValueError(
                "--images_per_prompt is for --data NAME:FOLDER of a set of prompts, with --noise per_prompt."
            )
        if (
            self.images_per_prompt not in (1, GRID)
            and self.prompt_set is not None
            and PROMPT_SETS[self.prompt_set[0]].grid
        ):
            raise ValueError(
                f"--images_per_prompt is {self.images_per_prompt}: give 1, or {GRID} for a grid two by two."
            )
        if self.dpg_quirks and (self.prompt_set is None or self.prompt_set[0] != "dpg"):
            raise ValueError("--dpg_quirks is for --data dpg:FOLDER alone.")
        if (not self.reference and self.prompt_set is None) or set(self.reference) - set(REFERENCES):
            raise ValueError(f"--reference is {' '.join(self.reference)}: give {' or '.join(REFERENCES)}, or both.")
        if self.ladder and (self.data != "scenes" or not 1 <= min(self.ladder) <= max(self.ladder) <= MANY[0]):
            raise ValueError(f"--ladder is of scenes, and of 1 to {MANY[0]} wrong facts.")
        if BASELINE not in self.encoders:
            raise ValueError(f"--encoders lack {BASELINE}, with which all the others are compared: add it.")
        if self.wording not in ("", "sentences") and self.num_changed:
            raise ValueError(f"--data {self.data} has no near-duplicates told alike: set --num_changed 0.")
        if self.noise == "in_order" and self.num_changed:
            raise ValueError("--noise in_order has no second image from the same noise: set --num_changed 0.")

    @property
    def prompt_set(self) -> tuple[str, str] | None:
        """Name and folder of a set of prompts; None for other data."""
        return split_source(self.data)

    @property
    def wording(self) -> str:
        """How scenes are told; empty for other data."""
        world, _, wording = self.data.partition(":")
        return (wording or "sentences") if world == "scenes" else ""


def read_arguments(argv: Sequence[str]) -> Arguments:
    """Flags, with the configuration's values in the place of the defaults.

    Raises:
        ValueError: If the configuration cannot be read or has an unknown key, or a value is out of bounds.
    """
    parser = HfArgumentParser(Arguments)
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path)
    file = first.parse_known_args(argv)[0].config
    if file is not None:
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"--config {file} cannot be read ({' '.join(str(error).split())}).") from error
        names = [entry.name for entry in fields(Arguments)]
        if not isinstance(values, dict):
            raise ValueError(f"--config {file} holds no `flag: value`.")
        if unknown := sorted(values.keys() - set(names), key=str):
            raise ValueError(f"--config {file} has the unknown key {unknown[0]!r}: choose among {', '.join(names)}.")
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(argv)[0]


# ------------------------------------------------------------------------------------------------------------ prompts


def references(args: Arguments, log: SkipLog) -> Iterator[tuple[str, str, Image.Image]]:
    """Caption, name and image of each example that can be used, in the order of the data; one caption an image."""
    if args.wording:
        for index in range(args.num_prompts):
            prompt = scene_prompt("long", index, args)
            assert prompt.scene is not None
            yield str(prompt.text), prompt.name, render(prompt.scene)
        return
    dataset: Any = open_dataset(
        args.data,
        split=args.split,
        image_root=args.image_root,
        image_column=args.image_column,
        caption_column=args.caption_column,
        seed=args.seed,
    )
    stream = isinstance(dataset, IterableDataset)
    if not stream:
        log.total = len(dataset) + len(dataset.skipped)
        log.add(dataset.skipped)
    seen: set[str] = set()
    examples = dataset.examples(0, 1) if stream else (dataset[index] for index in range(len(dataset)))
    for number, example in enumerate(examples):
        log.add(example.skipped, number + 1)
        if not example.skipped and example.image_id not in seen:  # it stands in for another, and has its own place
            seen.add(example.image_id)
            yield example.caption, example.name, example.image
        if len(seen) == args.num_prompts or (stream and number > 10 * args.num_prompts):  # it has begun anew
            return


def scene_prompt(kind: str, index: int, args: Arguments) -> Prompt:
    """A prompt of scenes."""
    seed = args.seed + index
    scene = sample_scene(seed, args.split, MANY if kind == "long" else FEW)
    caption = describe(scene, seed, **telling(args.wording))
    return Prompt(kind, index, caption, f"scenes:{args.split}:{seed}", scene, questions=scene_questions(caption))


def set_items(args: Arguments) -> list[Item]:
    """The prompts of a set."""
    assert args.prompt_set is not None
    name, source = args.prompt_set
    return read_dpg(Path(source), quirks=True) if args.dpg_quirks else read_set(name, source)


def set_prompts(items: Sequence[Item], kind: str, args: Arguments) -> list[Prompt]:
    """Prompts of a set, the images of one side by side."""
    return [
        Prompt(kind, index, item.text if kind == "long" else item.short, item.name, questions=item.questions,
               category=item.category, copy=copy)
        for index, item in enumerate(items[: args.num_prompts])
        for copy in range(args.images_per_prompt)
    ]  # fmt: skip


def variants(
    images: list[Image.Image], first: int, args: Arguments, autoencoder: Autoencoder
) -> Iterator[tuple[str, list[Image.Image]]]:
    """What is looked at of a batch of references, by name: themselves, reconstructed, and with facts wrong."""
    yield "reference", images
    yield "reconstructed", autoencoder(images)
    for number in args.ladder:
        scenes = [scene_prompt("long", first + place, args).scene for place in range(len(images))]
        wrong = [
            render(with_wrong_facts(scene, number, args.seed + first + place))
            for place, scene in enumerate(scenes)
            if scene is not None
        ]
        yield f"wrong_{number}", wrong
        yield f"wrong_{number}/reconstructed", autoencoder(wrong)


def read_references(args: Arguments, eyes: dict[str, Eye], autoencoder: Autoencoder) -> list[Prompt]:
    """The long prompts. Decodes every reference image once, before anything is drawn, and keeps what is seen of it.

    Raises:
        ValueError: If there are fewer than two, or too many cannot be used.
    """
    file = args.output_dir / "prompts.json"
    asked = [args.num_prompts, autoencoder.weights]
    caches = reference_caches(args, eyes)
    saved: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"asked": None}
    if saved["asked"] != asked or not all(cache.exists() for cache in caches.values()):
        log = SkipLog(args.output_dir / "skipped.jsonl", args.max_bad_fraction)
        rows: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key in caches}
        saved = {"asked": asked, "prompts": []}
        examples = iter(tqdm(references(args, log), "references", args.num_prompts, unit="image", mininterval=2))
        while batch := list(islice(examples, 32)):
            images = [image.convert("RGB") for _, _, image in batch]
            for which, some in variants(images, len(saved["prompts"]), args, autoencoder):
                for name, eye in eyes.items():
                    if (name, which) in rows:
                        rows[name, which].append(look(eye, some))
            for text, name, image in batch:
                image.thumbnail((THUMBNAIL, THUMBNAIL))
                page = args.output_dir / reference_file(len(saved["prompts"]))
                page.parent.mkdir(parents=True, exist_ok=True)
                image.save(page, lossless=max(image.size) <= SHOWN_AS_PIXELS)
                saved["prompts"].append([text, name])
        if len(saved["prompts"]) < 2:
            raise ValueError(
                f"--data {args.data} has {len(saved['prompts'])} images to compare with: give at least 2."
            )
        for key, cache in caches.items():
            save_rows(np.concatenate(rows[key]), cache)
        write_json(saved, file)
    if args.wording:
        return [scene_prompt("long", index, args) for index in range(len(saved["prompts"]))]
    return [Prompt("long", index, text, name) for index, (text, name) in enumerate(saved["prompts"])]


def reference_caches(args: Arguments, eyes: dict[str, Eye]) -> dict[tuple[str, str], Path]:
    """By eye and kind of reference, where its features are kept; a judge looks at none of them."""
    kinds = ["reference", "reconstructed"]
    kinds += [f"wrong_{number}{ending}" for number in args.ladder for ending in ("", "/reconstructed")]
    return {
        (name, kind): args.output_dir / "features" / name / f"{kind.replace('/', '-')}.npy"
        for name, eye in eyes.items()
        if not isinstance(eye, Judge)
        for kind in kinds
    }


def further_prompts(
    long: Sequence[Prompt], args: Arguments, tokenizer: Any, items: Sequence[Item] = ()
) -> dict[str, list[Prompt]]:
    """Short prompts of the set or the world, or the first sentences of the long ones; and long ones with a change."""
    once = firsts(long)
    if any(item.short for item in items):
        short = set_prompts(items, "short", args) if args.num_short else []
    elif args.wording:
        few = (scene_prompt("short", index, args) for index in range(args.num_short))
        short = [prompt for prompt in few if stock_border(prompt.text, tokenizer) is None]
    else:
        begun = ((prompt.text, sentences_of(prompt.text, tokenizer)[0]) for prompt in once)
        fitting = (text[: part.end] for text, part in begun if part.token <= STOCK_CONTENT_TOKENS)
        short = [Prompt("short", index, text) for index, text in enumerate(islice(fitting, args.num_short))]
    changed: list[Prompt] = []
    for index, prompt in enumerate(once):
        if len(changed) == args.num_changed:
            break
        if prompt.scene is not None:
            change = change_scene(prompt.scene, args.seed + index, tokenizer)
        else:
            change = change_ending(prompt.text, once[(index + 1) % len(once)].text, tokenizer)
        if change is not None:
            changed.append(Prompt("changed", index, change.prompt, prompt.name, change=change))
    return {"long": list(long), "short": short, "changed": changed}


# ------------------------------------------------------------------------------------------------------------ drawing


def draw_all(
    conditions: Sequence[Condition], prompts: dict[str, list[Prompt]], args: Arguments, accelerator: Accelerator
) -> dict[str, dict[str, list[float]]]:
    """Draws what is missing, each process its share.

    Returns:
        By condition, how far states and predictions move for the first short prompts; of the main process only.
    """
    root, main = args.output_dir, accelerator.is_main_process
    share = [each for own in prompts.values() for each in own[accelerator.process_index :: accelerator.num_processes]]
    absent = sum(not (root / each.file(condition)).exists() for condition in conditions for each in share)
    bar = tqdm(total=absent, desc="images", unit="image", disable=not main, mininterval=2)
    pipe: Any = None
    refiner, loaded, weights = load_refiner(args, accelerator.device), None, ""
    drifts = {}
    for condition in conditions:
        bar.set_postfix_str(condition.name)
        if loaded != (condition.unet_source, condition.encoder_source):
            loaded, pipe = (condition.unet_source, condition.encoder_source), None  # one at a time in memory
            pipe = load_pipeline(condition, args, accelerator.device)
            weights = fingerprint(pipe)
        pipe.blend = condition.blend
        settings, noise = drawn_with(condition, args, weights), Noise(args, pipe)
        missing = [each for each in share if not is_drawn(root / each.file(condition), each, settings)]
        for batch in batches(pipe, missing, condition.long_prompt, args.batch_size):
            images = draw(pipe, refiner, batch, condition.long_prompt, args, noise)
            for each, image in zip(batch, images, strict=True):
                save_image(image, root / each.file(condition), each, args.seed + each.noise, settings)
            bar.update(len(batch))
        fitting = [each.text for each in firsts(prompts["short"]) if stock_border(each.text, pipe.tokenizer) is None]
        short = [str(text) for text in fitting[: args.num_drift]]
        if main and short and condition.encoder != BASELINE:
            file = root / "drift" / f"{condition.name}.json"
            saved: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"of": None}
            if saved["of"] != [weights, short]:
                saved = {"of": [weights, short], "drift": drift(pipe, condition, short, args.seed)}
                write_json(saved, file)
            drifts[condition.name] = saved["drift"]
    bar.close()
    return drifts


def drift(pipe: Any, condition: Condition, short: list[str], seed: int) -> dict[str, list[float]]:
    """By short prompt, how far the UNet's predictions and the token states lie from those of the stock encoder."""
    drifts = {"prediction_drift": prediction_drift(pipe, short, condition.long_prompt, seed)}
    stable_diffusion_xl = hasattr(pipe, "text_encoder_2")
    for place in ("", "_2") if stable_diffusion_xl else ("",):
        if condition.long_prompt == "stretch" and condition.blend == 1:
            encoder, stock = (getattr(pipe, f"{which}text_encoder{place}") for which in ("", "stock_"))
            layer = f"hidden_states[{encoder.config.num_hidden_layers - 1}]"  # what the UNet of SDXL reads
            found: dict[str, Any] = state_drift(encoder, stock, getattr(pipe, f"tokenizer{place}"), short)
            drifts[f"state_drift{place}"] = found[layer if stable_diffusion_xl else "last_hidden_state"]["prompt_rms"]
    return drifts


# ------------------------------------------------------------------------------------------------------------ looking


def look(eye: Eye, images: list[Image.Image]) -> np.ndarray:
    """What an eye makes of a batch of images, (N, D) in float32."""
    return (eye.embed_images(images) if isinstance(eye, Judge) else eye(images)).float().cpu().numpy()


def look_at_all(
    conditions: Sequence[Condition],
    prompts: dict[str, list[Prompt]],
    eyes: dict[str, Eye],
    args: Arguments,
    accelerator: Accelerator,
) -> dict[tuple[str, str, str], np.ndarray]:
    """What every eye makes of every image, (N, D) by eye, condition and kind; each process looks at its share."""
    main, root = accelerator.is_main_process, args.output_dir
    seen = {(name, kind, "long"): np.load(cache) for (name, kind), cache in reference_caches(args, eyes).items()}
    for condition in tqdm(conditions, "looking", disable=not main):
        for name, eye in eyes.items():
            for kind in ("long", "short") if isinstance(eye, Judge) and prompts["short"] else ("long",):
                files = [root / prompt.file(condition) for prompt in prompts[kind]]
                cache = root / "features" / name / condition.unet / f"{condition.encoder}-{kind}.npy"
                newest = max(file.stat().st_mtime for file in files)
                rows = np.load(cache) if cache.exists() and cache.stat().st_mtime >= newest else ()
                if len(rows) != len(files):
                    own = range(accelerator.process_index, len(files), accelerator.num_processes)
                    found: list[tuple[int, np.ndarray]] = []
                    for first in range(0, len(own), 32):
                        part = own[first : first + 32]
                        found += zip(part, look(eye, [Image.open(files[i]).convert("RGB") for i in part]), strict=True)
                    rows = np.stack([row for _, row in sorted(gather_object(found), key=lambda pair: pair[0])])
                    if main:
                        save_rows(rows, cache)
                seen[name, condition.name, kind] = np.asarray(rows)
    return seen


def ask_all(
    conditions: Sequence[Condition],
    prompts: dict[str, list[Prompt]],
    sheets: dict[str, list[Sheet]],
    judges: dict[str, Asked],
    args: Arguments,
    accelerator: Accelerator,
) -> dict[tuple[str, str, str], list[Values]]:
    """What every judge says of every image, by judge, condition and kind; each process asks about its share.

    A vision-language model is large: it is on the device only while it is asked.
    """
    main, root = accelerator.is_main_process, args.output_dir
    kept, said = Kept(root / "answers", accelerator.process_index), {}
    kinds = [kind for kind in ("long", "short") if prompts[kind]]
    number = sum(len(prompts[kind]) for kind in kinds) * len(conditions) * len(judges)
    bar = tqdm(total=number, desc="asking", unit="image", disable=not main, mininterval=2)
    for name, judge in judges.items():
        if isinstance(judge, VisionJudge):
            judge.model.to(accelerator.device)
        for condition in conditions:
            bar.set_postfix_str(f"{name}, {condition.name}")
            for kind in kinds:
                found: list[tuple[int, Values]] = []
                places = {prompt.index: place for place, prompt in enumerate(firsts(prompts[kind]))}
                for index in range(accelerator.process_index, len(prompts[kind]), accelerator.num_processes):
                    prompt = prompts[kind][index]
                    with Image.open(root / prompt.file(condition)) as image:
                        sheet = sheets[kind][places[prompt.index]]
                        found.append((index, ask(judge, image.convert("RGB"), sheet, kept)))
                    bar.update(accelerator.num_processes)
                said[name, condition.name, kind] = [
                    values for _, values in sorted(gather_object(found), key=lambda pair: pair[0])
                ]
        if isinstance(judge, VisionJudge):
            judge.model.to("cpu")
    bar.close()
    return said


def lay_out(
    conditions: Sequence[Condition], prompts: dict[str, list[Prompt]], items: Sequence[Item], args: Arguments
) -> None:
    """Images of a set of prompts where its own script looks for them, under `official/`."""
    assert args.prompt_set is not None
    for condition in conditions:
        files: dict[tuple[str, int], list[Path]] = {}
        for kind in ("long", "short") if items[0].short else ("long",):
            for prompt in prompts[kind]:
                files.setdefault((kind, prompt.index), []).append(args.output_dir / prompt.file(condition))
        pictures = [(items[index], kind, some) for (kind, index), some in files.items()]
        write_pictures(args.prompt_set[0], pictures, condition.name.replace("/", "-"), args.output_dir / "official")


def save_rows(rows: np.ndarray, file: Path) -> None:
    """Whole or not at all."""
    with writing(file) as part, part.open("wb") as stream:
        np.save(stream, rows)


def write_json(data: Any, file: Path) -> None:
    """Whole or not at all."""
    with writing(file) as part:
        part.write_text(json.dumps(data, indent=1), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- main


def check_sources(args: Arguments) -> None:
    """Remembers what each name stands for, and refuses to mix two runs in one folder.

    Raises:
        ValueError: If an earlier run in the folder meant something else.
    """
    file = args.output_dir / "sources.json"
    own = {"data": args.data, "split": args.split, "seed": str(args.seed)}
    for kind in ("encoders", "unets", "features", "judges", "vqa", "preferences"):
        own |= {f"{kind} {item.partition('=')[0]}": item for item in getattr(args, kind)}
    before = json.loads(file.read_text()) if file.exists() else {}
    for key in own.keys() & before.keys():
        if own[key] != before[key]:
            raise ValueError(
                f"{args.output_dir} was begun with {key} = {before[key]}, not {own[key]}: choose another "
                "--output_dir, or another name."
            )
    write_json(before | own, file)


def load_eyes(args: Arguments, device: Any) -> dict[str, Eye]:
    """Features and judges by name. They come first: what is missing is known before hours of drawing."""
    eyes: dict[str, Eye] = {}
    for item in args.features:
        name, equals, weights = item.partition("=")
        eyes[name] = load_extractor(name, weights=located(weights) if equals else None, device=device)
    for name, source in map(named, args.judges):
        eyes[name] = load_judge(name, source, device)
    if len(eyes) < len(args.features) + len(args.judges):
        raise ValueError("two of --features and --judges have one name: call one of them NAME=SOURCE.")
    return eyes


def load_judges(args: Arguments, device: Any) -> dict[str, Asked]:
    """What is asked about every image: vision-language models, and what people prefer."""
    judges: dict[str, Asked] = {}
    for item in args.vqa:
        name, source = named(item)
        source, _, revision = (source, "", "") if Path(source).exists() else source.partition("@")
        judges[name] = load_vision_judge(
            name.partition("@")[0], source, dtype="auto", revision=revision or None, batch_size=args.vqa_batch_size
        )
    for item in args.preferences:
        name, equals, source = item.partition("=")
        judges[name] = load_preference(f"{name}={located(source)}" if equals else name, device)
    if len(judges) < len(args.vqa) + len(args.preferences):
        raise ValueError("two of --vqa and --preferences have one name: call one of them NAME=SOURCE.")
    return judges


def main(args: Arguments) -> None:
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # or accelerate 1.15 takes each of torchrun's for one that is alone
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    conditions = read_conditions(args.model, args.encoders, args.unets)
    eyes, judges = load_eyes(args, accelerator.device), load_judges(args, accelerator.device)
    tokenizer = CLIPTokenizer.from_pretrained(located(args.model), subfolder="tokenizer")
    items: list[Item] = []
    if accelerator.is_main_process:
        check_sources(args)
    if args.prompt_set is not None:
        items = set_items(args)
        long = set_prompts(items, "long", args)
    else:
        autoencoder = load_autoencoder(args, accelerator.device)
        if accelerator.is_main_process:
            read_references(args, eyes, autoencoder)
        accelerator.wait_for_everyone()
        long = read_references(args, eyes, autoencoder)
    prompts = further_prompts(long, args, tokenizer, items)
    drifts = draw_all(conditions, prompts, args, accelerator)
    accelerator.wait_for_everyone()
    seen = look_at_all(conditions, prompts, eyes, args, accelerator)
    panel = None
    if judges:
        sheets = {
            kind: [sheet_of(str(prompt.text), prompt.questions, tokenizer) for prompt in firsts(prompts[kind])]
            for kind in ("long", "short")
        }
        said = ask_all(conditions, prompts, sheets, judges, args, accelerator)
        own = PROMPT_SETS.get(args.prompt_set[0]) if args.prompt_set else None
        panel = Panel(
            judges, said, sheets, own is not None and own.cascade, own.groups if own else None, args.dpg_quirks
        )
    if accelerator.is_main_process:
        if items and args.official_layout:
            lay_out(conditions, prompts, items, args)
        tqdm.write("figures")
        report = compare(
            conditions, prompts, eyes, seen, args.output_dir, tokenizer, drifts,
            panel=panel, references=args.reference, subset_size=args.kid_subset_size, resamples=args.num_resamples,
            num_examples=args.num_examples,
        )  # fmt: skip
        n = report["prompts"]["n"]
        report["prompts"] |= {"source": args.data, "seeds": [args.seed, args.seed + n - 1]}
        if n < len(items):
            report["warnings"] += [f"The set has {len(items):,} prompts; the first {n:,} were measured."]
        if args.dpg_quirks:
            report["warnings"] += ["Counted as the script of DPG-Bench counts, with its oversights (--dpg_quirks)."]
        if n < args.num_prompts and not items:
            report["warnings"] += [f"{args.num_prompts} prompts were asked for; {n} have an image that can be used."]
        report |= {
            "title": f"Long prompts on {Path(args.data).name}",
            "command": " ".join(["python train/evaluate_fid.py", *sys.argv[1:]]),
            "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()},
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        }
        write_report(report, args.output_dir)
        tqdm.write(str(args.output_dir / "report.html"))
    accelerator.end_training()


if __name__ == "__main__":
    for library in ("finelip_diffusion", "diffusers", "transformers"):  # dropped text is what is measured here
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        arguments = read_arguments(sys.argv[1:])
        check_launch()
        main(arguments)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from error
