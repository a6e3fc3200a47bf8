"""Prompts and questions that others publish, read from the user's folder, and where their scripts look for pictures.

Every format was read in its authors' repository; docs/evaluation.md names it.
"""

import csv
import glob
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.sources import IMAGE_SUFFIXES, Unusable, open_image
from ..files import writing
from .questions import NUMBERS, ONE_WORD, TIIF_GROUPS, Question

logger = logging.getLogger(__name__)

GRID = 4  # pictures of a prompt that DPG-Bench's authors lay side by side, two by two


@dataclass(frozen=True)
class Item:
    """A prompt of a set.

    Attributes:
        name: what the set calls it.
        text: the prompt, the long one where there are two.
        short: the short one, or empty.
        questions: about a picture of it.
        category: of the prompt.
        number: its place within its category, where the set counts so; else within the set.
    """

    name: str
    text: str
    short: str = ""
    questions: tuple[Question, ...] = ()
    category: str = ""
    number: int = 0


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts as published.

    Attributes:
        read: folder or file -> prompts.
        place: (item, which of several pictures, `"long"` or `"short"`, name of what drew) -> where the authors' script
            looks for the picture.
        about: who publishes it.
        grid: whether several pictures of a prompt are one file, two by two.
        index: file beside the pictures that lists them, and what is in it, of (item, file) pairs.
        cascade: whether a question fails with whatever it hangs on, however far.
        groups: types of prompts by group, over which the authors average; else prompts count alike.
    """

    read: Callable[[Path], list[Item]]
    place: Callable[[Item, int, str, str], Path]
    about: str
    grid: bool = False
    index: tuple[str, Callable[[Sequence[tuple[Item, str]]], Any]] | None = None
    cascade: bool = False
    groups: dict[str, tuple[str, ...]] | None = None


def read_set(name: str, source: str | Path) -> list[Item]:
    """Reads a set of prompts.

    Args:
        name: of `PROMPT_SETS`.
        source: the folder that its authors publish, or the file in it.

    Raises:
        ValueError: If there is no such set, the folder is not one of it, or a file in it is not as its authors write
            it. One sentence.
    """
    if name not in PROMPT_SETS:
        raise ValueError(f"there is no prompt set {name!r}: choose among {', '.join(PROMPT_SETS)}.")
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"{source} does not exist: give the folder of {PROMPT_SETS[name].about}.")
    try:
        items = PROMPT_SETS[name].read(path)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{source} does not hold {PROMPT_SETS[name].about} as published: {type(error).__name__} {error}."
        ) from error
    if not items:
        raise ValueError(f"{source} holds no prompts of {PROMPT_SETS[name].about}.")
    return items


def split_source(data: str) -> tuple[str, str] | None:
    """`NAME:FOLDER` of a prompt set, or None where it is something else."""
    name, colon, source = data.partition(":")
    return (name, source) if colon and name in PROMPT_SETS else None


# ------------------------------------------------------------------------------------------------------------ reading


def _files(source: Path, pattern: str, about: str) -> list[Path]:
    """A file itself, or those of a pattern anywhere in a folder."""
    found = [source] if source.is_file() else sorted(source.rglob(pattern))
    if not found:
        raise ValueError(f"{source} holds no {pattern}: give the folder of {about}.")
    return found


def _only(source: Path, pattern: str, about: str) -> Path:
    found = _files(source, pattern, about)
    if len(found) > 1:
        raise ValueError(f"{source} holds {len(found)} files {pattern}: give one of {', '.join(map(str, found[:4]))}.")
    return found[0]


def _rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}, is not JSON: {error.msg}.") from error
    return rows


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _questions(file: Path, skip_first: bool = False) -> tuple[dict[str, list[Question]], dict[str, str]]:
    """Questions and prompts by item of a CSV of DSG's form, in the order of its lines.

    Args:
        file: with the columns `item_id`, `text`, `keywords`, `proposition_id`, `dependency` (`"1,2"`; 0 is none),
            `category_broad`, `category_detailed`, `tuple`, `question_natural_language`.
        skip_first: leaves the first line out, as the script of DPG-Bench does, and with it, as there, the prompt
            if another of its questions hangs on it.
    """
    rows: dict[str, list[dict[str, str]]] = {}
    with file.open(encoding="utf-8", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream)):
            if number or not skip_first:
                rows.setdefault(row["item_id"], []).append(row)
    lost, questions, texts = 0, dict[str, list[Question]](), dict[str, str]()
    for item, own in rows.items():
        places = {int(row["proposition_id"]): place for place, row in enumerate(own)}
        listed = [[int(part) for part in re.findall(r"\d+", row["dependency"] or "")] for row in own]
        absent = sum(parent not in places for parents in listed for parent in parents if parent)
        texts[item] = own[0]["text"]
        if absent and skip_first:
            continue
        lost += absent
        questions[item] = [
            Question(
                row["question_natural_language"],
                parents=tuple(places[parent] for parent in parents if parent in places),
                category=row["tuple"].partition("(")[0].strip(" -") or row["category_broad"],
                words=row["keywords"],
            )
            for row, parents in zip(own, listed, strict=True)
        ]
    if lost:
        logger.warning("%s: %d questions hang on one that is not there; they stand alone.", file, lost)
    return questions, texts


def read_dpg(source: Path, quirks: bool = False) -> list[Item]:
    """DPG-Bench (ELLA): `prompts/ID.txt` and `dpg_bench.csv`."""
    about = PROMPT_SETS["dpg"].about
    questions, _ = _questions(_only(source, "dpg_bench.csv", about), skip_first=quirks)
    prompts = {file.stem: file for file in _files(source, "prompts/*.txt", about)}
    if unknown := questions.keys() - prompts.keys():
        logger.warning("%s: %d prompts of the questions have no file, such as %s.", source, len(unknown), min(unknown))
    return [
        Item(name, prompts[name].read_text(encoding="utf-8").strip(), questions=tuple(questions.get(name, ())),
             number=number)
        for number, name in enumerate(sorted(prompts, key=_natural))
        if name in questions or not quirks
    ]  # fmt: skip


def read_dsg(source: Path) -> list[Item]:
    """DSG-1k: `dsg-1k-anns.csv`."""
    questions, texts = _questions(_only(source, "dsg-1k-anns.csv", PROMPT_SETS["dsg"].about))
    return [
        Item(name, text.strip(), questions=tuple(questions[name]), category=re.sub(r"_?\d+$", "", name), number=number)
        for number, (name, text) in enumerate(texts.items())
    ]


def read_tiif(source: Path) -> list[Item]:
    """TIIF-Bench: `*_prompts.jsonl`, and by the same line `*_eval_prompts.jsonl` beside them or in the folder whose
    name says `eval_prompts` where this one's says `prompts`."""
    about = PROMPT_SETS["tiif"].about
    files = [file for file in _files(source, "*_prompts.jsonl", about) if "eval_prompts" not in file.name]
    folders = sorted({file.parent for file in files})
    if len(folders) != 1:
        raise ValueError(f"{source} holds several sets: give one of {', '.join(map(str, folders))}.")
    items = []
    for file in files:
        name = file.name.replace("_prompts.jsonl", "_eval_prompts.jsonl")
        places = [
            file.with_name(name),
            file.parent.with_name(re.sub("prompts$", "eval_prompts", file.parent.name)) / name,
        ]
        asked = next((place for place in places if place.is_file()), None)
        if asked is None:
            raise ValueError(f"{file} has no questions: {places[1]} is missing.")
        prompts, rows = _rows(file), _rows(asked)
        if len(prompts) != len(rows):
            raise ValueError(
                f"{file} has {len(prompts)} lines, {asked} {len(rows)}: they belong together line by line."
            )
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            kind = prompt["type"]
            pairs = zip(row["yn_question_list"], row["yn_answer_list"], strict=True)
            questions = tuple(
                Question(text.strip(), _known(answer, ("yes", "no"), asked), category=kind) for text, answer in pairs
            )
            items.append(
                Item(
                    f"{kind}/{number}",
                    prompt["long_description"],
                    prompt["short_description"],
                    questions,
                    kind,
                    number,
                )
            )
    return items


def _known(answer: str, known: Sequence[str], file: Path) -> str:
    if (word := str(answer).strip().lower()) not in known:
        raise ValueError(f"{file} has the answer {answer!r}, which is not one of {', '.join(known)}.")
    return word


def read_geneval2(source: Path) -> list[Item]:
    """GenEval 2: `geneval2_data.jsonl` with `prompt`, `vqa_list` and `skills`."""
    file = _only(source, "geneval2_data.jsonl", PROMPT_SETS["geneval2"].about)
    items = []
    for number, row in enumerate(_rows(file)):
        pairs = zip(row["vqa_list"], row["skills"], strict=True)
        questions = tuple(
            Question(
                text,
                _known(answer, NUMBERS if text.startswith("How many") else ("yes", "no"), file),
                category=skill,
                asked=ONE_WORD.format(text),
            )
            for (text, answer), skill in pairs
        )
        items.append(Item(f"{number:06d}", row["prompt"], "", questions, f"{row['atom_count']} atoms", number))
    return items


def read_detailmaster(source: Path) -> list[Item]:
    """DetailMaster: a JSON list with `image_id`, `polished_prompt`, `dataset_target`. Its own score needs detectors
    of objects, so there are no questions."""
    file = _only(source, "DetailMaster*.json", PROMPT_SETS["detailmaster"].about)
    return [
        Item(
            f"{row['dataset_target']}_{row['image_id']}", row["polished_prompt"], "", (), row["dataset_target"], number
        )
        for number, row in enumerate(json.loads(file.read_text(encoding="utf-8")))
    ]


def read_longbench(source: Path) -> list[Item]:
    """LongBench-T2I: `instruction.jsonl`. Its own score is a mark from 1 to 5 by Gemini, so there are no questions."""
    file = _only(source, "instruction.jsonl", PROMPT_SETS["longbench"].about)
    return [Item(str(number), row["instruction"], number=number) for number, row in enumerate(_rows(file))]


def read_compbench(source: Path) -> list[Item]:
    """T2I-CompBench: `*.txt`, a prompt a line; of a folder those that end in `_val.txt`, if any do."""
    files = _files(source, "*.txt", PROMPT_SETS["compbench"].about)
    files = [file for file in files if file.stem.endswith("_val")] or files
    items = []
    for file in files:
        lines = [line.split("\t")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
        items += [
            Item(f"{file.stem}/{number}", line, category=file.stem, number=number)
            for number, line in enumerate(line for line in lines if line)
        ]
    return items


# ------------------------------------------------------------------------------------------------- pictures, as others


def _compbench_place(item: Item, copy: int, kind: str, model: str) -> Path:
    if "/" in item.text or len(item.text.encode()) > 240:
        raise ValueError(
            f"prompt {item.name} cannot be the name of a file, which T2I-CompBench wants: {item.text[:60]!r}."
        )
    return Path(model, item.category, "samples", f"{item.text}_{item.number + 10_000 * copy:06d}.png")


PROMPT_SETS = {
    "dpg": PromptSet(
        read_dpg,
        lambda item, copy, kind, model: Path(model, f"{item.name}.png"),
        "DPG-Bench (TencentQQGYLab/ELLA, dpg_bench)",
        grid=True,
        cascade=True,
    ),
    "dsg": PromptSet(read_dsg, lambda item, copy, kind, model: Path(f"{item.name}_{model}.jpg"), "DSG-1k (j-min/DSG)"),
    "tiif": PromptSet(
        read_tiif,
        lambda item, copy, kind, model: Path(
            "output", item.category, model, f"{kind}_description", f"{item.number}.png"
        ),
        "TIIF-Bench (A113N-W3I/TIIF-Bench, data)",
        groups=TIIF_GROUPS,
    ),
    "detailmaster": PromptSet(
        read_detailmaster,
        lambda item, copy, kind, model: Path(model, f"{Path(item.name).stem}-{copy}.png"),
        "DetailMaster (datajuicer/DetailMaster)",
        index=(
            "image_info.json",
            lambda pairs: [{"image_id": item.name, "output_image_name": Path(file).name} for item, file in pairs],
        ),
    ),
    "longbench": PromptSet(
        read_longbench,
        lambda item, copy, kind, model: Path(
            "outputs", model, str(item.number), f"step{copy + 1}", "generated_image_0.jpg"
        ),
        "LongBench-T2I (yczhou001/LongBench-T2I, data)",
    ),
    "geneval2": PromptSet(
        read_geneval2,
        lambda item, copy, kind, model: Path(model, f"{item.name}.png"),
        "GenEval 2 (facebookresearch/GenEval2)",
        index=("image_paths.json", lambda pairs: {item.text: file for item, file in pairs}),
    ),
    "compbench": PromptSet(
        read_compbench, _compbench_place, "T2I-CompBench (Karine-Huang/T2I-CompBench, examples/dataset)"
    ),
}
"""By name, the sets that can be read."""


def write_pictures(
    name: str, pictures: Iterable[tuple[Item, str, Sequence[Path]]], model: str, folder: Path
) -> list[Path]:
    """Lays pictures where the set's own script looks for them.

    Args:
        name: of the set.
        pictures: of (item, `"long"` or `"short"`, files of its pictures).
        model: what to call what drew them.
        folder: where to.

    Returns:
        The files.

    Raises:
        ValueError: If a prompt that has to be a file's name cannot be one.
    """
    own, written, listed = PROMPT_SETS[name], list[Path](), list[tuple[Item, str]]()
    for item, kind, files in pictures:
        sides = [files] if own.grid else [[file] for file in files]
        for copy, some in enumerate(sides):
            file = folder / own.place(item, copy, kind, model)
            _write(some, file)
            written.append(file)
            listed.append((item, str(file)))
    if own.index is not None and listed:
        index, content = own.index
        with writing(Path(listed[0][1]).parent / index) as part:
            part.write_text(json.dumps(content(listed), indent=1, ensure_ascii=False), encoding="utf-8")
    return written


def _write(files: Sequence[Path], file: Path) -> None:
    """One picture, or several in a grid two by two; a file is never left half written."""
    with writing(file) as part:
        if len(files) == 1 and file.suffix == files[0].suffix:
            shutil.copyfile(files[0], part)
        else:
            images = [_open(each) for each in files]
            image = images[0] if len(images) == 1 else _grid(images)
            image.save(part, quality=95, subsampling=0)  # of JPEG; PNG takes no notice


def _grid(images: Sequence[Image.Image]) -> Image.Image:
    """Two by two: the first at the top left, the second beside it."""
    width, height = images[0].size
    canvas = Image.new("RGB", (2 * width, height * -(-len(images) // 2)))
    for place, image in enumerate(images):
        canvas.paste(image, (place % 2 * width, place // 2 * height))
    return canvas


def find_pictures(name: str, items: Sequence[Item], folder: Path, copies: int = 1) -> Iterator[tuple[Item, str, Path]]:
    """Pictures of a set in a folder, laid as its own script wants them, by whatever tool.

    Args:
        name: of the set.
        items: of the set.
        folder: what `write_pictures` wrote to, or the folder of one model in it.
        copies: of each prompt.

    Yields:
        (item, `"long"` or `"short"`, file), copy after copy; what is not there is left out. The pictures of a grid are
        all in the same file: `cut` takes them out.

    Raises:
        ValueError: If the folder holds pictures of several models.
    """
    for item in items:
        for kind in ("long", "short") if item.short else ("long",):
            for copy in range(copies):
                found = _picture(PROMPT_SETS[name].place(item, copy, kind, _MODEL), folder)
                if found is not None:
                    yield item, kind, found


_MODEL = "\0"
_ABOVE = ("output", "outputs", "*")  # folders that hold those of all prompts


def _picture(place: Path, folder: Path) -> Path | None:
    """The one file at a place under any model's name, from the set's root, the folder below it, or the model's own."""
    parts = [glob.escape(part).replace(_MODEL, "*") for part in place.with_suffix("").parts]
    above = next(number for number, part in enumerate(parts) if part not in _ABOVE)
    for first in range(above + 1):
        pattern = "/".join(parts[first:]) + ".*"
        files = [file for file in sorted(folder.glob(pattern)) if file.suffix.lower().lstrip(".") in IMAGE_SUFFIXES]
        if len(files) > 1:
            raise ValueError(
                f"{folder} holds pictures of several models, such as {files[0]} and {files[1]}: give one."
            )
        if files:
            return files[0]
    return None


def cut(image: Image.Image, copy: int, copies: int) -> Image.Image:
    """One picture of a grid two by two; with one copy, the whole."""
    if copies == 1:
        return image
    width, height = image.width // 2, image.height // -(-copies // 2)
    left, top = copy % 2 * width, copy // 2 * height
    return image.crop((left, top, left + width, top + height))


def _open(file: Path) -> Image.Image:
    try:
        return open_image(str(file))
    except Unusable as error:
        raise ValueError(f"{file}: {error}; draw it again.") from error
