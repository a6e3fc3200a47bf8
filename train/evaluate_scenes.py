"""Draws held-out scenes under every encoder and strategy, and counts what the reader finds of their prompts.

    python train/evaluate_scenes.py --output_dir runs/adherence                      # the bundled model, 1,000 prompts
    python train/evaluate_scenes.py --output_dir runs/adherence --num_prompts 100    # a first look

Every condition draws the same prompts from the same noise. `OUTPUT_DIR/report.json` holds each figure with its 95%
bootstrap interval over prompts, `report.md` the main ones as a table, `CONDITION.json` the findings of every image,
`CONDITION.png` the first images. A condition whose findings are there already is not drawn again.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from scipy.stats import bootstrap
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from finelip_diffusion.metrics import ATTRIBUTES, as_record, findings, probe_text_states
from finelip_diffusion.pipeline import BUNDLED_MODEL, STOCK_POSITIONS, FineLIPStableDiffusionPipeline
from finelip_diffusion.prompts import LongPrompt
from finelip_diffusion.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Caption, describe, read, render, sample_scene
from finelip_diffusion.text_encoder import MAX_LENGTH, load_text_encoder

ENCODERS: dict[str, tuple[str, LongPrompt]] = {  # name: (which long encoder the pipeline holds, its strategy)
    "truncate": ("trained", "truncate"),
    "chunk": ("trained", "chunk"),
    "segment": ("trained", "segment"),
    "stretch_untrained": ("untrained", "stretch"),
    "long_encoder": ("trained", "stretch"),
}
UNETS = ("base", "adapted")
TOKEN_BINS = (0, 40, 76, 110, 150, 190, 249)
SETTINGS = ("model", "num_prompts", "first_seed", "num_inference_steps", "guidance_scale")  # what findings depend on


@dataclass
class Arguments:
    """The defaults make the figures of the model card."""

    output_dir: Path = field(metadata={"help": "Where the findings, pictures and the report are written."})
    model: Path = field(default=BUNDLED_MODEL, metadata={"help": "A pipeline folder that holds finelip/."})
    num_prompts: int = field(default=1000, metadata={"help": "Held-out scenes, four to nine objects each."})
    first_seed: int = field(
        default=0, metadata={"help": "Scene, caption and noise of prompt i have this seed plus i."}
    )
    num_inference_steps: int = field(default=20, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(default=3.0, metadata={"help": "Classifier-free guidance."})
    batch_size: int = field(default=50, metadata={"help": "Images drawn at once; changes nothing but time."})
    encoders: list[str] = field(default_factory=lambda: list(ENCODERS), metadata={"help": f"Among {list(ENCODERS)}."})
    unets: list[str] = field(default_factory=lambda: list(UNETS), metadata={"help": f"Among {list(UNETS)}."})


def load_pipeline(model: Path, encoder: str, unet: str) -> FineLIPStableDiffusionPipeline:
    """The model with its trained or its merely stretched encoder, and with the base or the adapted UNet."""
    finelip = model / "finelip"
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(
        model,
        finelip=finelip if encoder == "trained" else model,
        unet=UNet2DConditionModel.from_pretrained(model if unet == "base" else finelip, subfolder="unet"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: FineLIPStableDiffusionPipeline, captions: list[Caption], first: int, args: Arguments, strategy: LongPrompt
) -> list[Image.Image]:
    """Images of a batch of captions, each from the noise of its own seed."""
    generators = [torch.Generator().manual_seed(first + index) for index in range(len(captions))]
    return pipe(
        [str(caption) for caption in captions],
        long_prompt=strategy,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=generators,
    ).images


def evaluate(name: str, pipe: FineLIPStableDiffusionPipeline, strategy: LongPrompt, args: Arguments) -> list[dict]:
    """Findings of every prompt under one condition, drawn now or read from an earlier run."""
    file = args.output_dir / f"{name}.json"
    settings = {key: str(value) for key, value in vars(args).items() if key in SETTINGS}
    if file.exists():
        saved = json.loads(file.read_text())
        if saved["settings"] != settings:
            raise SystemExit(
                f"{file} was drawn with {saved['settings']}, not {settings}: choose another --output_dir."
            )
        return saved["prompts"]
    rows: list[dict] = []
    sheet: list[Image.Image] = []
    seeds = range(args.first_seed, args.first_seed + args.num_prompts)
    for first in tqdm(range(0, len(seeds), args.batch_size), desc=name, mininterval=5):
        batch = seeds[first : first + args.batch_size]
        scenes = [sample_scene(seed, "test") for seed in batch]
        captions = [describe(scene, seed) for scene, seed in zip(scenes, batch, strict=True)]
        images = draw(pipe, captions, batch[0], args, strategy)
        for seed, scene, caption, image in zip(batch, scenes, captions, images, strict=True):
            shown = read(image)
            cells = {item.cell for item in scene.objects}
            rows.append(
                {
                    "seed": seed,
                    "background": shown.background == scene.background,
                    "uncalled": sum(item.cell not in cells for item in shown.objects),
                    "empty_cells": 9 - len(cells),
                    "facts": [as_record(finding) for finding in findings(caption, shown, pipe.tokenizer)],
                    "confusion": [
                        [fact.object.shape, fact.object.colour, fact.object.size, item.shape, item.colour, item.size]
                        for fact in caption.facts
                        for item in shown.objects
                        if item.cell == fact.object.cell
                    ],
                }
            )
            if len(sheet) < 32:
                sheet += [render(scene), image]
    width, height = sheet[0].size
    canvas = Image.new("RGB", (16 * width, 2 * height))
    for index, image in enumerate(sheet[:32]):
        canvas.paste(image, ((index // 2) % 16 * width, index % 2 * height))
    canvas.save(args.output_dir / f"{name}.png")
    file.with_suffix(".part").write_text(json.dumps({"settings": settings, "prompts": rows}))
    file.with_suffix(".part").rename(file)
    return rows


def ratio(pairs: list[tuple[int, int]]) -> dict[str, float | int | None]:
    """A share with its 95% bootstrap interval, from (hits, all) of each prompt; None where fewer than two have any.

    Prompts are drawn anew, not facts: the facts of one image hang together.
    """
    counts = np.array([pair for pair in pairs if pair[1]], dtype=float).reshape(-1, 2)
    if len(counts) < 2:  # nothing to draw anew
        return {"value": None, "low": None, "high": None, "facts": int(counts[:, 1].sum()), "prompts": len(counts)}

    def share(found: np.ndarray, total: np.ndarray, axis: int = -1) -> np.ndarray:
        return found.sum(axis) / total.sum(axis)

    interval = bootstrap(
        tuple(counts.T), share, paired=True, vectorized=True, n_resamples=2000, method="percentile", rng=0
    ).confidence_interval
    return {
        "value": float(share(*counts.T)),
        "low": float(interval.low),
        "high": float(interval.high),
        "facts": int(counts[:, 1].sum()),
        "prompts": len(counts),
    }


def summary(rows: list[dict]) -> dict[str, dict]:
    """Recall before and behind token 77, what was drawn without being asked for, and the reader's confusions."""
    figures: dict[str, dict] = {}
    for part, sides in (("all", (False, True)), ("before", (False,)), ("behind", (True,))):
        facts = [[fact for fact in row["facts"] if fact["behind"] in sides] for row in rows]
        for key in ("found", "filled", "shape", "colour", "size"):
            figures[f"{key}_{part}"] = ratio([(sum(fact[key] for fact in own), len(own)) for own in facts])
    for first, last in pairwise(TOKEN_BINS):
        facts = [[fact for fact in row["facts"] if first <= fact["token"] < last] for row in rows]
        figures[f"found_at_{first}"] = ratio([(sum(fact["found"] for fact in own), len(own)) for own in facts])
    figures["uncalled"] = ratio([(row["uncalled"], row["empty_cells"]) for row in rows])
    figures["background"] = ratio([(row["background"], 1) for row in rows])
    pairs = [pair for row in rows for pair in row["confusion"]]
    for index, (name, values) in enumerate((("shape", SHAPES), ("colour", COLOURS), ("size", SIZES))):
        counts = Counter((pair[index], pair[index + 3]) for pair in pairs)
        figures[f"confusion_{name}"] = {
            asked: {shown: counts[asked, shown] for shown in values if counts[asked, shown]} for asked in values
        }
    return figures


def check_reader(num_scenes: int = 1000) -> float:
    """Share of held-out scenes that the reader reads without any error from their own renderings."""
    scenes = [sample_scene(seed, "test", (1, 9)) for seed in range(num_scenes)]
    return float(np.mean([read(render(scene)) == scene for scene in scenes]))


def probes(model: Path) -> dict[str, dict]:
    """What a linear probe reads of the facts from the stock, the stretched and the trained encoder's token states."""
    sources = {
        "stock": (model, STOCK_POSITIONS),
        "stretch_untrained": (model, MAX_LENGTH),
        "long_encoder": (model / "finelip", MAX_LENGTH),
    }
    return {
        name: probe_text_states(*load_text_encoder(source, max_length=length, dtype=torch.float32), 1200)
        for name, (source, length) in sources.items()
    }


def shown(figure: dict) -> str:
    """A share and its interval as text."""
    if figure["value"] is None:
        return "-"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def table(report: dict) -> str:
    """The report's main figures in Markdown."""
    columns = ("found_before", "found_behind", "found_all", "background", "uncalled")
    lines = [
        "| UNet | encoder | found before token 77 | found behind | found, all | background | drawn uncalled |",
        "|---|---|---|---|---|---|---|",
    ]
    for condition, figures in report["conditions"].items():
        cells = [shown(figures[column]) for column in columns]
        lines.append(f"| {' | '.join([*condition.split('-'), *cells])} |")
    spans = [f"tokens {first} to {last - 1}" for first, last in pairwise(TOKEN_BINS)]
    lines += ["", "| found, by where the fact ends | " + " | ".join(spans) + " |", "|---|" + "---|" * len(spans)]
    for condition, figures in report["conditions"].items():
        cells = [shown(figures[f"found_at_{first}"]).split(" ")[0] for first in TOKEN_BINS[:-1]]
        lines.append(f"| {condition.replace('-', ', ')} | {' | '.join(cells)} |")
    lines += ["", "| probe of | " + " | ".join(ATTRIBUTES) + " |", "|---|" + "---|" * len(ATTRIBUTES)]
    for name, probe in report["probes"].items():
        lines.append(f"| {name} | " + " | ".join(f"{probe[attribute]['mean']:.3f}" for attribute in ATTRIBUTES) + " |")
    return "\n".join(lines) + "\n"


def main(args: Arguments) -> None:
    unknown = [name for name in args.encoders if name not in ENCODERS] + [u for u in args.unets if u not in UNETS]
    if unknown:
        raise SystemExit(f"Unknown condition {unknown[0]!r}: encoders are {list(ENCODERS)}, UNets {list(UNETS)}.")
    if args.num_prompts < 2 or args.batch_size < 1 or args.num_inference_steps < 1:
        raise SystemExit(
            "--num_prompts is at least 2 (an interval needs that), --batch_size and the steps at least 1."
        )
    if not (args.model / "finelip" / "unet").is_dir() and "adapted" in args.unets:
        raise SystemExit(
            f"{args.model} holds no finelip/unet: give a folder of train/train_scenes.py, or --unets base."
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    report: dict = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "backgrounds": list(BACKGROUNDS),
        "reader_on_rendered_scenes": check_reader(),
        "probes": probes(args.model),
        "conditions": {},
    }
    for unet in args.unets:
        for name in args.encoders:
            encoder, strategy = ENCODERS[name]
            condition = f"{unet}-{name}"
            rows = evaluate(condition, load_pipeline(args.model, encoder, unet), strategy, args)
            figures = report["conditions"][condition] = summary(rows)
            before, behind = shown(figures["found_before"]), shown(figures["found_behind"])
            tqdm.write(f"{condition:28}before {before}  behind {behind}")
    file = args.output_dir / "report.json"
    file.with_suffix(".part").write_text(json.dumps(report, indent=1))
    file.with_suffix(".part").rename(file)
    (args.output_dir / "report.md").write_text(table(report))


if __name__ == "__main__":
    logging.getLogger("finelip_diffusion").setLevel(logging.ERROR)  # dropped text is what is measured here
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
