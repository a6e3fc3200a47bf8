"""From the images of several conditions to the report that compares them.

Every figure comes with its interval, and with its paired difference from the baseline under the same UNet.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..metrics import cmmd_intervals, frechet_intervals, kernel_distance, small_sample
from ..scenes import STOCK_CONTENT_TOKENS, Caption, Scene, read, stock_border
from .adherence import (
    DEBIASED,
    Figure,
    Judge,
    Sentences,
    change_in_image,
    clip_scores,
    curve,
    dense_scores,
    embed_sentences,
    figure,
    listening,
    reading,
)
from .features import Extractor
from .images import BASELINE, Condition, Prompt, fingerprint_of
from .judging import Asked, Sheet, Values, Verdicts, by_category, verdicts
from .questions import group_mean, scene_answers

Eye = Extractor | Judge
"""What turns images into vectors: features for a distance, or a CLIP's embeddings for scores."""

Prompts = Mapping[str, Sequence[Prompt]]
"""By kind: `long`, `short`, `changed`."""

Seen = Mapping[tuple[str, str, str], np.ndarray]
"""By eye, condition (or `reference`) and kind of prompt: vectors of the images, (N, D)."""

Said = Mapping[tuple[str, str, str], Sequence[Values]]
"""By judge, condition and kind of prompt: what the judge says of each image."""

LONG, JUDGES, LIKENESS, RECONSTRUCTED, SHORT, CHANGED = (
    "Long prompts",
    "How far the judge can be trusted",
    "Likeness to the reference images",
    "Likeness to the references as the autoencoder draws them",
    "Short prompts",
    "One word changed",
)
FLOORS = {
    "autoencoder": "the references' own reconstructions by the model's autoencoder",
    "halves": "one half of the references against the other",
}
RECONSTRUCTION = "reconstructed"
"""Ends the key of a distance to the reconstructed references."""
_SENTENCE = "CLIPScore of each sentence with its own image less that with another prompt's"
_QUESTIONS = "share of the set's questions answered right; what hangs on a failed one fails, too"
_FIGURES = {  # in the order of the page: label, group, better, digits, note
    "vqa_after": ("questions after token 77", LONG, "higher", 3, _QUESTIONS),
    "vqa_before": ("questions before token 77", LONG, "higher", 3, _QUESTIONS),
    "vqa": ("questions", LONG, "higher", 3, f"{_QUESTIONS}; mean over images"),
    "tiif": ("TIIF-Bench", LONG, "higher", 3, "questions answered right; mean over nine groups of types of prompts"),
    "soft": ("Soft-TIFA AM", LONG, "higher", 3, "mean probability of the right answers of an image"),
    "soft_gm": ("Soft-TIFA GM", LONG, "higher", 3, "geometric mean of the probabilities of an image"),
    "vqa_score": ("VQAScore", LONG, "higher", 3, "probability that the image shows the whole prompt"),
    "vqa_score_after": ("VQAScore of sentences after token 77", LONG, "higher", 3, "each sentence by itself"),
    "vqa_score_before": ("VQAScore of sentences before token 77", LONG, "higher", 3, "each sentence by itself"),
    "found_after": ("found after token 77", LONG, "higher", 3, "of what a stock encoder does not read"),
    "found_before": ("found before token 77", LONG, "higher", 3, "shape, color and size right, in the right cell"),
    "listening_after": ("sentences after token 77", LONG, "higher", 2, _SENTENCE),
    "listening_before": ("sentences before token 77", LONG, "higher", 2, _SENTENCE),
    "clip_score": ("CLIPScore", LONG, "higher", 2, "100 x cosine of image and prompt"),
    "den_score": ("DenScore", LONG, "higher", 2, "100 x mean of the sentences' embeddings, times the image's"),
    "den_score_debiased": ("DenScore, debiased", LONG, "higher", 2, "what all prompts have in common kept to 0.3"),
    "preference": ("score of the whole prompt", LONG, "higher", 3, "cut where the model stops reading"),
    "preference_after": ("score of sentences after token 77", LONG, "higher", 3, "each sentence by itself"),
    "preference_before": ("score of sentences before token 77", LONG, "higher", 3, "each sentence by itself"),
    "background": ("background", LONG, "higher", 3, "share of images with the background that the prompt names"),
    "uncalled": ("objects not asked for", LONG, "lower", 3, "of the cells that the prompt leaves empty"),
    "judge_yes": ("says yes where the reader does", JUDGES, "higher", 3, "share of what an image shows"),
    "judge_no": ("says no where the reader does", JUDGES, "higher", 3, "share of what an image does not show"),
    "fd": ("Frechet distance", LIKENESS, "lower", 2, "between the features of all images and of all references"),
    "kid": ("kernel distance", LIKENESS, "lower", 4, "KID; the interval is that of random subsets"),
    "cmmd": ("CMMD", LIKENESS, "lower", 3, "kernel distance of CLIP embeddings x 1000"),
    "short_found": ("found", SHORT, "higher", 3, "objects of prompts that fit 77 tokens"),
    "short_background": ("background", SHORT, "higher", 3, "share of images with the background that is named"),
    "short_clip_score": ("CLIPScore", SHORT, "higher", 2, "100 x cosine of image and prompt"),
    "short_vqa": ("questions", SHORT, "higher", 3, f"{_QUESTIONS}; mean over images"),
    "short_tiif": ("TIIF-Bench", SHORT, "higher", 3, "questions right; mean over nine groups of types of prompts"),
    "short_soft": ("Soft-TIFA AM", SHORT, "higher", 3, "mean probability of the right answers of an image"),
    "short_soft_gm": ("Soft-TIFA GM", SHORT, "higher", 3, "geometric mean of the probabilities of an image"),
    "short_vqa_score": ("VQAScore", SHORT, "higher", 3, "probability that the image shows the whole prompt"),
    "short_preference": ("score", SHORT, "higher", 3, "cut where the model stops reading"),
    "prediction_drift": ("drift of the UNet's prediction", SHORT, "lower", 3, "RMS, relative, same noisy latents"),
    "state_drift": ("drift of token states", SHORT, "lower", 3, "RMS distance from the stock encoder's, relative"),
    "state_drift_2": ("drift, second encoder", SHORT, "lower", 3, "RMS distance from the stock encoder's, relative"),
    "change": ("change of the image", CHANGED, "higher", 4, "RMS of pixels in 0..1, a word after token 77 changed"),
    "change_inside": ("of it in the right cell", CHANGED, "higher", 3, "share of the squared change; chance is 0.11"),
}


def _parts(key: str) -> tuple[str, str]:
    """A figure's key is NAME, NAME/JUDGE, or FEATURES_fd and FEATURES_kid of a distance: its name, and of what."""
    name, _, judge = key.partition("/")
    if name in _FIGURES:
        return name, "" if judge == RECONSTRUCTION else judge
    if name == "fid":
        return "fd", "Inception"
    features, _, kind = name.rpartition("_")
    return kind, features


def about(key: str) -> dict[str, Any]:
    """How a figure is shown: label, group, what is better, digits, note."""
    name, of = _parts(key)
    label, group, better, digits, note = _FIGURES[name]
    if of:
        label += f", {of}" if group == LIKENESS else f", judged by {of}"
    if key.endswith(f"/{RECONSTRUCTION}"):
        group, note = RECONSTRUCTED, note.replace("references", "reconstructed references")
    return {"label": label, "group": group, "better": better, "digits": digits, "note": note}


def floor_label(name: str) -> str:
    """What a floor, or a rung of the ladder of wrong facts, is a distance of."""
    if name in FLOORS:
        return FLOORS[name]
    number = int(name.removeprefix("wrong_"))
    return f"rendered pictures with {number} {'fact' if number == 1 else 'facts'} wrong"


def _place(key: str) -> tuple[int, bool]:
    """Where a figure stands on the page."""
    return list(_FIGURES).index(_parts(key)[0]), key.endswith(f"/{RECONSTRUCTION}")


@dataclass
class Findings:
    """What was found of one condition, prompt by prompt.

    Attributes:
        values: by figure, the values of each prompt.
        points: by curve, (token, value) of each prompt.
        verdicts: by judge and kind of prompt, what it says of the images of each prompt.
    """

    values: dict[str, list[list[float]]] = field(default_factory=dict)
    points: dict[str, list[list[tuple[int, float]]]] = field(default_factory=dict)
    verdicts: dict[tuple[str, str], list[Verdicts]] = field(default_factory=dict)

    def add_points(self, name: str, points: list[list[tuple[int, float]]], sides: str | None = None) -> None:
        """A curve, and under the name of `sides` what lies before token 77 and after it."""
        before, _, judge = (sides or name).partition("/")
        ending = f"/{judge}" if judge else ""
        self.points[name] = points
        self.values[f"{before}_before{ending}"] = _side(points, False)
        self.values[f"{before}_after{ending}"] = _side(points, True)


@dataclass(frozen=True)
class Texts:
    """The prompts as a judge reads them: whole long ones (N, E), their sentences, whole short ones (M, E)."""

    long: Tensor
    sentences: Sentences
    short: Tensor | None


def find(
    condition: Condition,
    prompts: Prompts,
    texts: Mapping[str, Texts],
    seen: Seen,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    drift: Mapping[str, Sequence[float]],
    place: Callable[..., Path] = Prompt.file,
) -> Findings:
    """Everything that is known of a condition prompt by prompt.

    Args:
        condition: which.
        prompts: by kind; several images of a prompt are neighbors.
        texts: the prompts, by judge.
        seen: the images, by judge, condition and kind.
        folder: where the images are.
        tokenizer: counts tokens.
        drift: by figure, a value for each of the first short prompts.
        place: (prompt, condition, kind) -> where in the folder an image is.
    """
    found = Findings(values={key: [[value] for value in values] for key, values in drift.items()})

    def image(prompt: Prompt, kind: str | None = None) -> Image.Image:
        return Image.open(folder / place(prompt, condition, kind)).convert("RGB")

    for kind, prefix in (("long", ""), ("short", "short_")):
        shown = [
            reading(prompt.text, prompt.scene, image(prompt), tokenizer)
            for prompt in prompts[kind]
            if prompt.scene is not None and isinstance(prompt.text, Caption)
        ]
        if not shown:
            continue
        points = [[(fact["token"], float(fact["found"])) for fact in each["facts"]] for each in shown]
        if kind == "long":
            found.add_points("found", points)
            found.values["uncalled"] = [[float(cell) for cell in each["uncalled"]] for each in shown]
        else:
            found.values["short_found"] = [[value for _, value in own] for own in points]
        found.values[f"{prefix}background"] = [[float(each["background"])] for each in shown]
    long = prompts["long"]
    for name, own in texts.items():
        embeds = torch.from_numpy(seen[name, condition.name, "long"])
        found.values[f"clip_score/{name}"] = together(long, clip_scores(embeds, own.long)[:, None].tolist())
        if own.sentences.number > 1:
            found.add_points(f"listening/{name}", together(long, listening(embeds, own.sentences)))
        for key, kept in (("den_score", 1.0), ("den_score_debiased", DEBIASED)):
            dense, points = dense_scores(embeds, own.sentences, kept)
            found.values[f"{key}/{name}"] = together(long, [[score] for score in dense])
            found.points[f"{key}/{name}"] = together(long, points)
        if own.short is not None:
            scores = clip_scores(torch.from_numpy(seen[name, condition.name, "short"]), own.short)
            found.values[f"short_clip_score/{name}"] = together(prompts["short"], scores[:, None].tolist())
    changes = [
        change_in_image(image(prompt, "long"), image(prompt), prompt.change.cell)
        for prompt in prompts["changed"]
        if prompt.change is not None
    ]
    if changes:
        found.values["change"] = [[change.rms] for change in changes]
        found.values["change_inside"] = [[] if change.inside is None else [change.inside] for change in changes]
    return found


@dataclass(frozen=True)
class Panel:
    """Judges that were asked about images, and what they said.

    Attributes:
        judges: by name.
        said: what they say, image by image.
        sheets: by kind, what was asked about each prompt.
        cascade: as `questions.with_parents` takes it.
        groups: types of prompts by group, where the set's score is a mean over groups.
        last_picture_alone: as `judging.by_category` takes it.
    """

    judges: Mapping[str, Asked]
    said: Said
    sheets: Mapping[str, Sequence[Sheet]]
    cascade: bool = False
    groups: Mapping[str, Sequence[str]] | None = None
    last_picture_alone: bool = False


def hear(found: Findings, condition: Condition, prompts: Prompts, panel: Panel) -> None:
    """Adds to what was found of a condition what a panel says of its images."""
    for name, judge in panel.judges.items():
        for kind, prefix in (("long", ""), ("short", "short_")):
            said = panel.said.get((name, condition.name, kind))
            if said is None:
                continue
            pictures = together(prompts[kind], [[values] for values in said])
            own = [
                verdicts(judge, sheet, some, panel.cascade)
                for sheet, some in zip(panel.sheets[kind], pictures, strict=True)
            ]
            found.verdicts[name, kind] = own
            for key in dict.fromkeys(key for each in own for key in each.figures):
                found.values[f"{prefix}{key}/{name}"] = [each.figures.get(key, []) for each in own]
            for key in dict.fromkeys(key for each in own for key in each.points) if kind == "long" else ():
                found.add_points(f"{key}/{name}", [each.points.get(key, []) for each in own])


def agree(found: Findings, shown: Sequence[Scene | None], prompts: Sequence[Prompt]) -> None:
    """Adds how far a judge says of images of scenes what the reader reads, which is the truth.

    Args:
        found: of the condition; gets more.
        shown: what the reader reads in the first image of each long prompt.
        prompts: the long ones, each once.
    """
    for (name, kind), own in list(found.verdicts.items()):
        sides: dict[bool, list[list[float]]] = {True: [], False: []}
        for prompt, scene, each in zip(prompts, shown, own, strict=True) if kind == "long" else ():
            if scene is None or not each.answers or not isinstance(prompt.text, Caption):
                continue
            pairs = list(zip(each.answers[0], scene_answers(prompt.text, scene), strict=True))
            for truth, values in sides.items():
                values.append([float(answer.right == truth) for answer, there in pairs if there == truth])
        for truth, key in ((True, "judge_yes"), (False, "judge_no")):
            if any(sides[truth]):
                found.values[f"{key}/{name}"] = sides[truth]


def firsts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each prompt once."""
    return [prompt for prompt in prompts if not prompt.copy]


def together(prompts: Sequence[Prompt], values: Sequence[list[Any]]) -> list[list[Any]]:
    """Values of the images of one prompt in one list: they stand or fall together."""
    found: list[list[Any]] = []
    for prompt, own in zip(prompts, values, strict=True):
        if prompt.copy:
            found[-1] = [*found[-1], *own]
        else:
            found.append(list(own))
    return found


def _side(points: Iterable[Sequence[tuple[int, float]]], after: bool) -> list[list[float]]:
    """Values of what ends after what a stock encoder reads, or of the rest."""
    return [[value for token, value in own if (token > STOCK_CONTENT_TOKENS) == after] for own in points]


def distances(
    name: str,
    seen: Mapping[str, np.ndarray],
    reference: np.ndarray,
    baseline: str | None,
    subset_size: int,
    resamples: int,
    paired: bool = True,
) -> dict[str, dict[str, Figure]]:
    """Distances of each condition's images from the references, by condition and figure.

    Args:
        name: of the features.
        seen: by condition, (N, D).
        reference: (N, D), row by row those of the same prompts.
        baseline: a condition, or None.
        subset_size: of the kernel distance, at most half of the images: larger subsets are nearly the same ones.
        resamples: of the bootstrap of the Frechet distance.
        paired: whether the references are of the same prompts; otherwise there may be more or fewer.
    """
    if name == "cmmd":
        figures = cmmd_intervals(seen, reference, baseline=baseline, num_resamples=resamples, paired=paired)
        return {key: {name: value} for key, value in figures.items()}
    figures = frechet_intervals(seen, reference, baseline=baseline, num_resamples=resamples, paired=paired)
    found: dict[str, dict[str, Figure]] = {key: {name: value} for key, value in figures.items()}
    subset_size = min([subset_size, len(reference) // 2, *(len(own) // 2 for own in seen.values())])
    if subset_size >= 2:
        kid = {key: kernel_distance(own, reference, subset_size) for key, own in seen.items()}
        subsets = {key: np.array(value.pop("subsets")) for key, value in kid.items()}
        own_name = "inception_kid" if name == "fid" else f"{name.removesuffix('_fd')}_kid"
        for key, value in kid.items():
            less = None
            if baseline not in (None, key):
                difference = subsets[key] - subsets[baseline]
                low, high = np.quantile(difference, (0.025, 0.975))
                less = {"value": float(difference.mean()), "low": float(low), "high": float(high)}
            found[key][own_name] = value | {"difference": less}
    return found


def likeness(
    name: str,
    seen: Seen,
    conditions: Sequence[Condition],
    references: Sequence[str],
    subset_size: int,
    resamples: int,
    baseline: str = BASELINE,
    paired: bool = True,
) -> tuple[dict[str, dict[str, Figure]], dict[str, dict[str, Figure]]]:
    """Distances of every condition to every kind of reference, and what distances say nothing.

    Args:
        name: of the features.
        seen: of the references under `reference`, `reconstructed`, and `wrong_N` and `wrong_N/reconstructed` of
            pictures with N facts wrong, where there are such.
        conditions: each UNet with the baseline among its encoders.
        references: `"original"`, `"reconstructed"` or both.
        subset_size: of the kernel distance.
        resamples: of the bootstrap.
        baseline: the encoder that others are compared with.
        paired: as `distances` takes it.

    Returns:
        By condition and figure, and by figure and name of a floor. A figure whose interval reaches the floor of the
        autoencoder, or overlaps that of the halves, has the floor's name under `floor`: it cannot be told from it.
    """
    found: dict[str, dict[str, Figure]] = {each.name: {} for each in conditions}
    all_floors: dict[str, dict[str, Figure]] = {}
    sets = {which: rows for (eye, which, _), rows in seen.items() if eye == name}
    for kind in references:
        ending = "" if kind == "original" else f"/{RECONSTRUCTION}"
        reference = sets["reference" if kind == "original" else RECONSTRUCTION]
        half = len(reference) // 2
        lower: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if half >= 2:  # a covariance needs two
            lower["halves"] = (reference[0 : 2 * half : 2], reference[1 : 2 * half : 2])
        if kind == "original" and RECONSTRUCTION in sets:
            lower["autoencoder"] = (sets[RECONSTRUCTION], reference)
        for which, rows in sets.items():
            if which.startswith("wrong_") and which.endswith(RECONSTRUCTION) == bool(ending):
                lower[which.partition("/")[0]] = (rows, reference)
        floors: dict[str, dict[str, Figure]] = {}
        for floor, (rows, others) in lower.items():
            for key, value in distances(name, {floor: rows}, others, None, subset_size, resamples)[floor].items():
                floors.setdefault(key, {})[floor] = value
        for unet in dict.fromkeys(each.unet for each in conditions):
            own = {each.name: sets[each.name] for each in conditions if each.unet == unet}
            base = next(each.name for each in conditions if (each.unet, each.encoder) == (unet, baseline))
            for condition, figures in distances(name, own, reference, base, subset_size, resamples, paired).items():
                for key, value in figures.items():
                    found[condition][key + ending] = value | {"floor": _floor(key, value, floors.get(key, {}))}
        all_floors |= {key + ending: value for key, value in floors.items()}
    return found, all_floors


def _floor(key: str, figure: Figure, floors: Mapping[str, Figure]) -> str | None:
    """The floor that a figure cannot be told from; for KID, whose interval is that of subsets, by its value."""
    low, high = (figure["value"], figure["value"]) if key.endswith("kid") else (figure["low"], figure["high"])
    if "autoencoder" in floors and low <= floors["autoencoder"]["high"]:
        return "autoencoder"
    halves = floors.get("halves")  # a kernel distance needs four images in each
    return "halves" if halves is not None and low <= halves["high"] and high >= halves["low"] else None


def compare(
    conditions: Sequence[Condition],
    prompts: Prompts,
    eyes: Mapping[str, Eye],
    seen: Seen,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    drifts: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    panel: Panel | None = None,
    references: Sequence[str] = ("original",),
    subset_size: int = 1000,
    resamples: int = 100,
    num_examples: int = 4,
    baseline: str = BASELINE,
    place: Callable[..., Path] = Prompt.file,
    reference_place: Callable[[int], Path | None] | None = None,
    paired: bool = True,
) -> dict[str, Any]:
    """Everything of the report that follows from images and prompts, as `report.write_report` takes it.

    Args:
        conditions: each UNet with the baseline among its encoders.
        prompts: by kind.
        eyes: by name.
        seen: what they make of every image, the references' too.
        folder: where the images are.
        tokenizer: counts tokens.
        drifts: by condition and figure, a value for each of the first short prompts.
        panel: judges that were asked, and what they say.
        references: what distances are taken to: `"original"` reference images, `"reconstructed"` ones, both, or none.
        subset_size: of kernel distances.
        resamples: of the bootstrap of Frechet distances.
        num_examples: prompts of each kind on the page.
        baseline: the encoder that others are compared with.
        place: (prompt, condition, kind) -> where in the folder an image is.
        reference_place: number of a prompt -> where its reference image is; by default where the page's copy is.
        paired: whether reference i is of prompt i.
    """
    long, short = ([str(prompt.text) for prompt in prompts[kind]] for kind in ("long", "short"))
    texts = {
        name: Texts(judge.embed_texts(long), embed_sentences(judge, long), judge.embed_texts(short) if short else None)
        for name, judge in eyes.items()
        if isinstance(judge, Judge) and any(long)
    }
    findings = {
        each: find(each, prompts, texts, seen, folder, tokenizer, drifts.get(each.name, {}), place)
        for each in conditions
    }
    once = firsts(prompts["long"])
    if panel is not None:
        for each, found in findings.items():
            hear(found, each, prompts, panel)
            agree(found, [_read(folder / place(prompt, each, None), prompt) for prompt in once], once)
    shown: dict[str, dict[str, Any]] = {}
    for each, found in findings.items():
        base = findings[_baseline(each, conditions, baseline)]
        shown[each.name] = {
            "unet": each.unet,
            "encoder": each.encoder,
            "label": each.encoder,
            "about": each.about,
            "figures": {
                key: figure(values, None if found is base or _unpaired(key) else base.values.get(key))
                for key, values in found.values.items()
            },
            "curves": {key: curve(points) for key, points in found.points.items()},
            "breakdowns": {},
        }
        if panel is not None:
            shown[each.name]["figures"] |= _grouped(found, None if found is base else base, prompts, panel)
            shown[each.name]["breakdowns"] = _breakdowns(found, panel)
    floors: dict[str, dict[str, Figure]] = {}
    for name, eye in eyes.items() if references else ():
        if isinstance(eye, Judge):
            continue
        found_figures, found_floors = likeness(
            name, seen, conditions, references, subset_size, resamples, baseline, paired
        )
        floors |= found_floors
        for key, figures in found_figures.items():
            shown[key]["figures"] = figures | shown[key]["figures"]
    keys = dict.fromkeys(key for condition in shown.values() for key in condition["figures"])
    told = [str(prompt.text) for prompt in once if str(prompt.text)]
    counts = [len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in told]
    curves = dict.fromkeys(key for found in findings.values() for key in found.points)
    breakdowns = dict.fromkeys(key for condition in shown.values() for key in condition["breakdowns"])
    return {
        "prompts": {
            "n": len(once),
            "mean_tokens": float(np.mean(counts)) if counts else None,
            "beyond_77": float(np.mean([count > STOCK_CONTENT_TOKENS for count in counts])) if counts else None,
        },
        "figures": {key: about(key) for key in sorted(keys, key=_place)},
        "baseline": baseline,
        "conditions": shown,
        "floors": {
            key: {name: own | {"label": floor_label(name)} for name, own in named.items()}
            for key, named in floors.items()
        },
        "curves": {key: _about_curve(key) for key in curves},
        "breakdowns": {key: _about_breakdown(key) for key in breakdowns},
        "judges": _judges(eyes, panel),
        "warnings": _warnings(len(prompts["long"]), eyes if references else _judges_alone(eyes), conditions),
        "examples": _examples(
            findings, once, tokenizer, num_examples, place, _reference_place(references, reference_place), baseline
        ),
        "changes": _changes(findings, prompts["changed"][:num_examples], place),
    }


def _reference_place(
    references: Sequence[str], place: Callable[[int], Path | None] | None
) -> Callable[[int], Path | None]:
    if place is not None:
        return place
    return reference_file if references else lambda index: None


def _judges_alone(eyes: Mapping[str, Eye]) -> dict[str, Eye]:
    return {name: eye for name, eye in eyes.items() if isinstance(eye, Judge)}


def _unpaired(key: str) -> bool:
    """Whether the values of two conditions are not those of the same things."""
    return key == "change_inside" or key.startswith(("judge_yes/", "judge_no/"))


def _read(file: Path, prompt: Prompt) -> Scene | None:
    """What the reader reads in an image of a scene; None for other images."""
    if prompt.scene is None:
        return None
    with Image.open(file) as image:
        return read(image.convert("RGB"))


def _grouped(found: Findings, base: Findings | None, prompts: Prompts, panel: Panel) -> dict[str, Figure]:
    """The set's own score where that is a mean over groups of types of prompts."""
    figures: dict[str, Figure] = {}
    for (name, kind), own in found.verdicts.items() if panel.groups else ():
        assert panel.groups is not None
        kinds = [prompt.category for prompt in firsts(prompts[kind])]
        scores = [[score for picture in each.scores for score in picture] for each in own]
        asked = [number for number, each in enumerate(scores) if each]
        if not asked:
            continue
        types = [kinds[number] for number in asked]
        result: Figure = {**group_mean([scores[number] for number in asked], types, panel.groups), "difference": None}
        if base is not None:
            theirs = [[score for picture in each.scores for score in picture] for each in base.verdicts[name, kind]]
            pairs = [[a - b for a, b in zip(scores[number], theirs[number], strict=True)] for number in asked]
            result["difference"] = group_mean(pairs, types, panel.groups)
        figures[f"{'short_' if kind == 'short' else ''}tiif/{name}"] = result
    return figures


def _breakdowns(found: Findings, panel: Panel) -> dict[str, dict[str, Figure]]:
    """By judge and kind of prompt, questions answered right by category."""
    shown = {}
    for (name, kind), own in found.verdicts.items():
        categories = by_category(panel.sheets[kind], own, panel.last_picture_alone)
        if len(categories) > 1:
            shown[f"{'short_' if kind == 'short' else ''}vqa/{name}"] = {
                category: figure(values) for category, values in categories.items()
            }
    return shown


def _judges(eyes: Mapping[str, Eye], panel: Panel | None) -> dict[str, str]:
    """What judged, of which revision."""
    found = {
        name: f"{eye.source}, weights {fingerprint_of({'model': eye.model})}"
        for name, eye in eyes.items()
        if isinstance(eye, Judge)
    }
    judges = panel.judges if panel is not None else {}
    return found | {name: f"{judge.source}, revision {judge.revision}" for name, judge in judges.items()}


def _baseline(condition: Condition, conditions: Iterable[Condition], baseline: str) -> Condition:
    return next(each for each in conditions if (each.unet, each.encoder) == (condition.unet, baseline))


def _about_curve(key: str) -> dict[str, str]:
    name, _, judge = key.partition("/")
    if name == "found":
        return {"label": "Found, by where the fact ends in the prompt", "unit": "share of facts", "note": ""}
    label, unit, note = _CURVES[name]
    return {"label": f"{label}, judged by {judge}", "unit": unit, "note": note}


def _about_breakdown(key: str) -> dict[str, str]:
    name, _, judge = key.partition("/")
    prompts = "short prompts" if name.startswith("short_") else "prompts"
    return {"label": f"Questions of {prompts} by category, judged by {judge}", "note": _QUESTIONS}


_CURVES = {  # label, unit, note
    "listening": ("What an image has of a sentence", "CLIPScore", _SENTENCE),
    "vqa": ("Questions, by where the prompt tells what they ask", "share answered right", _QUESTIONS),
    "vqa_score": ("VQAScore of each sentence", "probability", "each sentence by itself"),
    "den_score": ("DenScore of each sentence", "100 x cosine", "the score of a prompt is the mean of its sentences"),
    "den_score_debiased": (
        "DenScore of each sentence, debiased",
        "100 x product",
        "what all have in common kept to 0.3",
    ),
    "preference": ("Score of each sentence", "score", "each sentence by itself"),
}


def _warnings(n: int, eyes: Mapping[str, Eye], conditions: Sequence[Condition]) -> list[str]:
    """What has to be known before the figures are read."""
    judges = [eye for eye in eyes.values() if isinstance(eye, Judge)]
    extractors = [eye for eye in eyes.values() if not isinstance(eye, Judge)]
    found = [text for eye in extractors if eye.name != "cmmd" and (text := small_sample(n, eye.dim))]
    own = {Path(each.encoder_source).resolve() for each in conditions if each.encoder_source is not None}
    own |= {source.parent for source in own if source.name == "text_encoder"}
    partial = [judge.name for judge in judges if own & {(path := Path(judge.source).resolve()), *path.parents}]
    if partial and len(partial) == len(judges):
        found.append(f"{', '.join(partial)} judges its own encoder and no other CLIP does: add one to the judges.")
    return found


def _examples(
    findings: Mapping[Condition, Findings],
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    place: Callable[..., Path] = Prompt.file,
    reference_place: Callable[[int], Path | None] | None = None,
    baseline: str = BASELINE,
) -> list[dict[str, Any]]:
    """The prompts that the last condition draws best and worst beside the baseline, and the first ones."""
    last = list(findings)[-1]
    base = _baseline(last, findings, baseline)
    kinds = {"best": list[int](), "worst": list[int](), "first": list(range(min(number, len(prompts))))}
    scores: dict[Condition, list[str]] = {}
    if key := next(iter(findings[last].points), None):
        means = {each: [_mean(own) for own in found.points[key]] for each, found in findings.items()}
        order = sorted(range(len(prompts)), key=lambda index: means[base][index] - means[last][index])
        kinds |= {"best": order[:number], "worst": order[::-1][:number]}
        for each, found in findings.items():
            scores[each] = [
                f"{sum(value for _, value in own):g} of {len(own)}"
                if key.startswith(("found", "vqa/"))
                else f"{_mean(own):.1f}"
                for own in found.points[key]
            ]
    shown = []
    for kind, indices in kinds.items():
        for index in indices:
            text = str(prompts[index].text)
            border = stock_border(text, tokenizer)
            reference = (reference_place or reference_file)(index)
            why = ", ".join(f"{each.name} {scores[each][index]}" for each in (last, base)) if scores else ""
            shown.append(
                {
                    "index": index,
                    "kind": kind,
                    "why": why,
                    "prompt": text,
                    "kept_characters": border if border is not None and base.unet else len(text),
                    "reference": None if reference is None else str(reference),
                    "images": {each.name: str(place(prompts[index], each, None)) for each in findings},
                    "scores": {each.name: own[index] for each, own in scores.items()},
                }
            )
    return shown


def _mean(points: Sequence[tuple[int, float]]) -> float:
    return sum(value for _, value in points) / max(len(points), 1)


def reference_file(index: int) -> Path:
    """Where the page's copy of a reference image is, in the output folder."""
    return Path("references", f"{index:06d}.webp")


def _changes(
    findings: Mapping[Condition, Findings], prompts: Sequence[Prompt], place: Callable[..., Path] = Prompt.file
) -> list[dict[str, Any]]:
    """Prompts of which a word was changed, with both images of each condition."""
    shown = []
    for number, prompt in enumerate(prompts):
        change = prompt.change
        if change is None:
            continue
        inside = {each.name: found.values["change_inside"][number] for each, found in findings.items()}
        shown.append(
            {
                "index": prompt.index,
                "before": change.old,
                "after": change.prompt[slice(*change.span)],
                "prompt": change.prompt,
                "span": list(change.span),
                "images": {
                    each.name: [str(place(prompt, each, "long")), str(place(prompt, each, None))] for each in findings
                },
                "where": {name: f"{own[0]:.2f} of the change in the cell" for name, own in inside.items() if own},
            }
        )
    return shown
