"""Measures what a pipeline of the bundled world draws of prompts in everyone's words, and what find_facts reads.

    python train/evaluate_wordings.py --output_dir runs/wordings                      # the bundled model, every set
    python train/evaluate_wordings.py --output_dir runs/wordings --sets reading       # find_facts alone, seconds
    python train/evaluate_wordings.py --output_dir runs/other --finelip OTHER --compared_with runs/wordings

Sets: `splits`, held-out scenes in sentences, in any trained wording, in unseen wordings; `families`, each by itself;
`changes`, one change at a time to the same captions; `people`, prompts that no generator wrote; `anywhere`, one object
without a place; `window`, the longest captions, whose facts end after token 190; `reading`, precision and recall of
find_facts by family; `sample`, a sheet of pictures with what the reader says of each, to be checked by eye.
`OUTPUT_DIR/report.json` has every prompt, `report.md` the tables; where a row mixes wordings, one more by wording.
`--compared_with` adds the difference from another run on the same prompts, which tells more than two intervals do.
Intervals are 95% bootstrap intervals over prompts.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image, ImageDraw
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from finelip_diffusion.evaluation.intervals import bootstrap_interval, markdown_table, shown
from finelip_diffusion.files import writing
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.pipeline import FineLIPStableDiffusionPipeline
from finelip_diffusion.prompts import LongPrompt
from finelip_diffusion.scenes import (
    CHANGES,
    FAMILIES,
    IMAGE_SIZE,
    Caption,
    Fact,
    Object,
    as_record,
    describe,
    find_facts,
    findings,
    read,
    repainted,
    sample_for,
    sample_scene,
    telling,
)
from finelip_diffusion.text_encoder import MAX_LENGTH
from finelip_diffusion.tokenizer import clip_tokenizer

SETS = ("splits", "families", "changes", "people", "anywhere", "window", "reading", "sample")
LONG, FAR = 200, 190  # tokens of a caption that is long, and the token after which a fact ends late
FREE = {"output_dir", "sets", "resume", "compared_with"}  # flags that may change from a run to the one that resumes it
SIDES = ("found", "before", "after", f"after {FAR}")
PEOPLE = Path(__file__).resolve().parents[1] / "examples" / "peoples_words.json"


@dataclass
class Arguments:
    """The defaults make the figures of docs/scenes.md, in an hour on two cores."""

    output_dir: Path = field(metadata={"help": "The folder where report.json and report.md are written."})
    model: Path = field(default=BUNDLED_MODEL, metadata={"help": "The folder of a pipeline for the bundled world."})
    finelip: str | None = field(
        default=None,
        metadata={"help": "The long encoder of the model. The default is finelip/ in the folder of --model."},
    )
    unet: Path | None = field(
        default=None, metadata={"help": "The folder of a UNet to use instead of the model's own."}
    )
    repainted: bool = field(
        default=False,
        metadata={"help": "Whether that UNet is of the stage restyle of train_scenes.py, whose colors are exchanged."},
    )
    long_prompt: LongPrompt = field(default="stretch", metadata={"help": "The strategy for reading long prompts."})
    sets: list[str] = field(
        default_factory=lambda: list(SETS), metadata={"help": f"The sets to measure: {', '.join(SETS)}."}
    )
    num_prompts: int = field(default=100, metadata={"help": "The number of held-out scenes per row."})
    first_seed: int = field(
        default=0,
        metadata={
            "help": "The seed of the first prompt. Prompt i uses this seed plus i for its scene, caption and noise."
        },
    )
    resume: bool = field(
        default=False,
        metadata={"help": "Whether to keep the rows that an earlier run with the same settings left in --output_dir."},
    )
    compared_with: Path | None = field(
        default=None,
        metadata={"help": "The --output_dir of another run with the same prompts, to tell the differences from it."},
    )
    num_inference_steps: int = field(default=20, metadata={"help": "The number of denoising steps."})
    guidance_scale: float = field(default=3.0, metadata={"help": "The scale of classifier-free guidance."})
    batch_size: int = field(default=25, metadata={"help": "The number of images per batch."})

    def __post_init__(self) -> None:
        for name, least in {"num_prompts": 2, "batch_size": 1, "num_inference_steps": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be at least {least}.")
        if self.unet is not None and not (self.unet / "config.json").is_file():
            raise ValueError(f"--unet {self.unet} has no config.json in it: give the folder of a UNet.")
        if self.repainted and self.unet is None:
            raise ValueError("--repainted is for a UNet of the stage restyle of train_scenes.py: give it as --unet.")
        if unknown := set(self.sets) - set(SETS):
            raise ValueError(f"--sets has {', '.join(sorted(unknown))}: choose among {', '.join(SETS)}.")
        if self.compared_with is not None and not (self.compared_with / "report.json").is_file():
            raise ValueError(
                f"--compared_with {self.compared_with} has no report.json in it: give a run's --output_dir."
            )


def people() -> list[Caption]:
    """The prompts of examples/peoples_words.json. Where one names no size, either is right: that fact's size is ""."""
    captions = []
    for row in json.loads(PEOPLE.read_text(encoding="utf-8")):
        objects = (Object(item["cell"], item["shape"], item["colour"], item["size"] or "") for item in row["objects"])
        captions.append(Caption(row["prompt"], [Fact(item, 0, len(row["prompt"])) for item in objects]))
    return captions


def anywhere(args: Arguments) -> list[Caption]:
    """Prompts of one object that name no place."""
    scenes = ((sample_for("unplaced", seed, "test"), seed) for seed in itertools.count(args.first_seed))
    alone = ((scene, seed) for scene, seed in scenes if len(scene.objects) == 1)
    return [describe(*each, wording="unplaced") for each in itertools.islice(alone, args.num_prompts)]


def longest(wording: str, args: Arguments) -> list[Caption]:
    """Captions that fill most of a long encoder's window, and fit it."""
    tokenizer, seeds = clip_tokenizer(MAX_LENGTH), itertools.count(args.first_seed)
    told = (describe(sample_for(wording, seed, "test"), seed, **telling(wording)) for seed in seeds)
    kept = (caption for caption in told if LONG <= len(tokenizer(str(caption)).input_ids) <= MAX_LENGTH)
    return list(itertools.islice(kept, args.num_prompts))


def rows_of(name: str, args: Arguments) -> dict[str, list[Caption]]:
    """Captions of each row of a set."""
    seeds = range(args.first_seed, args.first_seed + args.num_prompts)
    if name == "people":
        return {"people's words": people()}
    if name == "anywhere":
        return {"one object, no place": anywhere(args)}
    if name == "window":
        return {f"{wording}, {LONG} tokens or more": longest(wording, args) for wording in ("sentences", "late")}
    if name == "changes":
        return {change: [tell(sample_scene(seed, "test"), seed) for seed in seeds] for change, tell in CHANGES.items()}
    wordings = (
        ("sentences", "all", "unseen") if name == "splits" else [each for names in FAMILIES.values() for each in names]
    )
    return {
        each: [describe(sample_for(each, seed, "test"), seed, **telling(each)) for seed in seeds] for each in wordings
    }


def drawn(pipe: FineLIPStableDiffusionPipeline, captions: list[Caption], args: Arguments, name: str) -> list[dict]:
    """Draws captions, and says of each prompt which of its facts are found."""
    rows = []
    for caption, image in zip(captions, pictures(pipe, captions, args, name), strict=True):
        shown_scene = repainted(read(image), back=True) if args.repainted else read(image)
        found: list[dict[str, Any]]
        if name == "one object, no place":
            wanted = caption.facts[0].object
            looks = [(item.shape, item.colour, item.size) for item in shown_scene.objects]
            found = [{"found": (wanted.shape, wanted.colour, wanted.size) in looks, "after": False}]
        else:
            found = [as_record(finding) for finding in findings(caption, shown_scene, pipe.tokenizer)]
            for record, fact in zip(found, caption.facts, strict=True):
                if not fact.object.size:
                    record["found"] = bool(record["shape"] and record["colour"])
        rows.append({"prompt": str(caption), "facts": found})
    return rows


def pictures(
    pipe: FineLIPStableDiffusionPipeline, captions: list[Caption], args: Arguments, name: str
) -> Iterator[Image.Image]:
    """Draws captions, each from the noise of its own seed."""
    for first in tqdm(range(0, len(captions), args.batch_size), desc=name, mininterval=5):
        batch = captions[first : first + args.batch_size]
        yield from pipe(
            [str(caption) for caption in batch],
            long_prompt=args.long_prompt,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(args.first_seed + first + i) for i in range(len(batch))],
        ).images


def sheet(pipe: FineLIPStableDiffusionPipeline, args: Arguments) -> Image.Image:
    """Pictures of trained and unseen wordings in turn, five a row, each beside what the reader says of its cells."""
    captions, width, height = [], 2 * IMAGE_SIZE + 12, IMAGE_SIZE + 6
    for seed in range(args.first_seed, args.first_seed + args.num_prompts):
        name = ("unseen", "all")[seed % 2]
        captions.append(describe(sample_scene(seed, "test"), seed, **telling(name)))
    page = Image.new("RGB", (5 * width, -(-len(captions) // 5) * height), "white")
    pen = ImageDraw.Draw(page)
    for number, image in enumerate(pictures(pipe, captions, args, "sample")):
        x, y = number % 5 * width, number // 5 * height
        page.paste(image, (x, y))
        scene = repainted(read(image), back=True) if args.repainted else read(image)
        pen.text((x + IMAGE_SIZE + 4, y), f"{args.first_seed + number} {scene.background}", fill="black")
        for item in scene.objects:
            place = (x + IMAGE_SIZE + 4 + item.cell % 3 * 50, y + 18 + item.cell // 3 * 42)
            pen.text(place, f"{item.size}\n{item.colour}\n{item.shape}", fill="black", font_size=9)
    return page


def figures(rows: list[dict]) -> dict[str, Any]:
    """Recall of a row: of all facts, of those before token 77, of those after it, and of those after token `FAR`."""
    kinds: tuple[Callable[[dict], bool], ...] = (
        lambda fact: True,
        lambda fact: not fact["after"],
        lambda fact: fact["after"],
        lambda fact: fact.get("token", 0) > FAR,
    )
    result = {}
    for key, counts in zip(SIDES, kinds, strict=True):
        kept = [(number, fact["found"]) for number, row in enumerate(rows) for fact in row["facts"] if counts(fact)]
        values = torch.tensor([found for _, found in kept], dtype=torch.float64)
        result[key] = bootstrap_interval(values, torch.tensor([number for number, _ in kept], dtype=torch.long))
    return result


def by_wording(rows: list[dict]) -> dict[str, dict[str, Any]]:
    """The same of each wording of a row, where it has several."""
    wordings = sorted({row["wording"] for row in rows} - {None})
    several = len(wordings) > 1
    return {each: figures([row for row in rows if row["wording"] == each]) for each in wordings if several}


def difference(rows: list[dict], others: list[dict]) -> dict[str, Any]:
    """How much more of its facts a prompt has than in another run, the mean over prompts."""
    shares = [
        [fmean(fact["found"] for fact in row["facts"]) for row in side if row["facts"]] for side in (rows, others)
    ]
    return bootstrap_interval(torch.tensor(shares[0]) - torch.tensor(shares[1]))


def other_run(args: Arguments, told: dict[str, dict[str, list[Caption]]]) -> dict[str, dict[str, list[dict]]]:
    """The prompts of `--compared_with`, which has to have drawn the same ones."""
    if args.compared_with is None:
        return {}
    sets = json.loads((args.compared_with / "report.json").read_text(encoding="utf-8"))["sets"]
    others = {name: {row: sets.get(name, {}).get(row, {}).get("prompts", []) for row in told[name]} for name in told}
    for name, rows in told.items():
        for row, captions in rows.items():
            if [str(caption) for caption in captions] != [other["prompt"] for other in others[name][row]]:
                raise ValueError(
                    f"--compared_with {args.compared_with} has other prompts of {name}, {row}: give both runs "
                    "the same --sets, --num_prompts and --first_seed."
                )
    return others


def rows_done(args: Arguments) -> dict[str, Any]:
    """The sets that an earlier run left in the output folder, if this one resumes it."""
    file = args.output_dir / "report.json"
    if not (args.resume and file.is_file()):
        return {}
    report, now = json.loads(file.read_text(encoding="utf-8")), settings(args)
    others = [f"--{name}" for name in sorted(now.keys() - FREE) if report["settings"].get(name) != now[name]]
    if others:
        raise ValueError(
            f"--resume: the run in {args.output_dir} has other settings of {', '.join(others)}: give the same ones, "
            "or another --output_dir."
        )
    return report["sets"]


def settings(args: Arguments) -> dict[str, str]:
    """All flags, as the report has them."""
    return {key: str(value) for key, value in asdict(args).items()}


def reading(args: Arguments) -> dict[str, dict[str, Any]]:
    """Precision and recall of find_facts, by family, without and with noise, and of the people's words."""
    sets = {}
    for split, names in FAMILIES.items():
        for name in names:
            for noise in (False, True):
                sets[f"{name}{', noise' if noise else ''}"] = [
                    describe(sample_for(name, seed, "test"), seed, wording=name, split=split, noise=noise)
                    for seed in range(args.first_seed, args.first_seed + args.num_prompts)
                ]
    sets["people's words"] = people()
    result = {}
    for name, captions in sets.items():
        right, stated, found = [], [], []
        for number, caption in enumerate(captions):
            one = {fact.object for fact in caption.facts}
            other = {fact.object for fact in find_facts(str(caption)).facts}
            right += [(number, item in one) for item in other]
            found += [(number, item in other) for item in one]
            stated.append(len(one))
        result[name] = {
            key: bootstrap_interval(
                torch.tensor([hit for _, hit in hits]), torch.tensor([number for number, _ in hits])
            )
            for key, hits in (("precision", right), ("recall", found))
        }
    return result


def table(title: str, rows: dict[str, Any]) -> list[str]:
    """Rows of figures in Markdown."""
    known = (*SIDES, "difference", "precision", "recall")
    keys = [key for key in known if all(key in result for result in rows.values())]
    whole = "found" if "found" in keys else "recall"
    cells = [
        [row, *(shown(result[key], sign=key == "difference") for key in keys), str(result[whole]["n"])]
        for row, result in rows.items()
    ]
    return [f"## {title}", "", *markdown_table([title.split(", ")[-1], *keys, "facts"], cells), ""]


def tables(report: dict[str, Any]) -> str:
    """All sets in Markdown."""
    lines = []
    for name, rows in report["sets"].items():
        lines += table(name, rows)
        for row, result in rows.items():
            if result.get("wordings"):
                lines += table(f"{name}, {row}, by wording", result["wordings"])
    return "\n".join(lines)


def main(args: Arguments) -> None:
    told = {name: rows_of(name, args) for name in args.sets if name not in ("reading", "sample")}
    others, done = other_run(args, told), rows_done(args)
    report: dict[str, Any] = {"settings": settings(args), "sets": done}
    pipe: Any = None
    if set(args.sets) - {"reading"}:
        finelip = args.finelip or str(args.model / "finelip")
        parts = {} if args.unet is None else {"unet": UNet2DConditionModel.from_pretrained(args.unet)}
        pipe = FineLIPStableDiffusionPipeline.from_pretrained(args.model, finelip=finelip, **parts)
        pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        pipe.set_progress_bar_config(disable=True)
    for name in args.sets:
        if name == "reading":
            done[name] = reading(args)
            write(report, args.output_dir)
        elif name == "sample":
            with writing(args.output_dir / "sample.png") as file:
                sheet(pipe, args).save(file, "PNG")
        for row, captions in told.get(name, {}).items():
            prompts = done.get(name, {}).get(row, {}).get("prompts", [])
            if [each["prompt"] for each in prompts] != [str(caption) for caption in captions]:
                prompts = drawn(pipe, captions, args, row)
            for each, caption in zip(prompts, captions, strict=True):  # reports of older versions do not name it
                each["wording"] = caption.wording
            compared = {"difference": difference(prompts, others[name][row])} if others else {}
            done.setdefault(name, {})[row] = figures(prompts) | compared | {
                "wordings": by_wording(prompts), "prompts": prompts,
            }  # fmt: skip
            write(report, args.output_dir)
    tqdm.write(tables(report))


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes what there is of a report."""
    with writing(folder / "report.json") as data, writing(folder / "report.md") as page:
        data.write_text(json.dumps(report, indent=1), encoding="utf-8")
        page.write_text(tables(report), encoding="utf-8")


if __name__ == "__main__":
    logging.getLogger("finelip_diffusion").setLevel(logging.ERROR)  # what `truncate` drops is meant here
    try:
        main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
    except ValueError as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from error
