"""Trains every recipe on scenes, several seeds each, under one budget, and sets their encoders side by side.

    python train/compare_recipes.py --output_dir runs/recipes --jobs 2
    python train/compare_recipes.py --output_dir runs/recipes --jobs 2 --sweeps all
    python train/compare_recipes.py --output_dir runs/recipes --write_only True --page docs/results/recipes.md

Each run is `finetune_encoder.py` from the bundled 77-token CLIP, in a process of its own, on a GPU where there is one.
Its encoder is measured on retrieval among near-duplicates that differ after token 77 (`retrieval.scenes_gallery`),
whole and without the first sentence; on what the frozen UNet of the bundled model draws of held-out prompts when the
encoder is plugged in; with `--tune_steps`, on what it draws after a few updates through that UNet; on what a linear
probe reads of the token states; on their drift from the stock encoder's; and on time and memory.

A run leaves one small JSON file in `results/`. Started again, the script makes the runs that are missing, and those
whose recipe, budget or starting weights are others now, and says what is missing still. `report.md` has all tables.
A sweep is a file of train/sweeps: a recipe, and what is changed of it.

Two cores that do nothing else take less than two hours for the defaults. On a machine with a GPU and 16 cores, the
table with its sweeps, and what is then asked of a few recipes alone, without losing what is there:

    python train/compare_recipes.py --output_dir runs/recipes --jobs 15 --max_train_steps 200 --num_groups 48 \\
        --num_drawn_prompts 100 --num_inference_steps 20 --sweeps all
    python train/compare_recipes.py --output_dir runs/recipes --jobs 15 --max_train_steps 200 --num_groups 48 \\
        --num_drawn_prompts 100 --num_inference_steps 20 --recipes finelip sparc edited --tune_steps 200
"""

import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from finelip_diffusion.evaluation.intervals import bootstrap_interval, markdown_table, shown
from finelip_diffusion.evaluation.retrieval import SceneGallery, embed_gallery, evaluate, scenes_gallery
from finelip_diffusion.files import writing
from finelip_diffusion.heads import load_heads, own_score
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.metrics import probe_text_states, state_drift
from finelip_diffusion.model import load_clip
from finelip_diffusion.pipeline import FineLIPStableDiffusionPipeline
from finelip_diffusion.positions import STOCK_POSITIONS
from finelip_diffusion.recipes import make_recipe, read_content
from finelip_diffusion.scenes import ATTRIBUTES, IMAGE_SIZE, describe, sample_scene
from finelip_diffusion.text_encoder import MAX_LENGTH, load_text_encoder, save_text_encoder
from finelip_diffusion.validation import counts_of, draw, prompts_of

HERE = Path(__file__).resolve().parent
RECIPES, SWEEPS, TEXT = HERE / "recipes", HERE / "sweeps", HERE / "recipes_page.md"
UNTRAINED = "untrained"  # stretched, and nothing else
STOCK = ("truncate", "chunk", "segment")  # ways to read a long prompt with the stock encoder
DRAWN_FROM = 10_000  # the first seed of the noise
PRELOADED = [
    "accelerate", "diffusers", "yaml", "finelip_diffusion.objective", "finelip_diffusion.pipeline",
    "finelip_diffusion.data.datasets", "finelip_diffusion.evaluation.retrieval",
]  # fmt: skip
BUDGET = (
    "max_train_steps", "train_batch_size", "learning_rate", "mixed_precision", "num_groups", "num_probe_captions",
    "num_short_prompts", "num_drawn_prompts", "num_inference_steps", "guidance_scale",
)  # fmt: skip
"""Flags that a result depends on; --write_only takes them from the folder."""
RETRIEVAL = {  # column -> ranks in the report of a run
    "R@1": "whole/{score}/text_to_image",
    "within group": "whole/{score}/text_to_image/group",
    "R@1, image to text": "whole/{score}/image_to_text",
    "no first sentence": "without_first/{score}/text_to_image",
}
COMMON_SCORES = {"global": "Global cosine", "finelip": "FineLIP* (0.8 global + 0.2 token score)"}

Result = dict[str, Any]
Results = dict[str, list[Result]]
"""By recipe, a result for each seed."""


@dataclass
class Arguments:
    """The defaults make docs/results/recipes.md on two cores."""

    output_dir: Path = field(
        default=Path("runs/recipes"), metadata={"help": "The folder where the results and the report are written."}
    )
    recipes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The names of recipes in train/recipes. The default is all of them. none stands for no recipe."
        },
    )
    sweeps: list[str] = field(
        default_factory=list,
        metadata={"help": "The names of sweeps in train/sweeps, or all. The default is no sweep."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "The random seeds with which each recipe is trained."}
    )
    pretrained_model_name_or_path: str = field(
        default=str(BUNDLED_MODEL / "clip"), metadata={"help": "The CLIP that every recipe starts from."}
    )
    base: str = field(
        default=str(BUNDLED_MODEL), metadata={"help": "The Stable Diffusion model whose frozen UNet draws scenes."}
    )
    max_train_steps: int = field(default=24, metadata={"help": "The number of updates per run."})
    train_batch_size: int = field(
        default=40, metadata={"help": "The number of pairs per batch, in groups of eight near-duplicates."}
    )
    learning_rate: float = field(
        default=3e-5, metadata={"help": "The learning rate of all parameters of all recipes."}
    )
    mixed_precision: str = field(default="no", metadata={"help": "The precision of training: no or bf16."})
    num_groups: int = field(default=24, metadata={"help": "The number of groups of eight scenes in the gallery."})
    num_probe_captions: int = field(
        default=400, metadata={"help": "The number of captions for the probes. Half of them fit the probe."}
    )
    num_short_prompts: int = field(
        default=100, metadata={"help": "The number of short prompts on which drift is measured."}
    )
    num_drawn_prompts: int = field(
        default=24, metadata={"help": "The number of prompts that the frozen UNet draws. 0 turns drawing off."}
    )
    num_inference_steps: int = field(default=10, metadata={"help": "The number of denoising steps per image."})
    guidance_scale: float = field(default=3.0, metadata={"help": "The guidance scale for drawing."})
    tune_steps: int = field(
        default=0, metadata={"help": "The number of updates through the frozen UNet. 0 leaves this tuning out."}
    )
    jobs: int = field(
        default=1, metadata={"help": "The number of runs at a time. They share the CPU cores and the GPU."}
    )
    write_only: bool = field(
        default=False, metadata={"help": "Whether to train nothing and report the existing results."}
    )
    page: Path | None = field(
        default=None, metadata={"help": "The path where the results page is written. The default is no page."}
    )

    def __post_init__(self) -> None:
        least = dict.fromkeys(("max_train_steps", "num_groups", "num_inference_steps", "num_short_prompts", "jobs"), 1)
        least |= {"train_batch_size": 8, "num_drawn_prompts": 0, "tune_steps": 0, "num_probe_captions": 2}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be at least {bound}.")
        if self.train_batch_size % 8:
            raise ValueError(f"--train_batch_size is {self.train_batch_size}, but groups have eight: give 8, 16, ....")


# ------------------------------------------------------------------------------------------------------ what is run


@dataclass(frozen=True)
class Sweep:
    """One setting of a recipe, varied.

    Attributes:
        name: of the file.
        base: the recipe that is varied.
        title: what is varied, with its unit.
        variants: by value, the name of the run and the content of its recipe.
    """

    name: str
    base: str
    title: str
    variants: dict[str, tuple[str, dict[str, Any]]]


def read_sweep(path: Path) -> Sweep:
    """Reads `{base: RECIPE, title: ..., values: {VALUE: {key: ..., ...}}}`.

    Raises:
        ValueError: If there is no such sweep, or it is none.
    """
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ValueError(f"there is no sweep {path.stem!r}: choose among {known}, or all.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.keys() != {"base", "title", "values"}:
        raise ValueError(f"{path} is not a sweep: it has base, title and values.")
    base = read_content(RECIPES / f"{content['base']}.yaml")
    variants = {}
    for value, changed in content["values"].items():
        name = f"{path.stem}={re.sub('[^0-9a-z.]+', '-', str(value))}"
        variants[str(value)] = name, base | changed | {"description": f"{path.stem} {value}"}
    for name, recipe in variants.values():
        make_recipe(name, recipe, f"{path}, {name}")
    return Sweep(path.stem, content["base"], content["title"], variants)


def wanted_recipes(args: Arguments) -> tuple[dict[str, dict[str, Any]], list[Sweep]]:
    """The contents of the recipes by name, and the sweeps.

    Raises:
        ValueError: For a name that is unknown.
    """
    known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    names = [] if args.recipes == ["none"] else args.recipes or known
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no recipe {unknown[0]!r}: choose among {', '.join(known)}.")
    every = sorted(file.stem for file in SWEEPS.glob("*.yaml"))
    sweeps = [read_sweep(SWEEPS / f"{name}.yaml") for name in (every if args.sweeps == ["all"] else args.sweeps)]
    contents = {name: read_content(RECIPES / f"{name}.yaml") for name in names}
    stages = {content.get("after") for content in contents.values()}  # the first of two, trained with the second
    return {name: content for name, content in contents.items() if name not in stages}, sweeps


def fingerprint(*sources: str) -> str:
    """Of the weights of folders and files: other weights, other runs. The bundled long encoder plays no part."""
    digest = hashlib.blake2b(digest_size=8)
    for source in map(Path, sources):
        files = sorted(source.rglob("*.safetensors")) if source.is_dir() else [source]
        for file in (file for file in files if "finelip" not in file.relative_to(source).parts):
            digest.update(file.name.encode())
            digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def settings_of(args: Arguments, content: dict[str, Any] | None, weights: str) -> dict[str, Any]:
    """What a result depends on; one that was made otherwise is made again."""
    own = {key: value for key, value in (content or {}).items() if key != "description"}
    return {"recipe": own, "weights": weights} | {name: getattr(args, name) for name in BUDGET}


def result_file(args: Arguments, name: str, seed: int) -> Path:
    return args.output_dir / "results" / f"{name}-{seed}.json"


def read_result(args: Arguments, name: str, seed: int, settings: dict[str, Any]) -> Result | None:
    """The result of a run, if it was made under these settings, and tuned as far as is asked for."""
    file = result_file(args, name, seed)
    result = json.loads(file.read_text()) if file.is_file() else None
    if result is None or result["settings"] != settings:
        return None
    return result if name in STOCK or args.tune_steps in (0, result["tune_steps"]) else None


# -------------------------------------------------------------------------------------------------------------- a run


def run(name: str, content: dict[str, Any] | None, seed: int, gallery: SceneGallery, args: Arguments,
        settings: dict[str, Any]) -> None:  # fmt: skip
    """Trains and measures one recipe with one seed, in this process; its output goes to logs/, its weights go away."""
    folder = args.output_dir / "work" / f"{name}-{seed}"
    log = args.output_dir / "logs" / f"{name}-{seed}.txt"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    for parent in (folder, log.parent):
        parent.mkdir(parents=True, exist_ok=True)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(stream, 1), os.dup2(stream, 2)
    torch.set_num_threads(max(1, torch.get_num_threads() // args.jobs))  # OMP_NUM_THREADS, or the cores
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator or torch.device("cpu")
    result: Result = {"recipe": name, "seed": seed, "settings": settings, "tune_steps": args.tune_steps}
    began = time.process_time()
    if name in STOCK:
        result["pictures"] = pictures(None, name, args, device)
    else:
        if content is not None:
            result["cost"] = train(name, content, seed, folder, args, device)
        else:
            save_stretched(folder, args)
        source = args.pretrained_model_name_or_path if content is None else folder / "finelip_model"
        result |= measure(source, folder, gallery, args, device)
        if args.num_drawn_prompts:
            result["pictures"] = pictures(folder, "stretch", args, device)
        if args.tune_steps:
            tune(folder, seed, args)
            result["tuned"] = pictures(folder / "tuned", "stretch", args, device)
    result["cpu_seconds"] = time.process_time() - began
    with writing(result_file(args, name, seed)) as part:
        part.write_text(json.dumps(result))
    shutil.rmtree(folder, ignore_errors=True)


def train(
    name: str, content: dict[str, Any], seed: int, folder: Path, args: Arguments, device: torch.device
) -> Result:
    """Trains by `finetune_encoder.py`; its wall time, and the most memory that it took."""
    sys.path.insert(0, str(HERE))
    import finetune_encoder

    started, busy = time.perf_counter(), time.process_time()
    start = args.pretrained_model_name_or_path
    if first := content.get("after"):
        train(first, read_content(RECIPES / f"{first}.yaml"), seed, folder / "first", args, device)
        start = str(folder / "first" / "finelip_model")
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    finetune_encoder.main(
        finetune_encoder.Arguments(
            output_dir=folder,
            recipe=str(recipe),
            seed=seed,
            pretrained_model_name_or_path=start,
            train_data="scenes",
            num_scenes=8 * -(-args.max_train_steps * args.train_batch_size // 8),
            train_batch_size=args.train_batch_size,
            max_train_steps=args.max_train_steps,
            learning_rate=args.learning_rate,
            head_learning_rate=args.learning_rate,
            lr_warmup_steps=args.max_train_steps // 10,
            loss_warmup_steps=args.max_train_steps // 10,
            checkpointing_steps=args.max_train_steps,
            validation_steps=args.max_train_steps + 1,
            num_validation_examples=8,
            mixed_precision=args.mixed_precision,
            length_bucketing=True,
            report_to="none",
        )
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - busy}
    return seconds | {"peak_memory_mib": peak, "device": device.type}


def save_stretched(folder: Path, args: Arguments) -> None:
    """The starting CLIP's text tower, stretched and not trained, as the other runs leave theirs."""
    encoder, tokenizer = load_text_encoder(
        args.pretrained_model_name_or_path, max_length=MAX_LENGTH, dtype=torch.float32, projection=False
    )
    save_text_encoder(encoder, tokenizer, folder, overwrite=True)


def measure(source: Path | str, folder: Path, gallery: SceneGallery, args: Arguments, device: torch.device) -> Result:
    """Retrieval, probes and drift of one encoder."""
    raw: dict[str, Any] = {} if Path(source).parent == folder else {"max_length": MAX_LENGTH}
    model, tokenizer, image_processor = load_clip(source, **raw)
    own = None if raw else own_score(model, load_heads(source))
    views = ("whole", "without_first")
    embedded = embed_gallery(model.to(device), tokenizer, image_processor, gallery, views=views, own=own)
    ranks = evaluate(embedded, device=device)["ranks"]
    encoder, tokenizer = load_text_encoder(folder, dtype=torch.float32, projection=False)
    probes = probe_text_states(encoder, tokenizer, args.num_probe_captions)
    stock, _ = load_text_encoder(
        args.pretrained_model_name_or_path, max_length=STOCK_POSITIONS, dtype=torch.float32, projection=False
    )
    prompts = [str(describe(sample_scene(seed, "test", (1, 2)))) for seed in range(args.num_short_prompts)]
    drift = state_drift(encoder.to(device), stock.to(device), tokenizer, prompts)
    last, before = "last_hidden_state", list(drift)[-3]
    return {
        "score": own.name if own else None,
        "hits": {name: "".join("1" if rank < 1 else "0" for rank in found) for name, found in ranks.items()},
        "probes": {name: probes[name]["mean"] for name in ATTRIBUTES},
        "drift": {"last": drift[last]["rms"], "last but one": drift[before]["rms"]},
    }


def pictures(folder: Path | None, long_prompt: Any, args: Arguments, device: torch.device) -> list[list[int]]:
    """What the frozen UNet shows of held-out prompts: for each, found and stated before token 77, and after it."""
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(args.base, finelip=folder, long_prompt=long_prompt)
    pipe.set_progress_bar_config(disable=True)
    prompts = prompts_of(None, args.num_drawn_prompts, "scenes")
    images = draw(pipe.to(device), prompts, IMAGE_SIZE, args.num_inference_steps, args.guidance_scale, DRAWN_FROM)
    return counts_of(prompts, images, pipe.tokenizer)


def tune(folder: Path, seed: int, args: Arguments) -> None:
    """Trains the encoder through the frozen UNet, by `finetune_text_to_image.py`."""
    flags = {
        "preset": "scenes", "pretrained_model_name_or_path": args.base, "finelip": folder, "train_data": "scenes",
        "output_dir": folder / "tuned", "seed": seed, "report_to": "none", "num_validation_prompts": 0,
        "cache_dir": args.output_dir / "cache",  # latents, the same for all recipes
        "num_scenes": min(2000, 48 * args.tune_steps), "max_train_steps": args.tune_steps,
        "checkpointing_steps": args.tune_steps, "lr_warmup_steps": args.tune_steps // 10,
    }  # fmt: skip
    command = [sys.executable, str(HERE / "finetune_text_to_image.py"), *(f"--{key}={flags[key]}" for key in flags)]
    threads = str(torch.get_num_threads())
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": threads})


def run_all(runs: Sequence[tuple[Any, ...]], jobs: int) -> list[str]:
    """Makes runs, `jobs` at a time, each in a process of its own; the names of those that failed."""
    # A process that is forked must not have seen the GPU; one that is forked on a CPU need not import anything.
    context: Any = multiprocessing.get_context("spawn" if torch.accelerator.is_available() else "forkserver")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(PRELOADED)

    def make(arguments: tuple[Any, ...]) -> str | None:
        process = context.Process(target=run, args=arguments)
        process.start()
        process.join()
        return f"{arguments[0]}, seed {arguments[2]}" if process.exitcode else None

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(make, arguments) for arguments in runs]
        done = tqdm(as_completed(futures), total=len(futures), desc="runs", mininterval=2)
        return [failed for future in done if (failed := future.result())]


# ------------------------------------------------------------------------------------------------------------ figures


def pooled(results: list[Result], name: str) -> torch.Tensor:
    """The share of seeds with which each query of the gallery was found, (Q,)."""
    return torch.tensor(np.mean([[int(hit) for hit in result["hits"][name]] for result in results], axis=0))


def interval(values: torch.Tensor) -> dict[str, Any]:
    """Mean and 95% bootstrap interval; groups of eight queries are drawn together."""
    return bootstrap_interval(values, torch.arange(len(values)) // 8)


def facts(results: list[Result], key: str, after: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Facts found in pictures, mean over seeds, and which prompt each is of: (F,) twice, the found ones first."""
    counts = np.array([result[key] for result in results])[:, :, 2 * after : 2 * after + 2]  # (seeds, prompts, 2)
    found, stated = counts[..., 0].mean(0), counts[0, :, 1]
    values = [found[n] / stated[n] for n in range(len(stated)) for _ in range(stated[n])]
    prompts = [n for n in range(len(stated)) for _ in range(stated[n])]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(prompts)


def recall(results: list[Result], key: str, after: bool) -> dict[str, Any] | None:
    """Share of the facts that are found, with an interval over prompts."""
    own = [result for result in results if result.get(key)]
    return bootstrap_interval(*facts(own, key, after)) if own else None


def over_seeds(values: list[float]) -> str:
    """A mean over seeds and their range."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def both(results: list[Result], key: str) -> str:
    """Recall before | after token 77."""
    found = [recall(results, key, after) for after in (False, True)]
    return " | ".join(map(shown, found)) if any(found) else "–"


def measured(results: Results) -> Results:
    """Those that were trained or stretched, not the ways to read a prompt with the stock encoder."""
    return {name: own for name, own in results.items() if own and "hits" in own[0]}


# ------------------------------------------------------------------------------------------------------------- tables


def table(title: str, heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"### {title}", "", *markdown_table(heads, rows), ""]


def summary(results: Results) -> list[str]:
    """A row a recipe: what it finds, what the picture gains, what its states say and how far they are from home."""
    rows = []
    for name, own in results.items():
        trained = own and "hits" in own[0]
        rows.append([
            name,
            shown(interval(pooled(own, "whole/global/text_to_image"))) if trained else "–",
            *(shown(recall(own, "pictures", after)) for after in (False, True)),
            over_seeds([np.mean(list(one["probes"].values())) for one in own]) if trained else "–",
            over_seeds([one["drift"]["last"] for one in own]) if trained else "–",
        ])  # fmt: skip
    heads = ["recipe", "R@1", "drawn, before 77", "drawn, after 77", "probes", "drift"]
    return table("All recipes", heads, rows)


def tables(results: Results) -> list[str]:
    """All tables in Markdown."""
    lines, trained = summary(results), measured(results)
    for score, title in COMMON_SCORES.items():
        columns = [name.format(score=score) for name in RETRIEVAL.values()]
        rows = [[name, *(shown(interval(pooled(own, column))) for column in columns)]
                for name, own in trained.items()]  # fmt: skip
        lines += table(title, ["recipe", *RETRIEVAL], rows)
    own_scores = {name: own[0]["score"] for name, own in trained.items() if own[0]["score"]}
    if own_scores:
        rows = [[f"{name}, {score}", *(shown(interval(pooled(trained[name], column.format(score=score))))
                                       for column in RETRIEVAL.values())]
                for name, score in own_scores.items()]  # fmt: skip
        lines += table("The score that the recipe trains for", ["recipe, score", *RETRIEVAL], rows)
    if any(one.get("tuned") for own in trained.values() for one in own):
        rows = [[name, *(shown(recall(own, key, after)) for key in ("pictures", "tuned") for after in (False, True))]
                for name, own in trained.items() if any(one.get("tuned") for one in own)]  # fmt: skip
        heads = ["recipe", "plugged in, before 77", "plugged in, after 77", "tuned, before 77", "tuned, after 77"]
        lines += table("Drawn by the frozen UNet, before and after tuning through it", heads, rows)
    rows = [[name, *(over_seeds([one["probes"][attribute] for one in own]) for attribute in ATTRIBUTES)]
            for name, own in trained.items()]  # fmt: skip
    lines += table("What a linear probe reads of the token states", ["recipe", *ATTRIBUTES], rows)
    rows = []
    for name, own in trained.items():
        cost = [one["cost"] for one in own if "cost" in one]
        memory = f"{max(each['peak_memory_mib'] for each in cost):.0f}" if cost else "–"
        drift = [over_seeds([one["drift"][layer] for one in own]) for layer in ("last", "last but one")]
        rows.append([name, *drift, over_seeds([each["seconds"] / 60 for each in cost]), memory])
    return lines + table("Drift, time and memory", ["recipe", "last", "last but one", "minutes", "MiB"], rows)


def difference(one: list[Result], other: list[Result], name: str) -> dict[str, Any] | None:
    """A recipe's figure less another's with its interval: of the gallery by query, of pictures by prompt."""
    if "/" in name:
        return interval(pooled(one, name) - pooled(other, name))
    drawn = [[result for result in results if result.get(name)] for results in (one, other)]
    if not all(drawn):
        return None
    (a, prompts), (b, _) = (facts(results, name, True) for results in drawn)
    return bootstrap_interval(a - b, prompts)


def paired(results: Results, one: str, others: Sequence[str]) -> list[str]:
    """Differences of a recipe from others, query by query and fact by fact."""
    trained = measured(results)
    names = ("whole/global/text_to_image", "whole/finelip/text_to_image", "pictures")
    rows = []
    for other in others:
        if one in trained and other in trained and other != one:
            cells = [shown(difference(trained[one], trained[other], name), sign=True) for name in names]
            signs = [first["hits"][names[0]].count("1") > second["hits"][names[0]].count("1")
                     for first, second in zip(trained[one], trained[other], strict=False)]  # fmt: skip
            rows.append([other, *cells, f"{max(sum(signs), len(signs) - sum(signs))} of {len(signs)}"])
    heads = ["other", "R@1, global", "R@1, FineLIP*", "drawn, after 77", "seeds that agree on R@1"]
    return table(f"Difference between `{one}` and others, paired by query and by prompt", heads, rows) if rows else []


def told_apart(results: Results, name: str, base: str, others: Sequence[str]) -> str:
    """Which of the others have a higher figure than a recipe, which a lower one, and which neither."""
    groups: dict[str, list[str]] = {"Higher": [], "Lower": [], "No clear difference": []}
    for other in others:
        if other in results and (found := difference(results[other], results[base], name)) is not None:
            low, high = found["low"] or 0, found["high"] or 0
            groups["Higher" if low > 0 else "Lower" if high < 0 else "No clear difference"].append(f"`{other}`")
    return " ".join(f"{title}: {', '.join(names) or 'none'}." for title, names in groups.items())


def bases() -> dict[str, list[str]]:
    """By recipe, those that name it as their base: each changes something of it."""
    found: dict[str, list[str]] = {}
    for file in sorted(RECIPES.glob("*.yaml")):
        base = yaml.safe_load(file.read_text(encoding="utf-8")).get("base")
        if base is not None:
            found.setdefault(base, []).append(file.stem)
    return found


def readings(results: Results) -> list[str]:
    """What the figures say, in sentences that they decide."""
    trained = measured(results)
    if UNTRAINED not in trained:
        return []
    names = [name for name in trained if name != UNTRAINED]
    titles = {"whole/global/text_to_image": "**Retrieval** (R@1, global cosine)",
              "pictures": "**Plugged in** (facts drawn after token 77)",
              "tuned": "**Tuned through the UNet** (facts drawn after token 77)"}  # fmt: skip
    if not any(one.get("tuned") for one in trained[UNTRAINED]):
        del titles["tuned"]
    lines = [
        f"- {title}, compared with the stretched, untrained encoder. {told_apart(trained, name, UNTRAINED, names)}"
        for name, title in titles.items()
    ]
    for base, others in bases().items():
        if base in trained and (own := [other for other in others if other in trained]):
            lines.append(f"- **Changes to `{base}`** (R@1, global cosine). "
                         f"{told_apart(trained, 'whole/global/text_to_image', base, own)}")  # fmt: skip
    drawn = {name: figure["value"] for name in names if (figure := recall(trained[name], "pictures", True))}
    if len(drawn) > 4:
        from scipy.stats import spearmanr

        found = [interval(pooled(trained[name], "whole/global/text_to_image"))["value"] for name in drawn]
        probes = [np.mean([list(one["probes"].values()) for one in trained[name]]) for name in drawn]
        lines.append(f"- **Rank correlations** over these {len(drawn)} recipes: R@1 and facts drawn after token 77 "
                     f"{spearmanr(found, list(drawn.values())).statistic:+.2f}, R@1 and probes "
                     f"{spearmanr(found, probes).statistic:+.2f}, probes and facts drawn after token 77 "
                     f"{spearmanr(probes, list(drawn.values())).statistic:+.2f}.")  # fmt: skip
    return lines


# ------------------------------------------------------------------------------------------------------------- sweeps


def sweep_points(sweep: Sweep, results: Results) -> dict[str, dict[str, Any]]:
    """By value, figures with intervals."""
    points = {}
    for value, (name, _) in sweep.variants.items():
        if own := results.get(name):
            points[value] = {
                "R@1": interval(pooled(own, "whole/global/text_to_image")),
                "R@1, FineLIP*": interval(pooled(own, "whole/finelip/text_to_image")),
                "drawn, after 77": recall(own, "pictures", True),
            }
    return points


def sweep_tables(sweeps: Sequence[Sweep], results: Results) -> list[str]:
    """A table a sweep; differences from the recipe that is varied are paired by query and by prompt."""
    shares = {"R@1": "whole/global/text_to_image", "drawn, after 77": "pictures"}
    lines = []
    for sweep in sweeps:
        base, rows = results.get(sweep.base, []), []
        for value, point in sweep_points(sweep, results).items():
            own = results[sweep.variants[value][0]]
            cells = []
            for column, name in shares.items():
                cells += [shown(point[column]), shown(difference(own, base, name), sign=True) if base else "–"]
            rows.append([value, *cells])
        heads = [head for name in shares for head in (name, f"difference from `{sweep.base}`")]
        if rows:
            lines += table(sweep.title, ["value", *heads], rows)
    return lines


def sweep_readings(sweeps: Sequence[Sweep], results: Results) -> list[str]:
    """What the sweeps say, in sentences that the figures decide."""
    titles = {"whole/global/text_to_image": "R@1", "pictures": "Drawn after token 77"}
    lines = []
    for sweep in sweeps:
        names = [name for name, _ in sweep.variants.values() if name in results]
        if names and sweep.base in results:
            said = [f"{title}. {told_apart(results, name, sweep.base, names)}" for name, title in titles.items()]
            values = " ".join(said).replace(f"`{sweep.name}=", "`")
            lines.append(f"- **{sweep.title}**, compared with `{sweep.base}`. {values}")
    return lines


def plot_sweeps(sweeps: Sequence[Sweep], results: Results, file: Path) -> bool:
    """A panel a sweep, each figure with its 95% interval; whether there was anything to show."""
    import matplotlib

    matplotlib.use("Agg")
    # Text as text, and names that do not change: a small file, the same for the same figures.
    matplotlib.rcParams |= {"svg.hashsalt": "sweeps", "svg.fonttype": "none"}
    from matplotlib import pyplot

    shown_sweeps = [(sweep, points) for sweep in sweeps if (points := sweep_points(sweep, results))]
    if not shown_sweeps:
        return False
    figure, panels = pyplot.subplots(1, len(shown_sweeps), figsize=(3.4 * len(shown_sweeps), 3.2), squeeze=False)
    for panel, (sweep, points) in zip(panels[0], shown_sweeps, strict=True):
        for shift, label in ((-0.08, "R@1"), (0.0, "R@1, FineLIP*"), (0.08, "drawn, after 77")):
            found = [(place, point[label]) for place, point in enumerate(points.values()) if point[label]]
            if not found:
                continue
            places, values = zip(*found, strict=True)
            middle = np.array([value["value"] for value in values])
            low, high = (np.array([value[end] for value in values], dtype=float) for end in ("low", "high"))
            panel.errorbar(np.array(places) + shift, middle, [middle - low, high - middle], fmt="o-", ms=3, lw=1,
                           capsize=2, label=label)  # fmt: skip
        panel.set_xticks(range(len(points)), list(points))
        panel.set_title(sweep.title, fontsize=9)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("share found, 95% interval")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    with writing(file) as part:
        figure.savefig(part, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return True


# --------------------------------------------------------------------------------------------------------------- page


def best(results: Results, figure: Callable[[list[Result]], float | None]) -> tuple[str, list[Result]] | None:
    """The recipe, of those that were trained, with the largest figure."""
    found = {name: figure(own) for name, own in measured(results).items() if name != UNTRAINED}
    known = {name: value for name, value in found.items() if value is not None}
    return (name := max(known, key=lambda name: known[name]), results[name]) if known else None


def mean_of(key: str) -> Callable[[list[Result]], float | None]:
    """Mean recall before and after token 77 of pictures."""

    def figure(own: list[Result]) -> float | None:
        found = [recall(own, key, after) for after in (False, True)]
        values = [each["value"] for each in found if each]
        return float(np.mean(values)) if values else None

    return figure


def chosen(purpose: str, name: str, figure: str, gain: dict[str, Any] | None) -> str:
    """A line that recommends a recipe, or says that none clearly beats stretching alone."""
    low = (gain or {}).get("low") or 0
    if low > 0:
        return f"- **{purpose}**: `{name}`, {figure}."
    return (
        f"- **{purpose}**: no recipe clearly beats stretching alone under this budget. The best is `{name}`, {figure}."
    )


def choices(results: Results) -> list[str]:
    """Which recipe to take for what, with the figures behind it."""
    lines, stock = [], results[UNTRAINED]
    name = "whole/global/text_to_image"
    if found := best(results, lambda own: interval(pooled(own, name))["value"]):
        recipe, own = found
        ours, theirs = (shown(interval(pooled(each, name))) for each in (own, stock))
        figure = f"R@1 {ours} by the global cosine (untrained {theirs})"
        lines.append(chosen("For retrieval", recipe, figure, difference(own, stock, name)))
    if found := best(results, mean_of("pictures")):
        recipe, own = found
        others = ", ".join(f"{other} {both(results[other], 'pictures')}" for other in (UNTRAINED, *STOCK)
                           if results.get(other))  # fmt: skip
        figure = f"{both(own, 'pictures')} of the facts drawn before | after token 77 ({others})"
        gain = difference(own, stock, "pictures")
        lines.append(chosen("To plug into an unchanged UNet", recipe, figure, gain))
    purpose = "To tune through a UNet"
    if found := best(results, mean_of("tuned")):
        recipe, own = found
        figure = f"{both(own, 'tuned')} after {own[0]['tune_steps']} updates (untrained {both(stock, 'tuned')})"
        lines.append(chosen(purpose, recipe, figure, difference(own, stock, "tuned")))
    elif found := best(results, lambda own: float(np.mean([list(one["probes"].values()) for one in own]))):
        recipe, own = found
        probes = [over_seeds([float(np.mean(list(one["probes"].values()))) for one in each]) for each in (own, stock)]
        lines.append(f"- **{purpose}**: `{recipe}`, by its token states alone, of which a linear probe reads "
                     f"{probes[0]} (untrained {probes[1]}). Nothing was tuned here (`--tune_steps`).")  # fmt: skip
    return lines


def listed_missing(missing: Sequence[tuple[str, int]]) -> str:
    """A sentence about the runs that are not there, those of the same seeds together."""
    seeds: dict[str, list[str]] = {}
    for name, seed in missing:
        seeds.setdefault(name, []).append(str(seed))
    names: dict[str, list[str]] = {}
    for name, own in seeds.items():
        names.setdefault(("seed " if len(own) == 1 else "seeds ") + " and ".join(own), []).append(name)
    if not names:
        return "No run is missing."
    return "Missing: " + "; ".join(f"{which} of {', '.join(own)}" for which, own in names.items()) + "."


def page(
    results: Results, swept: Results, sweeps: Sequence[Sweep], missing: Sequence[tuple[str, int]], args: Arguments
) -> str:
    """The results page: what to take, how it was measured, every table; the runs of sweeps in tables of their own."""
    ran = next(own[0] for own in results.values() if own and own[0]["settings"]["recipe"])
    seeds = sorted({one["seed"] for own in results.values() for one in own})
    tuned = [f"`{name}`" for name, own in results.items() if own[0].get("tuned")]
    steps = max(own[0].get("tune_steps", 0) for own in results.values())
    defaults = Arguments()
    flags = [
        f"--{name} {ran['settings'][name]}" for name in BUDGET if ran["settings"][name] != getattr(defaults, name)
    ]
    values = ran["settings"] | {
        "flags": " ".join(["", *flags]),
        "tuned": f"{steps} updates for {', '.join(tuned)} (`--tune_steps {steps}`)"
        if tuned
        else "nothing was tuned in this run (`--tune_steps`)",
        "seeds": ", ".join(map(str, seeds)),
        "queries": len(ran["hits"]["whole/global/text_to_image"]),
        "device": ran["cost"]["device"],
        "choices": "\n".join(choices(results)),
        "precision": "float32" if ran["settings"]["mixed_precision"] == "no" else "bfloat16",
        "missing": listed_missing(missing),
        "hours": sum(one["cpu_seconds"] for own in (results | swept).values() for one in own) / 3600,
        "runs": sum(map(len, (results | swept).values())),
    }
    text = TEXT.read_text(encoding="utf-8").format_map(values)
    lines = [text.rstrip(), "", "## What it says", "", *readings(results), "", "## Tables", "", *tables(results)]
    for base, others in bases().items():
        lines += paired(results, base, others)
    if own := sweep_tables(sweeps, swept | results):
        lines += ["## FineLIP's open questions", "", *sweep_readings(sweeps, swept | results), ""]
        lines += ["![Sweeps](recipes_sweeps.svg)", "", *own]
    return "\n".join(lines).rstrip() + "\n"


# --------------------------------------------------------------------------------------------------------------- main


def main(args: Arguments) -> None:
    budget = args.output_dir / "budget.json"
    if args.write_only and budget.is_file():
        for name, value in json.loads(budget.read_text()).items():
            setattr(args, name, value)
        if not args.sweeps and any(args.output_dir.glob("results/*=*.json")):
            args.sweeps = ["all"]
    recipes, sweeps = wanted_recipes(args)
    contents: dict[str, dict[str, Any] | None] = dict.fromkeys((*STOCK, UNTRAINED)) | recipes
    swept = {name: content for sweep in sweeps for name, content in sweep.variants.values()}
    weights = fingerprint(args.base, args.pretrained_model_name_or_path)
    tasks = [
        (name, content, seed, settings_of(args, content, weights))
        for seed in args.seeds
        for name, content in (contents | swept).items()
        if content is not None or seed == args.seeds[0]
        if args.num_drawn_prompts or name not in STOCK
    ]
    for folder in ("results", "work", "logs"):
        (args.output_dir / folder).mkdir(parents=True, exist_ok=True)
    with writing(budget) as part:
        part.write_text(json.dumps({name: getattr(args, name) for name in BUDGET}, indent=1))

    def missing() -> list[tuple[Any, ...]]:
        return [task for task in tasks if read_result(args, task[0], task[2], task[3]) is None]

    failed: list[str] = []
    if not args.write_only and (todo := missing()):
        gallery = scenes_gallery(args.num_groups)
        runs = [(name, content, seed, gallery, args, settings) for name, content, seed, settings in todo]
        failed = run_all(runs, args.jobs)
        shutil.rmtree(args.output_dir / "work", ignore_errors=True)
    results: Results = {name: [] for name in (contents | swept)}
    for name, _, seed, settings in tasks:
        if (result := read_result(args, name, seed, settings)) is not None:
            results[name].append(result)
    results = {name: own for name, own in results.items() if own}
    left = [(name, seed) for name, _, seed, _ in missing()]
    listed = {name: own for name, own in results.items() if name in contents}
    report = "\n".join([*tables(listed), *sweep_tables(sweeps, results)])
    with writing(args.output_dir / "report.md") as part:
        part.write_text(report, encoding="utf-8")
    plot_sweeps(sweeps, results, args.output_dir / "sweeps.svg")
    if args.page is not None and measured(listed):
        plot_sweeps(sweeps, results, args.page.with_name(f"{args.page.stem}_sweeps.svg"))
        with writing(args.page) as part:
            part.write_text(page(listed, results, sweeps, left, args), encoding="utf-8")
    print(report)
    hours = sum(one["cpu_seconds"] for own in results.values() for one in own) / 3600
    print(f"{len(tasks) - len(left)} of {len(tasks)} runs are there, made in {hours:.2f} hours of one core.")
    if left:
        print(listed_missing(left))
    if failed:
        raise ValueError(f"these runs failed: {', '.join(failed)}; {args.output_dir / 'logs'} says why.")


if __name__ == "__main__":
    try:
        main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
    except ValueError as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from error
