"""Scores of folders of pictures, whatever drew them: the same figures as an evaluation's, without a pipeline."""

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.sources import CAPTION_COLUMNS, IMAGE_COLUMNS, IMAGE_SUFFIXES, Unusable, open_image
from ..files import writing
from ..tokenizer import clip_tokenizer
from .adherence import Judge
from .comparison import Eye, Panel, compare, firsts
from .images import Condition, Prompt
from .judging import Asked, Kept, ask, sheet_of
from .promptsets import PROMPT_SETS, Item, cut, find_pictures, read_dpg, read_set, split_source

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def silent(items: Iterable[Any], name: str) -> Iterable[Any]:
    """Shows no progress."""
    return items


@dataclass(frozen=True)
class Pictures:
    """Folders of pictures with their prompts.

    Attributes:
        prompts: by kind, as in an evaluation; with empty texts where nothing is known.
        files: by (folder, kind, number of the prompt, which of several), where a picture is.
        warnings: what was left out.
        source: where the prompts come from.
        prompt_set: of `PROMPT_SETS`, or None.
    """

    prompts: dict[str, list[Prompt]]
    files: dict[tuple[str, str, int, int], Path]
    warnings: list[str] = field(default_factory=list)
    source: str = "the pictures"
    prompt_set: str | None = None


# ----------------------------------------------------------------------------------------------- pictures and prompts


def list_pictures(folder: Path) -> dict[str, Path]:
    """Pictures of a folder, and of those below it, by their path in it without the suffix, in order.

    Raises:
        ValueError: If there is none, or two differ in their suffix alone.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one with pictures in it.")
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if file.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and not any(
            part.startswith(".") for part in inside.parts
        ):
            name = inside.with_suffix("").as_posix()
            if name in found:
                raise ValueError(f"{found[name]} and {file} have one name: keep one of them.")
            found[name] = file
    if not found:
        raise ValueError(f"{folder} holds no pictures: {', '.join(IMAGE_SUFFIXES)}.")
    return found


def own_prompt(file: Path) -> str:
    """The prompt that comes with a picture: a text file of its name, or what the program that drew it wrote into it
    (`prompt`, as here; `parameters`, as A1111's and others). Empty where there is none."""
    if (text := file.with_suffix(".txt")).is_file():
        return text.read_text(encoding="utf-8").strip()
    with Image.open(file) as image:
        info = dict(image.info)
    if isinstance(info.get("prompt"), str) and not info["prompt"].lstrip().startswith("{"):  # ComfyUI has its graph
        return info["prompt"].strip()
    if isinstance(info.get("parameters"), str):
        return info["parameters"].split("\nNegative prompt:")[0].split("\nSteps:")[0].strip()
    return ""


def read_prompt_file(file: Path, names: Sequence[str]) -> dict[str, str]:
    """Prompts by picture.

    Args:
        file: `.txt`, a prompt a line, in the order of the pictures; `.json`, {picture: prompt} or rows; `.jsonl` or
            `.csv`, rows with a picture and a prompt.
        names: of the pictures, without their suffixes.

    Raises:
        ValueError: If it cannot be read, or has another number of lines than there are pictures.
    """
    if file.suffix not in (".txt", ".json", ".jsonl", ".csv"):
        raise ValueError(f"{file} is not .txt, .json, .jsonl or .csv, nor {', '.join(PROMPT_SETS)} with a folder.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".txt":
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if len(lines) != len(names):
                raise ValueError(f"{file} has {len(lines)} lines for {len(names)} pictures: give a prompt for each.")
            return dict(zip(names, lines, strict=True))
        if file.suffix == ".csv":
            rows: Any = list(csv.DictReader(text.splitlines()))
        elif file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())}).") from error
    if isinstance(rows, dict):
        return {_name(key): str(value) for key, value in rows.items()}
    found = {}
    for row in rows:
        image = next((row[column] for column in IMAGE_COLUMNS if row.get(column)), None)
        prompt = next((row[column] for column in ("prompt", *CAPTION_COLUMNS) if row.get(column)), None)
        if image is None or not isinstance(prompt, str):
            raise ValueError(f"{file} has a row without a picture or a prompt: it needs the columns image and prompt.")
        found[_name(image)] = prompt
    return found


def _name(image: Any) -> str:
    return Path(str(image)).with_suffix("").as_posix()


def gather(folders: Mapping[str, Path], prompts: str | None, copies: int, quirks: bool, cuts: Path) -> Pictures:
    """Pictures that all folders have, with their prompts.

    Args:
        folders: by name.
        prompts: a file, NAME:FOLDER of a set, or None for the pictures' own.
        copies: pictures of a prompt, in a set.
        quirks: reads DPG-Bench as its own script does.
        cuts: where the pictures of grids are written to, one by one.

    Raises:
        ValueError: If there are none, or a prompt is missing.
    """
    if prompts is not None and (found := split_source(prompts)) is not None:
        name, source = found
        items = read_dpg(Path(source), quirks=True) if quirks else read_set(name, source)
        return _of_set(folders, name, items, prompts, copies, cuts)
    listed = {name: list_pictures(folder) for name, folder in folders.items()}
    everywhere = [key for key in next(iter(listed.values())) if all(key in own for own in listed.values())]
    if not everywhere:
        raise ValueError(f"{' and '.join(map(str, folders.values()))} have no pictures of one name: name them alike.")
    warnings = [
        f"{len(own) - len(everywhere)} pictures of {name} are not in every folder and were left out."
        for name, own in listed.items()
        if len(own) > len(everywhere)
    ]
    if prompts is None:
        first = next(iter(listed.values()))
        texts = {key: own_prompt(first[key]) for key in everywhere}
        if not all(texts.values()):
            missing = sum(not text for text in texts.values())
            if missing < len(texts):
                warnings.append(f"{missing} pictures have no prompt with them, so no prompt was used: give --prompts.")
            texts = dict.fromkeys(everywhere, "")
    else:
        texts = read_prompt_file(Path(prompts), everywhere)
        texts |= {key: texts[short] for key in everywhere if key not in texts and (short := Path(key).name) in texts}
        if missing_keys := [key for key in everywhere if not texts.get(key)]:
            raise ValueError(f"{prompts} has no prompt for {missing_keys[0]} and {len(missing_keys) - 1} others.")
    long = [Prompt("long", index, texts[key], key) for index, key in enumerate(everywhere)]
    files = {
        (name, "long", index, 0): own[key] for name, own in listed.items() for index, key in enumerate(everywhere)
    }
    source = "the pictures" if prompts is None else Path(prompts).name
    return Pictures({"long": long, "short": [], "changed": []}, files, warnings, source)


def _of_set(
    folders: Mapping[str, Path], name: str, items: list[Item], source: str, copies: int, cuts: Path
) -> Pictures:
    own, files = PROMPT_SETS[name], dict[tuple[str, str, int, int], Path]()
    numbers = {item.name: number for number, item in enumerate(items)}
    for folder, path in folders.items():
        seen: dict[tuple[str, int], int] = {}
        for item, kind, file in find_pictures(name, items, path, 1 if own.grid else copies):
            place = kind, numbers[item.name]
            if own.grid and copies > 1:
                for copy in range(copies):
                    part = cuts / folder / f"{place[1]:06d}-{copy}.png"
                    with writing(part) as stage:
                        cut(_open(file), copy, copies).save(stage)
                    files[(folder, *place, copy)] = part
            else:
                files[(folder, *place, seen.get(place, 0))] = file
                seen[place] = seen.get(place, 0) + 1
    prompts: dict[str, list[Prompt]] = {"long": [], "short": [], "changed": []}
    for kind in ("long", "short"):
        for number, item in enumerate(items):
            if all((folder, kind, number, copy) in files for folder in folders for copy in range(copies)):
                text = item.text if kind == "long" else item.short
                prompts[kind] += [
                    Prompt(kind, number, text, item.name, questions=item.questions, category=item.category, copy=copy)
                    for copy in range(copies)
                ]
    found = len(firsts(prompts["long"]))
    if not found:
        places = own.place(items[0], 0, "long", "MODEL")
        raise ValueError(f"{' and '.join(map(str, folders.values()))} hold no pictures of {name}, such as {places}.")
    warnings = [] if found == len(items) else [f"{found:,} of the {len(items):,} prompts of the set have pictures."]
    return Pictures(prompts, files, warnings, source, name)


def _open(file: Path) -> Image.Image:
    try:
        return open_image(str(file))
    except Unusable as error:
        raise ValueError(f"{file} cannot be scored: {error}; draw or fetch it again.") from error


# ------------------------------------------------------------------------------------------------------------ scoring


def score_folders(
    pictures: Pictures,
    folders: Mapping[str, Path],
    reference: Path | None,
    eyes: Mapping[str, Eye],
    judges: Mapping[str, Asked],
    answers: Path,
    *,
    resamples: int = 100,
    num_examples: int = 4,
    quirks: bool = False,
    device: Any = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """The report on folders of pictures, less its title and command; the first folder is what others are compared to.

    Args:
        pictures: of the folders.
        folders: by name.
        reference: a folder of pictures that distances are taken to. Where it has the same names, its pictures belong
            to the same prompts, and are drawn with them for the intervals.
        eyes: features for distances, and CLIPs, by name.
        judges: by name.
        answers: folder where what judges say is kept.
        resamples: of the bootstrap of Frechet distances.
        num_examples: pictures of each kind on the page.
        quirks: counts DPG-Bench as its own script does.
        device: of the judges.
        progress: wraps what is iterated over, given its name.
    """
    prompts, files = pictures.prompts, pictures.files
    conditions = [Condition("", name, None, None, "truncate", str(folder)) for name, folder in folders.items()]

    def place(prompt: Prompt, condition: Condition, kind: str | None = None) -> Path:
        return files[condition.encoder, kind or prompt.kind, prompt.index, prompt.copy].absolute()

    seen: dict[tuple[str, str, str], np.ndarray] = {}
    told = any(prompt.text for prompt in prompts["long"])
    for name, eye in eyes.items():
        for condition in conditions:
            for kind in ("long", "short") if isinstance(eye, Judge) else ("long",):
                if prompts[kind] and (told if isinstance(eye, Judge) else reference is not None):
                    some = [place(prompt, condition) for prompt in prompts[kind]]
                    seen[name, condition.name, kind] = look(eye, some, progress, f"{name}, {condition.encoder}")
    paired, theirs = True, dict[int, Path]()
    if reference is not None:
        listed = list_pictures(reference)
        paired = len(listed) == len(prompts["long"]) and {prompt.name for prompt in prompts["long"]} == set(listed)
        order = [listed[prompt.name] for prompt in prompts["long"]] if paired else list(listed.values())
        theirs = {prompt.index: listed[prompt.name].absolute() for prompt in prompts["long"]} if paired else {}
        for name, eye in eyes.items():
            if not isinstance(eye, Judge):
                seen[name, "reference", "long"] = look(eye, order, progress, f"{name}, {reference.name}")
    panel = None
    if judges and told:
        tokenizer = clip_tokenizer(77)
        sheets = {
            kind: [sheet_of(prompt.text, prompt.questions, tokenizer) for prompt in firsts(prompts[kind])]
            for kind in ("long", "short")
        }
        kept, said = Kept(answers), {}
        for name, judge in judges.items():
            for condition in conditions:
                for kind in (kind for kind in ("long", "short") if prompts[kind]):
                    numbers = {prompt.index: number for number, prompt in enumerate(firsts(prompts[kind]))}
                    said[name, condition.name, kind] = [
                        ask(judge, _open(place(prompt, condition)), sheets[kind][numbers[prompt.index]], kept)
                        for prompt in progress(prompts[kind], f"{name}, {condition.encoder}")
                    ]
        own = PROMPT_SETS.get(pictures.prompt_set or "")
        panel = Panel(judges, said, sheets, own is not None and own.cascade, own.groups if own else None, quirks)
    report = compare(
        conditions, prompts, {name: eye for name, eye in eyes.items() if told or not isinstance(eye, Judge)}, seen,
        Path("/"), clip_tokenizer(77), {},
        panel=panel, references=("original",) if reference is not None else (), resamples=resamples,
        num_examples=num_examples, baseline=conditions[0].encoder, place=place, reference_place=theirs.get,
        paired=paired,
    )  # fmt: skip
    report["prompts"]["source"] = pictures.source
    report["warnings"] = pictures.warnings + report["warnings"]
    if reference is not None and not paired:
        report["warnings"].append(
            f"{reference} has pictures of other names, so the two sides are drawn each by itself for the intervals."
        )
    return report


def look(eye: Eye, files: Sequence[Path], progress: Progress, name: str) -> np.ndarray:
    """What an eye makes of pictures, (N, D) in float32."""
    rows = []
    for first in progress(range(0, len(files), 32), name):
        images = [_open(file) for file in files[first : first + 32]]
        found = eye.embed_images(images) if isinstance(eye, Judge) else eye(images)
        rows.append(found.float().cpu().numpy())
    return np.concatenate(rows)
