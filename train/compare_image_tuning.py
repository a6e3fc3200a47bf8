"""Answers what image tuning depends on, by many short runs of it on scenes, and writes the tables of the answers.

    python train/compare_image_tuning.py --output_dir runs/image_tuning --jobs 6 --minutes 9  # again, until it is done
    python train/compare_image_tuning.py --output_dir runs/image_tuning --write docs/results/image_tuning.md

Images and captions are written once, as a user's folder. Each run is `finetune_text_to_image.py` on them, by one
setting and one seed; the same run is done once, whichever questions ask for it. Its encoder then draws held-out
prompts in the base UNet and in others (`--other_unet`), and is measured on short prompts, on drift, on retrieval and
by probes. Finished runs are kept in small files, `OUTPUT_DIR/results`; weights and caches lie in `--work_dir`. Started
again, the script goes on, also inside of a run.
"""

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

import finetune_encoder
import finetune_text_to_image
import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from finelip_diffusion.evaluation.adherence import prediction_drift
from finelip_diffusion.evaluation.intervals import interval, markdown_table, number
from finelip_diffusion.evaluation.retrieval import embed_gallery, evaluate, scenes_gallery
from finelip_diffusion.files import writing
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.metrics import probe_text_states, state_drift
from finelip_diffusion.model import load_clip
from finelip_diffusion.pipeline import FineLIPStableDiffusionPipeline
from finelip_diffusion.positions import STOCK_POSITIONS
from finelip_diffusion.recipes import read_content
from finelip_diffusion.scenes import Caption, describe, findings, read, render, sample_scene
from finelip_diffusion.tuning import STRETCHED, share_tower
from finelip_diffusion.validation import Curve, draw

HERE = Path(__file__).parent
FEW, MANY = (1, 3), (4, 9)  # objects of a short and of a long prompt
MARKS = ("<!-- tables of train/compare_image_tuning.py -->", "<!-- end of the tables -->")
QUESTIONS = ("starts", "images", "teacher", "rank", "padding", "terms")
STOCK = "stock"  # the base as it is, prompts cut at 77 tokens
RESAMPLES = 1000


@dataclass
class Arguments:
    """The defaults make docs/results/image_tuning.md."""

    output_dir: Path = field(
        default=Path("runs/image_tuning"), metadata={"help": "The folder where the results are written."}
    )
    work_dir: Path | None = field(
        default=None,
        metadata={"help": "The folder for images, weights and caches. The default is work/ in --output_dir."},
    )
    write: Path | None = field(
        default=None,
        metadata={
            "help": "The path of a document into which the tables of the existing results are written. Nothing is run."
        },
    )
    questions: list[str] = field(
        default_factory=lambda: list(QUESTIONS), metadata={"help": f"The questions to answer: {', '.join(QUESTIONS)}."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "The random seeds with which each setting is run."}
    )
    jobs: int = field(
        default=1, metadata={"help": "The number of runs at a time, each in a process with its own model."}
    )
    minutes: float | None = field(
        default=None,
        metadata={
            "help": "The number of minutes after which everything is stopped. The next start resumes it. The "
            "default is no limit."
        },
    )
    pretrained_model_name_or_path: str = field(
        default=str(BUNDLED_MODEL), metadata={"help": "The Stable Diffusion model for scenes."}
    )
    clip: str = field(
        default=str(BUNDLED_MODEL / "clip"),
        metadata={"help": "The CLIP from which the encoders of --starts are trained."},
    )
    starts: list[str] = field(
        default_factory=lambda: ["finelip_sparc", "stretched", "kps_infonce", "finelip"],
        metadata={
            "help": "The encoders to start from: stretched, a recipe in train/recipes, which is trained first, "
            "or NAME=FOLDER. All other questions use the first one."
        },
    )
    start_steps: int = field(
        default=300, metadata={"help": "The number of updates for an encoder of --starts that is trained first."}
    )
    start_batch_size: int = field(
        default=96, metadata={"help": "The number of pairs per batch for such an encoder, in groups of eight."}
    )
    start_learning_rate: float = field(default=3e-5, metadata={"help": "The learning rate for such an encoder."})
    other_unet: list[str] = field(
        default_factory=list,
        metadata={"help": "The UNets that the encoders have not been trained with, each as NAME=FOLDER."},
    )
    images: list[int] = field(
        default_factory=lambda: [250, 1000, 4000, 16_000],
        metadata={"help": "The numbers of captioned images to compare."},
    )
    ranks: list[int] = field(default_factory=lambda: [4, 16, 64], metadata={"help": "The LoRA ranks to compare."})
    terms: list[str] = field(
        default_factory=lambda: ["denoising=1", "kept_states=1"],
        metadata={"help": "The terms of the loss, unless a setting has its own."},
    )
    max_train_steps: int = field(default=800, metadata={"help": "The number of updates per run."})
    train_batch_size: int = field(default=48, metadata={"help": "The number of images per update."})
    learning_rate: float = field(default=3e-4, metadata={"help": "The learning rate of the encoder."})
    mixed_precision: str = field(default="no", metadata={"help": "The precision of training: no or bf16."})
    dataloader_num_workers: int = field(
        default=2, metadata={"help": "The number of subprocesses per run that read and tokenize the data."}
    )
    num_curve_points: int = field(
        default=4, metadata={"help": "The number of points in a run at which prompts are drawn."}
    )
    num_curve_prompts: int = field(
        default=250, metadata={"help": "The number of held-out prompts to draw at each of these points."}
    )
    num_prompts: int = field(
        default=1000, metadata={"help": "The number of held-out prompts to draw at the end of a run."}
    )
    num_other_prompts: int = field(
        default=500, metadata={"help": "The number of held-out prompts to draw with each other UNet."}
    )
    num_short: int = field(
        default=250, metadata={"help": "The maximum number of held-out prompts that fit 77 tokens."}
    )
    num_drift: int = field(default=48, metadata={"help": "The number of short prompts on which drift is measured."})
    num_groups: int = field(
        default=48, metadata={"help": "The number of groups of eight near-duplicates for retrieval."}
    )
    num_probe_captions: int = field(
        default=300, metadata={"help": "The number of captions for the probes. 0 leaves the probes out."}
    )
    draw_batch_size: int = field(default=125, metadata={"help": "The number of prompts to draw at a time."})
    num_inference_steps: int = field(default=20, metadata={"help": "The number of denoising steps."})
    guidance_scale: float = field(default=3.0, metadata={"help": "The guidance scale."})

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.questions) - set(QUESTIONS)):
            raise ValueError(f"--questions has {unknown[0]}: choose among {', '.join(QUESTIONS)}.")
        recipes = sorted(file.stem for file in (HERE / "recipes").glob("*.yaml"))
        for start in self.starts:
            if "=" not in start and start not in (STRETCHED, *recipes):
                raise ValueError(f"--starts has {start}: give {STRETCHED}, NAME=FOLDER, or {', '.join(recipes)}.")

    @property
    def work(self) -> Path:
        """Where weights and caches are."""
        return self.work_dir or self.output_dir / "work"

    @property
    def results(self) -> Path:
        """Where the results are."""
        return self.output_dir / "results"


@dataclass(frozen=True)
class Run:
    """One setting with one seed.

    Attributes:
        start: Name of the encoder to start from.
        seed: Of data order, noise and adapters.
        flags: Of `finetune_text_to_image.py`, as pairs, where they differ from the rest; None trains nothing.
    """

    start: str
    seed: int = 0
    flags: tuple[tuple[str, Any], ...] | None = ()

    @property
    def name(self) -> str:
        """Of its files: readable, and different for different runs."""
        digest = hashlib.blake2b(repr(self).encode(), digest_size=4).hexdigest()
        return f"{self.start}-{digest}-seed{self.seed}"


# ---------------------------------------------------------------------------------------------------------- questions


def settings(args: Arguments) -> dict[str, dict[str, tuple[str, tuple[tuple[str, Any], ...]]]]:
    """By question and label, the start and the flags of a setting."""
    main, most = name_of(args.starts[0]), max(args.images)
    alone = [term for term in args.terms if not term.startswith("kept_")]
    prompts = ("teacher_predictions=1", "kept_states=1")

    def put(**flags: Any) -> tuple[str, tuple[tuple[str, Any], ...]]:
        return main, tuple(sorted(flags.items()))

    return {
        "starts": {name_of(start): (name_of(start), ()) for start in args.starts},
        "images": {f"{n:,} images": (put() if n == most else put(images=n)) for n in sorted(args.images)},
        "teacher": {
            "images and captions": put(),
            "captions alone, teacher reads sentence by sentence": put(terms=prompts),
            "captions alone, teacher reads windows": put(terms=prompts, teacher="chunk"),
            "both": put(terms=(*args.terms, "teacher_predictions=1")),
        },
        "rank": {"whole": put()} | {f"LoRA of rank {rank}": put(lora_rank=rank) for rank in args.ranks},
        "padding": {
            "half padded, half cut": put(),
            "all padded to the encoder's length": put(padded_batches=1.0),
            "all cut at the longest caption": put(padded_batches=0.0),
        },
        "terms": {
            "kept_states 1": put(),
            "nothing kept": put(terms=tuple(alone)),
            "kept_states 0.1": put(terms=(*alone, "kept_states=0.1")),
            "kept_states 10": put(terms=(*alone, "kept_states=10")),
            "kept_predictions 1": put(terms=(*alone, "kept_predictions=1")),
            "kept_states 1, kept_predictions 1": put(terms=(*alone, "kept_states=1", "kept_predictions=1")),
            "kept_states 1, finelip_sparc 0.01": put(terms=(*alone, "kept_states=1", "finelip_sparc=0.01")),
        },
    }


def runs_of(args: Arguments) -> list[Run]:
    """What the questions ask for, each run once, seed after seed, so that an early end has all settings."""
    found: dict[Run, None] = {Run(STOCK, flags=None): None}
    found |= {Run(name_of(start), flags=None): None for start in args.starts}
    asked = settings(args)
    for seed in args.seeds:
        for question in args.questions:
            found |= {Run(start, seed, flags): None for start, flags in asked[question].values()}
    return list(found)


def name_of(start: str) -> str:
    """`finelip` of `finelip=FOLDER`."""
    return start.partition("=")[0]


def image_tower(start: str, args: Arguments) -> str:
    """The model whose image tower belongs to a start: its own, or that of the CLIP it was made of."""
    own = Path(source_of(start, args)) / "finelip_model"
    return str(own) if own.is_dir() else args.clip


def source_of(start: str, args: Arguments) -> str:
    """Where the encoder of a start is, for `--finelip`."""
    given = {name_of(item): item.partition("=")[2] for item in args.starts}.get(start)
    return given or (STRETCHED if start == STRETCHED else str(args.work / "starts" / start))


# ---------------------------------------------------------------------------------------------------------- beforehand


def write_images(args: Arguments) -> None:
    """The captioned images, one caption each, as a folder, and lists of the first so many of them."""
    folder = args.work / "images"
    numbers = sorted(args.images)
    if not folder.is_dir():
        with writing(folder) as part:
            part.mkdir()
            lines = []
            for seed in tqdm(range(numbers[-1]), desc="images", mininterval=5):
                scene = sample_scene(10_000_000 + seed, num_objects=FEW if seed % 4 == 0 else MANY)
                render(scene).save(part / f"{seed:06}.png", compress_level=1)
                lines.append(json.dumps({"file_name": f"{seed:06}.png", "text": str(describe(scene, seed))}))
            for count in numbers:
                (part / f"first_{count}.jsonl").write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")


def train_start(recipe: str, args: Arguments) -> None:
    """Trains an encoder by a recipe, the same few updates for each; the first of two stages before the second."""
    folder = args.work / "starts" / recipe
    if (folder / "text_encoder").is_dir():
        return
    clip = args.clip
    if first := read_content(HERE / "recipes" / f"{recipe}.yaml").get("after"):
        train_start(first, args)
        clip = str(args.work / "starts" / first / "finelip_model")
    rate, steps = args.start_learning_rate, args.start_steps
    finetune_encoder.main(finetune_encoder.Arguments(
        output_dir=folder, recipe=recipe, pretrained_model_name_or_path=clip, train_data="scenes",
        train_batch_size=args.start_batch_size, max_train_steps=steps, learning_rate=rate, head_learning_rate=rate,
        lr_warmup_steps=steps // 10, loss_warmup_steps=steps // 10, length_bucketing=True,
        checkpointing_steps=100, checkpoints_total_limit=1, resume_from_checkpoint="latest",
        num_validation_examples=8, validation_steps=steps + 1, mixed_precision=args.mixed_precision,
        dataloader_num_workers=4 * args.dataloader_num_workers, report_to="none",
    ))  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- a run


def training_flags(run: Run, args: Arguments) -> finetune_text_to_image.Arguments:
    """The flags of a run."""
    given = dict(run.flags or ())
    images = given.pop("images", max(args.images))
    flags = {
        "preset": None, "output_dir": args.work / "runs" / run.name, "finelip": source_of(run.start, args),
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path, "seed": run.seed, "terms": args.terms,
        "train_data": str(args.work / "images" / f"first_{images}.jsonl"), "cache_dir": args.work / "cache",
        "max_train_steps": args.max_train_steps, "train_batch_size": min(args.train_batch_size, images),
        "learning_rate": args.learning_rate, "lr_warmup_steps": min(50, args.max_train_steps // 10),
        "empty_captions": 0.08, "timestep_sampling": "high_noise", "ema_decay": 0.998,
        "mixed_precision": args.mixed_precision, "checkpointing_steps": max(1, args.max_train_steps // 4),
        "checkpoints_total_limit": 1, "resume_from_checkpoint": "latest", "report_to": "none",
        "num_validation_prompts": args.num_curve_prompts, "validation_batch_size": args.draw_batch_size,
        "validation_steps": max(1, args.max_train_steps // args.num_curve_points),
        "validation_inference_steps": args.num_inference_steps, "validation_guidance_scale": args.guidance_scale,
        "recipe_batch_size": min(32, images), "retrieval_model": image_tower(run.start, args),
        "dataloader_num_workers": args.dataloader_num_workers,
    }  # fmt: skip
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    return finetune_text_to_image.Arguments(**flags | given)


def do(run: Run, args: Arguments) -> None:
    """Trains and measures what was not done before."""
    file = args.results / f"{run.name}.json"
    log = args.work / "logs" / f"{run.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream, contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
        result = finished(run, args)
        source = None if run.start == STOCK else source_of(run.start, args)
        if run.flags is not None:
            source = str(training_flags(run, args).output_dir)
        if result is None:
            result = {"run": asdict(run), "settings": shared_settings(args), "curve": [], "others": {}}
            if run.flags is not None:
                finetune_text_to_image.main(training_flags(run, args))
                result["curve"] = Curve(Path(str(source)) / "validation.jsonl", args.max_train_steps).points
            result |= measure(source, image_tower(run.start, args), args)
        result["others"] |= draw_elsewhere(source, set(result["others"]), args)
        with writing(file) as part:
            part.write_text(json.dumps(result), encoding="utf-8")


def finished(run: Run, args: Arguments) -> dict[str, Any] | None:
    """What is there of a run that has been measured."""
    file = args.results / f"{run.name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def is_done(run: Run, args: Arguments) -> bool:
    """Whether a run has been measured, in all other UNets, too."""
    result = finished(run, args)
    return result is not None and {name_of(item) for item in args.other_unet} <= set(result["others"])


def shared_settings(args: Arguments) -> dict[str, Any]:
    """What all results of a folder have in common."""
    aside = {"output_dir", "work_dir", "write", "questions", "seeds", "jobs", "minutes", "starts", "other_unet",
             "ranks", "dataloader_num_workers", "draw_batch_size"}  # fmt: skip
    return {name: value for name, value in asdict(args).items() if name not in aside}


# ---------------------------------------------------------------------------------------------------------- measuring


def long_prompts(args: Arguments, count: int) -> list[Caption]:
    """Held-out prompts, none of which a curve has drawn."""
    return [describe(sample_scene(100_000 + seed, "test", MANY), seed) for seed in range(count)]


def counts_and_backgrounds(
    pipe: Any, prompts: Sequence[Caption], backgrounds: Sequence[str] | None, args: Arguments
) -> tuple[list[list[int]], list[bool]]:
    """What of prompts is drawn, as in `validation.Counts`, and whether each background is the right one."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    images = draw(pipe, prompts, side, args.num_inference_steps, args.guidance_scale, 50_000, args.draw_batch_size)
    counts, right = [], []
    for place, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        shown = read((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
        row = [0, 0, 0, 0]
        for finding in findings(prompt, shown, pipe.tokenizer):
            row[2 * finding.after] += finding.found
            row[2 * finding.after + 1] += 1
        counts.append(row)
        if backgrounds is not None:
            right.append(shown.background == backgrounds[place])
    return counts, right


def load_pipelines(source: str | None, args: Arguments) -> tuple[Any, Any]:
    """Plain diffusers with an encoder, and this package's pipeline, with the stock one beside it.

    Args:
        source: Of the encoder; None is the base's own, and no second pipeline.
        args: Of the script.
    """
    base = args.pretrained_model_name_or_path
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    own = None
    if source is not None:
        how: dict[str, Any] = {"long_prompt": "stretch"} if source == STRETCHED else {"finelip": source}
        own = FineLIPStableDiffusionPipeline.from_pretrained(base, **how)
        options |= {"text_encoder": own.text_encoder, "tokenizer": own.tokenizer}
    plain = StableDiffusionPipeline.from_pretrained(base, **options).to(device_here())
    for pipe in filter(None, (plain, own)):
        pipe.set_progress_bar_config(disable=True)
    return plain, own


def device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def draw_elsewhere(source: str | None, known: set[str], args: Arguments) -> dict[str, list[list[int]]]:
    """What an encoder draws in the UNets of `--other_unet`, those aside that are known."""
    found, pipe = {}, None
    for item in args.other_unet:
        name, _, folder = item.partition("=")
        if name in known:
            continue
        pipe = pipe or load_pipelines(source, args)[0]
        place = Path(folder) / "unet" if (Path(folder) / "unet").is_dir() else Path(folder)
        pipe.unet = UNet2DConditionModel.from_pretrained(place).to(device_here())
        found[name], _ = counts_and_backgrounds(pipe, long_prompts(args, args.num_other_prompts), None, args)
    return found


@torch.no_grad()
def measure(source: str | None, tower: str, args: Arguments) -> dict[str, Any]:
    """What an encoder draws in plain diffusers, and what is left of what it was.

    Args:
        source: Of the encoder; None is the base's own, which cuts prompts at 77 tokens.
        tower: The model whose image tower captions are compared with.
        args: Of the script.
    """
    device = device_here()
    pipe, finelip = load_pipelines(source, args)
    scenes = [sample_scene(seed, "test", FEW) for seed in range(args.num_short)]
    pairs = [(describe(scene, seed), scene.background) for seed, scene in enumerate(scenes)]
    pairs = [pair for pair in pairs if len(pipe.tokenizer(str(pair[0])).input_ids) <= STOCK_POSITIONS]
    short, backgrounds = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    result: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    result["long"], _ = counts_and_backgrounds(pipe, long_prompts(args, args.num_prompts), None, args)
    result["short"], result["backgrounds"] = counts_and_backgrounds(pipe, short, backgrounds, args)
    if finelip is None:
        return result
    finelip.to(device)
    few = [str(text) for text in short[: args.num_drift]]
    result["prediction_drift"] = prediction_drift(finelip, few, "stretch", 0)
    states = state_drift(finelip.text_encoder, finelip.stock_text_encoder, finelip.tokenizer, few)
    result["state_drift"] = states["last_hidden_state"]["prompt_rms"]
    encoder, tokenizer = finelip.text_encoder.cpu().float(), finelip.tokenizer
    if args.num_probe_captions:
        probes = probe_text_states(encoder, tokenizer, args.num_probe_captions)
        result["probes"] = {name: own["mean"] for name, own in probes.items()}
    return result | {"retrieval": retrieval(tower, encoder, tokenizer, args, device)}


def retrieval(tower: str, encoder: Any, tokenizer: Any, args: Arguments, device: str) -> list[int]:
    """The rank of each caption's image among the near-duplicates of its group."""
    model, _, image_processor = load_clip(tower)
    share_tower(model, encoder)
    gallery = embed_gallery(model.to(device).eval(), tokenizer, image_processor, scenes_gallery(args.num_groups))
    return list(map(int, evaluate(gallery)["ranks"]["whole/global/text_to_image/group"]))


# ------------------------------------------------------------------------------------------------------------ figures


def resampled(tables: Sequence[Any]) -> dict[str, Any]:
    """A share with its 95% interval over prompts and seeds, both drawn anew together.

    Args:
        tables: (S, N, 2) By seed and prompt, what was found and what was stated.

    Returns:
        `value`, `low`, `high`, `n`, the number of prompts, and `seeds`, the share of each.
    """
    found = np.array(tables, dtype=float)  # (S, N, 2)
    shares = found.sum(1)
    if not shares[..., 1].all():
        return {"value": None, "low": None, "high": None, "n": 0, "seeds": []}
    rng = np.random.default_rng(0)
    seeds, prompts = found.shape[:2]
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES)  # (R, N)
    sums = np.einsum("rn,snk->rsk", weights, found)
    sums = np.take_along_axis(sums, rng.integers(seeds, size=(RESAMPLES, seeds, 1)), axis=1).sum(1)  # (R, 2)
    low, high = np.percentile(sums[sums[:, 1] > 0, 0] / sums[sums[:, 1] > 0, 1], [2.5, 97.5])
    total = shares.sum(0)
    return {"value": float(total[0] / total[1]), "low": float(low), "high": float(high), "n": prompts,
            "seeds": (shares[:, 0] / shares[:, 1]).tolist()}  # fmt: skip


def side(results: Iterable[dict[str, Any]], key: str, after: bool, get: Callable[[Any], Any] = lambda r: r) -> dict:
    """A share of facts before or after token 77."""
    tables = [np.array(get(result[key]))[:, 2 * after : 2 * after + 2] for result in results]
    return resampled(tables)


def mean(results: Iterable[dict[str, Any]], key: str, get: Callable[[Any], Any] = lambda value: value) -> dict:
    """The mean of a figure of each prompt."""
    rows = [get(result.get(key)) for result in results]
    rows = [row for row in rows if row is not None and len(row)]
    if not rows:
        return {"value": None, "low": None, "high": None}
    return resampled([[[float(value), 1.0] for value in row] for row in rows])


def cell(figure: dict[str, Any]) -> str:
    """A figure with its interval."""
    return f"{number(figure['value'])} {interval(figure)}".rstrip()


class Results:
    """The results that are there, by setting."""

    def __init__(self, args: Arguments):
        self.args = args

    def of(self, start: str, flags: tuple[tuple[str, Any], ...] | None = ()) -> list[dict[str, Any]]:
        """Those of a setting, of each seed that is done."""
        seeds = [0] if flags is None else self.args.seeds
        files = [self.args.results / f"{Run(start, seed, flags).name}.json" for seed in seeds]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def counts_at(place: int, curve: list[dict[str, Any]]) -> Any:
    """What was found at a point of a curve."""
    return curve[place]["counts"]


def curves(results: Results, args: Arguments) -> list[str]:
    """Recall over updates by start."""
    lines = []
    for after in (True, False):
        rows = []
        heads: list[str] = []
        for start in map(name_of, args.starts):
            own, before = results.of(start), results.of(start, None)
            if not own:
                continue
            updates = [point["update"] for point in own[0]["curve"]]
            heads = ["start", "0 updates", *(f"{update:,}" for update in updates)]
            cells = [cell(side(before, "long", after)) if before else "–"]
            for place in range(len(updates)):
                whole = [result for result in own if len(result["curve"]) > place]
                cells.append(cell(side(whole, "curve", after, partial(counts_at, place))))
            rows.append([start, *cells])
        lines += [f"Found {'after' if after else 'before'} token 77, over updates:", "",
                  *markdown_table(heads, rows), ""]  # fmt: skip
    return lines


def row_of(label: str, own: list[dict[str, Any]]) -> list[str]:
    """What a setting draws and keeps."""
    return [
        f"{label} ({len(own)})", cell(side(own, "long", False)), cell(side(own, "long", True)),
        cell(side(own, "short", False)), cell(mean(own, "prediction_drift")),
    ]  # fmt: skip


HEADS = ["setting (seeds)", "before token 77", "after token 77", "short prompts", "prediction drift"]
TITLES = {
    "images": "Number of images",
    "teacher": "Captions without images",
    "rank": "LoRA and full training",
    "padding": "Padding and cutting",
    "terms": "Terms that keep short prompts",
}


def tables(args: Arguments) -> str:
    """The answers in Markdown."""
    results, asked = Results(args), settings(args)
    lines = ["### Starting encoder", "", *curves(results, args)]
    rows, further, elsewhere = [], [], []
    stock = results.of(STOCK, None)
    names = list(stock[0]["others"]) if stock else []
    for start in (STOCK, *map(name_of, args.starts)):
        for label, flags in ((start, None), (f"{start}, tuned", ())):
            own = results.of(start, flags)
            if not own:
                continue
            rows.append([label, cell(side(own, "short", False)), cell(mean(own, "backgrounds")),
                         cell(mean(own, "state_drift")), cell(mean(own, "prediction_drift"))])  # fmt: skip
            if start != STOCK:
                right = mean(own, "retrieval", lambda ranks: ranks and [rank == 0 for rank in ranks])
                probes = [list(result["probes"].values()) for result in own if "probes" in result]
                further.append([label, cell(right), number(float(np.mean(probes))) if probes else "–"])
            elsewhere.append([label, cell(side(own, "long", True)), *(
                cell(side(own, "others", True, itemgetter(name))) for name in names
            )])  # fmt: skip
    lines += ["### What tuning costs", ""]
    lines += markdown_table(["encoder", "short prompts", "background", "state drift", "prediction drift"], rows)
    heads = ["encoder", "right image in its group", "probes"]
    lines += ["", *markdown_table(heads, further), ""]
    if names:
        lines += ["### Transfer to another UNet", "", "Found after token 77:", "",
                  *markdown_table(["encoder", "the UNet it was tuned through", *names], elsewhere), ""]  # fmt: skip
    for question, title in TITLES.items():
        found = [(label, own) for label, setting in asked[question].items() if (own := results.of(*setting))]
        if len(found) > 1:
            rows = [row_of(label, own) for label, own in found]
            lines += [f"### {title}", "", *markdown_table(HEADS, rows), ""]
    every = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(args.results.glob("*.json"))]
    devices = sorted({result["device"] for result in every})
    lines += [
        f"{len(every)} runs on {', '.join(devices)}, {args.max_train_steps:,} updates of {args.train_batch_size} "
        f"images, seeds {', '.join(map(str, args.seeds))}. Prompts are held out: {args.num_prompts:,} at the end of "
        f"a run, {args.num_curve_prompts:,} others at each point of a curve, {args.num_short:,} short ones"
        + (f", {args.num_other_prompts:,} in other UNets. " if names else ". ")
        + "Brackets are 95% intervals that resample prompts and seeds together. Starts were trained once.",
    ]
    return "\n".join(lines)


def write_document(file: Path, text: str) -> None:
    """Puts the tables between their marks.

    Raises:
        ValueError: If the document lacks the marks. One sentence.
    """
    whole = file.read_text(encoding="utf-8")
    before, found, rest = whole.partition(MARKS[0])
    _, ended, after = rest.partition(MARKS[1])
    if not found or not ended:
        raise ValueError(f"{file} lacks the lines {MARKS[0]} and {MARKS[1]}, between which the tables go.")
    with writing(file) as part:
        part.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- main


def give_up() -> None:
    """Ends this process."""
    os.write(2, b"the time is up: start the script again, and it goes on.\n")
    os._exit(3)


def in_time(task: Callable[[], None], deadline: float | None) -> None:
    """Does a task in this process, which ends at the deadline; every task can be gone on with."""
    torch.set_num_threads(1)
    for library in ("finelip_diffusion", "diffusers", "transformers"):  # dropped text is what is measured here
        logging.getLogger(library).setLevel(logging.ERROR)
    guard = threading.Timer(3e6 if deadline is None else max(0.0, deadline - time.time()), give_up)
    guard.daemon = True
    guard.start()
    try:
        task()
    finally:
        guard.cancel()


def all_done(tasks: Sequence[Callable[[], None]], args: Arguments, title: str) -> bool:
    """Does tasks, several in processes of their own; whether all were done before the time was up."""
    if args.jobs == 1:
        for task in tqdm(tasks, desc=title):
            task()
        return True
    with ProcessPoolExecutor(min(args.jobs, len(tasks)) or 1, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=title):
                future.result()
        except BrokenProcessPool:
            return False
    return True


def first_of(runs: Sequence[Run], args: Arguments) -> list[Run]:
    """One run for each set of images, before the others: it writes the latents that they share."""
    found: dict[str, Run] = {}
    for run in runs:
        if run.flags is not None:
            found.setdefault(training_flags(run, args).train_data, run)
    return list(found.values())


def main(args: Arguments) -> None:
    if args.write is not None:
        write_document(args.write, tables(args))
        return
    deadline = None if args.minutes is None else time.time() + 60 * args.minutes
    args.results.mkdir(parents=True, exist_ok=True)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # of the processes side by side
        os.environ[name] = "1"
    check_settings(args)
    write_images(args)
    recipes = [start for start in args.starts if "=" not in start and start != STRETCHED]
    runs = [run for run in runs_of(args) if not is_done(run, args)]
    early = first_of(runs, args)
    late = [run for run in runs if run not in early]
    stages = {
        "starts": [partial(train_start, recipe, args) for recipe in recipes],
        "first runs": [partial(do, run, args) for run in early],
        "runs": [partial(do, run, args) for run in late],
    }
    for title, tasks in stages.items():
        if tasks and not all_done([partial(in_time, task, deadline) for task in tasks], args, title):
            raise SystemExit(3)
    text = tables(args)
    with writing(args.output_dir / "report.md") as part:
        part.write_text(text + "\n", encoding="utf-8")
    print(text)


def check_settings(args: Arguments) -> None:
    """Refuses to mix results of other settings in one folder.

    Raises:
        ValueError: If an earlier start was given others. One sentence.
    """
    file = args.output_dir / "settings.json"
    own = json.loads(json.dumps(shared_settings(args), default=str))
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else own
    for name in own.keys() & before.keys():
        if own[name] != before[name]:
            raise ValueError(
                f"{args.output_dir} was begun with --{name} {before[name]}, not {own[name]}: choose another folder."
            )
    with writing(file) as part:
        part.write_text(json.dumps(own, indent=1), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from error
