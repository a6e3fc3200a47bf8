"""Measures how well models find images by captions and captions by images, and whether they read captions to the end.

    python train/evaluate_retrieval.py --model runs/finelip/finelip_model --output_dir runs/retrieval    # on scenes
    python train/evaluate_retrieval.py --model runs/finelip-b16/finelip_model openai/clip-vit-base-patch16 \\
        --data scenes data/Urban1k data/docci --output_dir runs/retrieval --batch_size 128 --mixed_precision bf16

A gallery is `scenes` (held-out near-duplicates that only text after token 77 tells apart) or whatever
`finelip_diffusion.data.datasets.open_dataset` reads: Urban1k, DOCCI, COCO, Karpathy's files of COCO and Flickr30k,
imagefolders, JSON lines. `OUTPUT_DIR/report.json` has each figure with its 95% bootstrap interval, the rank of every
query and the tokens read of every caption; `report.md` has the main ones as tables. docs/retrieval.md says what they
mean.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from torch.utils.data import IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from finelip_diffusion.data.datasets import open_dataset
from finelip_diffusion.evaluation.intervals import markdown_table, shown
from finelip_diffusion.evaluation.retrieval import DIRECTIONS, VIEWS, embed_gallery, evaluate, scenes_gallery
from finelip_diffusion.files import writing
from finelip_diffusion.heads import load_heads, own_score
from finelip_diffusion.locations import locate
from finelip_diffusion.model import GLOBAL_SHARE, load_clip

OWN_SCORES = {"laps": "LAPS", "flair": "FLAIR, text-conditioned", "filip": "FILIP"}


@dataclass
class Arguments:
    """The defaults measure on a thousand scenes."""

    output_dir: Path = field(metadata={"help": "The folder where report.json and report.md are written."})
    model: list[str] = field(
        metadata={
            "help": "The models to evaluate: finelip_model folders of finetune_encoder.py, or CLIPs as "
            "folders, hub ids or files.",
            "action": "extend",
        }
    )
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "The data to search: folders, files or scenes. The default is scenes.", "action": "extend"},
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
    num_captions: int | None = field(
        default=None,
        metadata={
            "help": "The number of captions, from the start of the data. It does not apply to scenes. The "
            "default is all."
        },
    )
    num_groups: int = field(default=128, metadata={"help": "The number of groups of eight scenes."})
    seed: int = field(default=0, metadata={"help": "The random seed that selects the scenes."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "The number of tokens to which CLIPs are stretched, without training. The default leaves "
            "them as they are."
        },
    )
    views: list[str] = field(
        default_factory=lambda: [view for view in VIEWS if view != "sentences"],
        metadata={
            "help": f"The views of the captions: whole, and any of {', '.join(VIEWS[1:])}. With sentences, each "
            "sentence is a separate query, which takes several times as long."
        },
    )
    global_share: float = field(
        default=GLOBAL_SHARE, metadata={"help": "The weight of the global cosine in the score FineLIP*."}
    )
    batch_size: int = field(
        default=64, metadata={"help": "The number of images or captions per batch. It only affects speed."}
    )
    num_workers: int = field(default=0, metadata={"help": "The number of subprocesses that decode images."})
    mixed_precision: Literal["no", "fp16", "bf16"] = field(
        default="no", metadata={"help": "The precision of the towers."}
    )

    def __post_init__(self) -> None:
        self.data = self.data or ["scenes"]
        least = {"num_captions": 2, "num_groups": 1, "batch_size": 1, "num_workers": 0}
        for name, bound in least.items():
            if (value := getattr(self, name)) is not None and value < bound:
                raise ValueError(f"--{name} is {value}, but must be at least {bound}.")
        if not 0 <= self.global_share <= 1:
            raise ValueError(f"--global_share is {self.global_share}, but a share lies in 0..1.")
        if "whole" not in self.views or set(self.views) - set(VIEWS):
            raise ValueError(f"--views are {' '.join(self.views)}: give whole, and any of {', '.join(VIEWS[1:])}.")


def open_gallery(data: str, args: Arguments) -> Any:
    """The examples of a gallery, and what was found unusable while they were listed."""
    if data == "scenes":
        return scenes_gallery(args.num_groups, args.seed)
    dataset = open_dataset(
        data,
        split=args.split,
        image_root=args.image_root,
        image_column=args.image_column,
        caption_column=args.caption_column,
    )
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{data} is a stream without an end: give a folder or a list.")
    if args.num_captions is not None:
        return Subset(dataset, range(min(args.num_captions, len(dataset))))
    return dataset


def tables(report: dict) -> str:
    """The report's main figures in Markdown, gallery by gallery; report.json has all of them."""
    share = report["settings"]["global_share"]
    names = {"global": "global cosine", "finelip": f"FineLIP* ({share:g} global)"} | OWN_SCORES
    lines = []
    for data, results in report["galleries"].items():
        first = next(iter(results.values()), None)
        if first is None:  # not measured yet
            continue
        columns = ("R@1", "group_R@1" if first["groups"] < first["images"] else "R@10")
        counts = f"{first['images']} images in {first['groups']} groups, {first['captions']} captions."
        lines += [f"## {data}", "", counts, ""]
        for direction in DIRECTIONS:
            rows = []
            for model, result in results.items():
                scores = dict.fromkeys(name.split("/")[1] for name in result["ranks"])
                for view in result["views"]:
                    for score in scores:
                        figures = [result["figures"][f"{view}/{score}/{direction}/{column}"] for column in columns]
                        rows.append([model, view, names[score], *map(shown, figures)])
            heads = ["model", "captions", "score", *(column.replace("_", " ") for column in columns)]
            lines += [f"### {direction.replace('_', ' ').capitalize()}", "", *markdown_table(heads, rows), ""]
        rows = []
        for model, result in results.items():
            read = result["views"]["whole"]["read"]
            cut = sum(kept < length for kept, length in zip(read, result["lengths"], strict=True))
            himo = shown(result["figures"].get("himo"))
            rows.append([model, himo, f"{cut} of {len(read)}", f"{max(read)} tokens", str(len(result["skipped"]))])
        lines += markdown_table(["model", "HiMo@K", "captions cut", "longest read", "examples skipped"], rows)
        lines.append("")
    return "\n".join(lines)


def write(report: dict, folder: Path) -> None:
    """Writes the report as far as it goes, atomically."""
    for name, text in (("report.json", json.dumps(report)), ("report.md", tables(report))):
        with writing(folder / name) as part:
            part.write_text(text, encoding="utf-8")


def main(args: Arguments) -> None:
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if accelerator.num_processes > 1:
        raise ValueError(f"this runs in one process, not {accelerator.num_processes}: leave --num_processes out.")
    for source in args.model:
        locate(source, None, {})  # a wrong name is known before anything is computed
    galleries = {data: open_gallery(data, args) for data in args.data}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    report: dict[str, Any] = {"settings": settings, "galleries": {data: {} for data in galleries}}

    def progress(items: Any, name: str) -> Any:
        return tqdm(items, desc=name, leave=False, mininterval=1)

    for source in args.model:
        model, tokenizer, image_processor = load_clip(source, max_length=args.max_length)
        model = model.to(accelerator.device).eval()
        own = own_score(model, load_heads(source))
        for data, examples in galleries.items():
            with accelerator.autocast():
                gallery = embed_gallery(
                    model, tokenizer, image_processor, examples, args.batch_size,
                    views=args.views, own=own, himo=True, num_workers=args.num_workers, progress=progress,
                )  # fmt: skip
            result = evaluate(gallery, args.global_share, accelerator.device, progress)
            report["galleries"][data][source] = result
            figures = [shown(result["figures"][f"whole/finelip/{direction}/R@1"]) for direction in DIRECTIONS]
            tqdm.write(f"{source}, {data}: FineLIP* R@1 image to text {figures[0]}, text to image {figures[1]}")
            write(report, args.output_dir)


if __name__ == "__main__":
    try:
        main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
    except ValueError as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from error
