"""Counts how often the UNet's attention to a sentence peaks in the cell of the object that the sentence is about.

    python train/evaluate_attention.py --output_dir runs/attention                     # the bundled model, 200 prompts
    python train/evaluate_attention.py --output_dir runs/attention --num_prompts 20    # a first look

Held-out scenes are drawn while attention is recorded, under every strategy. A sentence counts where an encoder reads
all of it. `fact` asks for the words that name the object and its place without what ends the sentence, `sentence` for
the whole of it. `OUTPUT_DIR/report.json` has each share with its 95% bootstrap interval over prompts, `report.md` the
table.
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from finelip_diffusion.attention import AttentionMaps, record_attention
from finelip_diffusion.evaluation.intervals import bootstrap_interval, markdown_table, shown
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.pipeline import FineLIPStableDiffusionPipeline
from finelip_diffusion.prompts import LongPrompt, PromptReport, sentence_spans
from finelip_diffusion.scenes import CELL_SIZE, Caption, describe, sample_scene

STRATEGIES: tuple[LongPrompt, ...] = ("stretch", "truncate", "chunk", "segment")
PARTS = ("sentence", "fact")


@dataclass
class Arguments:
    """The defaults make the figures of docs/app.md."""

    output_dir: Path = field(metadata={"help": "The folder where report.json and report.md are written."})
    model: Path = field(default=BUNDLED_MODEL, metadata={"help": "The folder of a pipeline that contains finelip/."})
    num_prompts: int = field(
        default=200, metadata={"help": "The number of held-out scenes, with four to nine objects each."}
    )
    first_seed: int = field(
        default=0,
        metadata={
            "help": "The seed of the first prompt. Prompt i uses this seed plus i for its scene, caption and noise."
        },
    )
    num_inference_steps: int = field(default=20, metadata={"help": "The number of denoising steps."})
    guidance_scale: float = field(default=3.0, metadata={"help": "The scale of classifier-free guidance."})
    batch_size: int = field(default=20, metadata={"help": "The number of images per batch. It only affects speed."})
    strategies: list[str] = field(
        default_factory=lambda: list(STRATEGIES),
        metadata={"help": f"The strategies to measure: {', '.join(STRATEGIES)}."},
    )

    def __post_init__(self) -> None:
        for name, least in {"num_prompts": 2, "batch_size": 1, "num_inference_steps": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be at least {least}.")
        if set(self.strategies) - set(STRATEGIES):
            raise ValueError(f"--strategies are {' '.join(self.strategies)}: choose among {', '.join(STRATEGIES)}.")


def peak_cell(maps: AttentionMaps, report: PromptReport, start: int, stop: int, image: int) -> int:
    """The cell, 0..8, in which attention to a part of the prompt is highest."""
    row, column = np.unravel_index(maps.of(report, start, stop, image).argmax(), maps.size)
    return int(row // CELL_SIZE * 3 + column // CELL_SIZE)


def batches(prompts: dict[int, tuple[Caption, PromptReport]], size: int) -> list[list[int]]:
    """Seeds of prompts that are drawn and recorded in one call: those whose states have one length."""
    lengths: dict[int, list[int]] = {}
    for seed, (_, report) in prompts.items():
        lengths.setdefault(report.readings[0].length, []).append(seed)
    return [seeds[first : first + size] for seeds in lengths.values() for first in range(0, len(seeds), size)]


def evaluate(pipe: FineLIPStableDiffusionPipeline, strategy: LongPrompt, args: Arguments) -> list[dict]:
    """One row for each sentence that was read: its prompt's seed, the object's cell, and the peak's for each part."""
    rows = []
    prompts = {}
    for seed in range(args.first_seed, args.first_seed + args.num_prompts):
        caption = describe(sample_scene(seed, "test"), seed)
        prompts[seed] = (caption, pipe.describe_prompt(str(caption), strategy))
    for batch in tqdm(batches(prompts, args.batch_size), desc=strategy, mininterval=5):
        captions, reports = zip(*(prompts[seed] for seed in batch), strict=True)
        with record_attention(pipe) as maps:
            pipe(
                [str(caption) for caption in captions],
                long_prompt=strategy,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in batch],
                output_type="latent",
            )
        for image, (seed, caption, report) in enumerate(zip(batch, captions, reports, strict=True)):
            for fact in caption.facts:
                start, stop = next(span for span in sentence_spans(caption) if span[0] <= fact.start < span[1])
                if stop > len(caption) - len(report.dropped):
                    continue
                peaks = {
                    "sentence": peak_cell(maps, report, start, stop, image),
                    "fact": peak_cell(maps, report, fact.start, fact.end, image),
                }
                rows.append({"seed": seed, "cell": fact.object.cell, **peaks})
    return rows


def table(report: dict) -> str:
    """The shares in Markdown."""
    rows = []
    for strategy, result in report["strategies"].items():
        figures = [result[part] for part in PARTS]
        rows.append([strategy, *map(shown, figures), str(figures[0]["n"]), str(result["prompts"])])
    return "\n".join(markdown_table(["long_prompt", *PARTS, "sentences", "prompts"], rows)) + "\n"


def main(args: Arguments) -> None:
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(args.model, finelip=args.model / "finelip")
    pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    report: dict = {"settings": settings, "strategies": {}}
    for strategy in (name for name in STRATEGIES if name in args.strategies):
        rows = evaluate(pipe, strategy, args)
        seeds = torch.tensor([row["seed"] for row in rows])
        report["strategies"][strategy] = {"prompts": len(seeds.unique()), "rows": rows} | {
            part: bootstrap_interval(torch.tensor([row[part] == row["cell"] for row in rows]), seeds) for part in PARTS
        }
    (args.output_dir / "report.json").write_text(json.dumps(report), encoding="utf-8")
    (args.output_dir / "report.md").write_text(table(report), encoding="utf-8")
    tqdm.write(table(report))


if __name__ == "__main__":
    logging.getLogger("finelip_diffusion").setLevel(logging.ERROR)  # dropped text is what is measured here
    try:
        main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
    except ValueError as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from error
