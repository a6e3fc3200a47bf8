"""Trains every recipe on scenes, several seeds each, under one budget, and sets their encoders side by side.

    python train/compare_recipes.py --output_dir runs/recipes --jobs 2

Each run is `finetune_encoder.py` from the bundled 77-token CLIP. Its encoder is measured on retrieval among
near-duplicates that differ behind token 77 (`retrieval.scenes_gallery`), whole and without the first sentence; on what
a linear probe reads of its token states; on their drift from the stock encoder's on prompts that fit 77 tokens; and on
time and memory. Finished runs are kept: started again, the script goes on. `report.json` and `report.md` hold it all.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from finelip_diffusion.evaluation.intervals import bootstrap_interval, markdown_table, shown
from finelip_diffusion.evaluation.retrieval import SceneGallery, embed_gallery, evaluate, scenes_gallery
from finelip_diffusion.files import writing
from finelip_diffusion.heads import load_heads, own_score
from finelip_diffusion.metrics import probe_text_states, state_drift
from finelip_diffusion.model import load_clip
from finelip_diffusion.pipeline import BUNDLED_MODEL
from finelip_diffusion.positions import STOCK_POSITIONS
from finelip_diffusion.scenes import ATTRIBUTES, describe, sample_scene
from finelip_diffusion.text_encoder import MAX_LENGTH, load_text_encoder

HERE = Path(__file__).parent
UNTRAINED = "untrained"  # stretched, and nothing else
ABLATIONS = ("no_atrm", "no_clim", "visual_only", "infonce", "kps_infonce", "finelip_preserve")
SCORES = {  # column -> ranks in the report of a run
    "R@1": ("whole/{score}/text_to_image", "R@1"),
    "within group": ("whole/{score}/text_to_image", "group_R@1"),
    "R@1, image to text": ("whole/{score}/image_to_text", "R@1"),
    "no first sentence": ("without_first/{score}/text_to_image", "R@1"),
}
COMMON_SCORES = {"global": "Global cosine", "finelip": "FineLIP* (0.8 global + 0.2 token score)"}


@dataclass
class Arguments:
    """The defaults make docs/results/recipes.md."""

    output_dir: Path = field(default=Path("runs/recipes"), metadata={"help": "A folder a run, and the report."})
    recipes: list[str] = field(default_factory=list, metadata={"help": "Names in train/recipes; by default all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of each recipe."})
    pretrained_model_name_or_path: str = field(default=str(BUNDLED_MODEL / "clip"), metadata={"help": "The start."})
    max_train_steps: int = field(default=80, metadata={"help": "Updates of a run."})
    train_batch_size: int = field(default=40, metadata={"help": "Pairs, in groups of eight near-duplicates."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Of all parameters of all recipes."})
    mixed_precision: str = field(default="bf16", metadata={"help": "no or bf16."})
    num_groups: int = field(default=48, metadata={"help": "Groups of eight in the gallery."})
    num_probe_captions: int = field(default=600, metadata={"help": "Half of them fit the probe."})
    num_short_prompts: int = field(default=200, metadata={"help": "On which drift is measured."})
    jobs: int = field(default=1, metadata={"help": "Runs at a time, a thread each."})


# -------------------------------------------------------------------------------------------------------------- a run


def train(recipe: str, seed: int, folder: Path, args: Arguments) -> dict[str, float]:
    """Trains in a process of its own; its wall time, and the most memory that it took."""
    flags = {
        "recipe": recipe,
        "seed": seed,
        "output_dir": folder,
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "train_data": "scenes",
        "train_batch_size": args.train_batch_size,
        "max_train_steps": args.max_train_steps,
        "learning_rate": args.learning_rate,
        "head_learning_rate": args.learning_rate,
        "lr_warmup_steps": args.max_train_steps // 10,
        "loss_warmup_steps": args.max_train_steps // 10,
        "checkpointing_steps": args.max_train_steps,
        "validation_steps": args.max_train_steps + 1,
        "num_validation_examples": 8,
        "mixed_precision": args.mixed_precision,
        "length_bucketing": True,
        "report_to": "none",
    }
    given = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, str(HERE / "finetune_encoder.py"), *given]
    started = time.perf_counter()
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{recipe}, seed {seed}, did not train: {folder / 'log.txt'} says why.")
    return {"seconds": time.perf_counter() - started, "peak_memory_mib": usage.ru_maxrss / 2**10}


def measure(source: Path | str, encoder_source: Path | str, gallery: SceneGallery, args: Arguments) -> dict[str, Any]:
    """Retrieval, probes and drift of one encoder."""
    raw: dict[str, Any] = {"max_length": MAX_LENGTH, "refine_image": False, "refine_text": False}
    model, tokenizer, image_processor = load_clip(source, **(raw if source == encoder_source else {}))
    own = None if source == encoder_source else own_score(model, load_heads(source))
    embedded = embed_gallery(model, tokenizer, image_processor, gallery, views=("whole", "without_first"), own=own)
    encoder, tokenizer = load_text_encoder(encoder_source, dtype=torch.float32, projection=False)
    stock, _ = load_text_encoder(BUNDLED_MODEL, max_length=STOCK_POSITIONS, dtype=torch.float32)
    prompts = [str(describe(sample_scene(seed, "test", (1, 2)))) for seed in range(args.num_short_prompts)]
    drift = state_drift(encoder, stock, tokenizer, prompts)
    return {
        "retrieval": evaluate(embedded),
        "probes": probe_text_states(encoder, tokenizer, args.num_probe_captions),
        "drift": {name: drift[name] for name in ("last_hidden_state", list(drift)[-3])},
    }


def run(recipe: str, seed: int, gallery: SceneGallery, args: Arguments) -> dict[str, Any]:
    """One recipe, one seed: trained and measured, unless that was done before."""
    torch.set_num_threads(1)
    folder = args.output_dir / f"{recipe}-{seed}"
    file = folder / "result.json"
    settings = {
        "steps": args.max_train_steps, "batch": args.train_batch_size, "learning_rate": args.learning_rate,
        "start": str(args.pretrained_model_name_or_path), "groups": args.num_groups,
    }  # fmt: skip
    if file.exists() and (result := json.loads(file.read_text()))["settings"] == settings:
        return result
    folder.mkdir(parents=True, exist_ok=True)
    if recipe == UNTRAINED:
        source = args.pretrained_model_name_or_path
        figures = measure(source, source, gallery, args)
    else:
        cost = train(recipe, seed, folder, args)
        figures = measure(folder / "finelip_model", folder, gallery, args) | {"cost": cost}
    result = {"recipe": recipe, "seed": seed, "settings": settings} | figures
    with writing(file) as part:
        part.write_text(json.dumps(result))
    return result


# ------------------------------------------------------------------------------------------------------------- tables


def hits(result: dict[str, Any], name: str, figure: str) -> np.ndarray:
    """Whether each query was found first, in the gallery or among its group, (Q,)."""
    name = f"{name}/group" if figure.startswith("group") else name
    return np.array(result["retrieval"]["ranks"][name]) < 1


def pooled(results: list[dict[str, Any]], name: str, figure: str) -> torch.Tensor:
    """The share of seeds with which each query was found, (Q,)."""
    return torch.tensor(np.mean([hits(result, name, figure) for result in results], axis=0))


def interval(values: torch.Tensor) -> dict[str, Any]:
    """Mean and 95% bootstrap interval; groups of eight queries are drawn together."""
    return bootstrap_interval(values, torch.arange(len(values)) // 8)


def over_seeds(values: list[float]) -> str:
    """A mean over seeds and their range."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def own_score_of(result: dict[str, Any]) -> str | None:
    """The score that a recipe trains for, where it is neither the global cosine nor FineLIP's."""
    scores = dict.fromkeys(name.split("/")[1] for name in result["retrieval"]["ranks"])
    return next((score for score in scores if score not in COMMON_SCORES), None)


def tables(by_recipe: dict[str, list[dict[str, Any]]]) -> str:
    """The report in Markdown."""
    lines = []

    def add(title: str, heads: list[str], rows: list[list[str]]) -> None:
        lines.extend([f"### {title}", "", *markdown_table(heads, rows), ""])

    for score, title in COMMON_SCORES.items():
        columns = [(name.format(score=score), figure) for name, figure in SCORES.values()]
        add(title, ["recipe", *SCORES], [
            [recipe, *(shown(interval(pooled(results, *column))) for column in columns)]
            for recipe, results in by_recipe.items()
        ])  # fmt: skip
    own = {recipe: found for recipe, results in by_recipe.items() if (found := own_score_of(results[0]))}
    if own:
        add("The score that the recipe trains for", ["recipe, score", *SCORES], [
            [f"{recipe}, {score}", *(shown(interval(pooled(by_recipe[recipe], name.format(score=score), figure)))
                                     for name, figure in SCORES.values())]
            for recipe, score in own.items()
        ])  # fmt: skip
    add("What a linear probe reads of the token states", ["recipe", *ATTRIBUTES], [
        [recipe, *(over_seeds([result["probes"][name]["mean"] for result in results]) for name in ATTRIBUTES)]
        for recipe, results in by_recipe.items()
    ])  # fmt: skip
    rows = []
    for recipe, results in by_recipe.items():
        cells = [over_seeds([result["drift"][layer]["rms"] for result in results]) for layer in results[0]["drift"]]
        cost = [result["cost"] for result in results if "cost" in result]
        cells.append(over_seeds([each["seconds"] / 60 for each in cost]) if cost else "–")
        cells.append(f"{max(each['peak_memory_mib'] for each in cost):.0f}" if cost else "–")
        rows.append([recipe, *cells])
    add("Drift, time and memory", ["recipe", "drift, last", "drift, last but one", "minutes", "MiB"], rows)
    if "finelip" in by_recipe:
        starred = {f"{column}, FineLIP*": (name.format(score="finelip"), figure)
                   for column, (name, figure) in SCORES.items()}  # fmt: skip
        starred["R@1, global"] = ("whole/global/text_to_image", "R@1")
        names = list(starred)
        others = [name for name in ABLATIONS if name in by_recipe]
        for part, some in (("", [names[0], names[1], names[4]]), (", further", names[2:4])):
            rows = []
            for other in others:
                pairs = by_recipe["finelip"], by_recipe[other]
                cells = [
                    shown(interval(pooled(pairs[0], *starred[name]) - pooled(pairs[1], *starred[name])), sign=True)
                    for name in some
                ]
                signs = [
                    bool(hits(one, *starred[some[0]]).mean() > hits(two, *starred[some[0]]).mean())
                    for one, two in zip(*pairs, strict=False)
                ]
                rows.append([other, *cells, f"{max(sum(signs), len(signs) - sum(signs))} of {len(signs)}"])
            add(f"FineLIP less the other, paired by query{part}", ["other", *some, "seeds agree on the first"], rows)
    return "\n".join(lines)


def main(args: Arguments) -> None:
    known = sorted(file.stem for file in (HERE / "recipes").glob("*.yaml"))
    if unknown := [name for name in args.recipes if name not in known]:
        raise SystemExit(f"Unknown recipe {unknown[0]!r}: choose among {', '.join(known)}.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    gallery = scenes_gallery(args.num_groups)
    names = args.recipes or known
    tasks = [(UNTRAINED, 0), *((name, seed) for seed in args.seeds for name in names)]
    results = []
    with ProcessPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run, name, seed, gallery, args) for name, seed in tasks]
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
            results.append(future.result())
    by_recipe = {
        name: sorted((one for one in results if one["recipe"] == name), key=lambda one: one["seed"])
        for name in (UNTRAINED, *names)
    }
    (args.output_dir / "report.json").write_text(json.dumps(by_recipe))
    (args.output_dir / "report.md").write_text(tables(by_recipe))
    print(tables(by_recipe))


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
