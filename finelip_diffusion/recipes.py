"""A recipe: which captions, which losses, which parameters make a long-text encoder. Data, read from YAML."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from .data.captions import CaptionKind
from .data.edits import EditPlace
from .losses import CONTRASTIVE, PRESERVING, Loss, PromptKind


@dataclass(frozen=True)
class Term:
    """One term of a recipe's loss.

    Attributes:
        name: in `losses`.
        weight: factor of its value in the sum.
        settings: of its function.
        loss: the function, and what it reads.
    """

    name: str
    weight: float
    settings: dict[str, Any]
    loss: Loss


@dataclass(frozen=True)
class Recipe:
    """How a long-text encoder is trained. A loss is `none`, a name, or `{name: {setting: value}}`.

    Attributes:
        name: of the recipe.
        description: where it comes from, and what is known of its results.
        after: the recipe beside it whose result it starts from, where it is a second stage.
        position: `kps` stretches the position table of a CLIP (knowledge-preserved stretching), `rotary` takes it out
            and turns queries and keys; a model that was trained before keeps what it has.
        max_length: tokens that the encoder reads, start and end included; none is 248.
        captions: what is read beside the whole caption: nothing more (`full`), its `first_sentence`, sentences drawn
            without the first (`debias`), runs of sentences (`sub_captions`), runs and sentences from anywhere
            (`merged_captions`).
        num_sub_captions: runs of sentences for a caption.
        longest_sub_caption: sentences in a run, at most.
        num_edits: edits of a caption that are read beside it, wrong ones.
        edit_place: where a caption is edited: `any`where, `before` or `after` what a 77-token encoder reads.
        rewrites: whether an image is one example and one of its captions is drawn each time, rather than each caption
            an example; scenes are told in any training family then.
        length_curriculum: share of the training in whose batches captions grow from the shortest to the longest.
        global_loss: of the embeddings of image and caption.
        coarse: of a coarse image embedding and the short caption.
        local_loss: of tokens.
        preserve: keeps the stock latent space, on prompts that fit 77 tokens.
        refine: whose tokens FineLIP's refinement condenses.
        refined_share: refined tokens for a patch; none is the source's, or 0.2.
        refined_text_share: the same of the caption, for a patch, too; none is as many as of the image.
        adaptive_share: refined tokens that count, for a token that the refinement looks at; none counts all.
        global_tokens: whether CLS and end token stand beside the refined tokens in the token score.
        parameters: `full`, or `lora` (rank `lora_rank`), or `svd` (the singular values of every layer); with both,
            positions and heads are trained in full.
        lora_rank: of the adapters.
        image_tower: `trained` or `frozen`.
        learning_rate: of the towers.
        head_learning_rate: of what is drawn anew: refinement, pooling.
        max_grad_norm: where the norm of an update's gradients is cut; 0 does not cut.
        weight_decay: of AdamW; the position table is never decayed.
        lr_warmup_steps: of both rates.
        loss_warmup_epochs: over which the loss is scaled from 0 to 1.
        logit_scale: where the factor of the cosines starts; none keeps the source's.
    """

    name: str
    description: str = ""
    after: str | None = None
    position: Literal["kps", "rotary"] = "kps"
    max_length: int | None = None
    captions: CaptionKind = "full"
    num_sub_captions: int = 8
    longest_sub_caption: int = 3
    num_edits: int = 0
    edit_place: EditPlace = "any"
    rewrites: bool = False
    length_curriculum: float = 0.0
    global_loss: Term | None = None
    coarse: Term | None = None
    local_loss: Term | None = None
    preserve: Term | None = None
    refine: tuple[Literal["image", "text"], ...] = ()
    refined_share: float | None = None
    refined_text_share: float | None = None
    adaptive_share: float | None = None
    global_tokens: bool = True
    parameters: Literal["full", "lora", "svd"] = "full"
    lora_rank: int = 16
    image_tower: Literal["trained", "frozen"] = "trained"
    learning_rate: float = 1e-6
    head_learning_rate: float = 2e-4
    max_grad_norm: float = 0.0
    weight_decay: float = 0.01
    lr_warmup_steps: int = 200
    loss_warmup_epochs: float = 0.0
    logit_scale: float | None = None
    resolved: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def terms(self) -> dict[str, Term]:
        """The terms that there are, by the recipe's key."""
        named = {key: getattr(self, key) for key in _LOSSES}
        return {key: term for key, term in named.items() if term is not None}

    @property
    def refinement(self) -> dict[str, Any]:
        """How tokens are refined and compared, as `FineLIPModel.from_clip` takes it."""
        return {key: getattr(self, key) for key in _REFINEMENT}

    @property
    def prompts(self) -> PromptKind | None:
        """The prompts that its terms need beside the captions."""
        return next((term.loss.prompts for term in self.terms.values() if term.loss.prompts), None)


_LOSSES = {"global_loss": CONTRASTIVE, "coarse": CONTRASTIVE, "local_loss": CONTRASTIVE, "preserve": PRESERVING}
_DRAWN: dict[str, tuple[CaptionKind, ...]] = {  # what a term may read -> the captions that it is drawn from
    "short_embeds": ("first_sentence", "debias"),
    "sub_embeds": ("sub_captions", "merged_captions"),
    "span_embeds": ("sub_captions",),
}
_REFINEMENT = ("refined_share", "refined_text_share", "adaptive_share", "global_tokens")
_TEXTS = ("description", "after")
_OPTIONAL = ("logit_scale", "max_length", *_REFINEMENT[:3])
_FLAGS = ("rewrites", "global_tokens")
_LEAST = {
    "num_sub_captions": 1,
    "longest_sub_caption": 1,
    "lora_rank": 1,
    "logit_scale": 1,
    "max_length": 3,
} | dict.fromkeys(_REFINEMENT[:3], 0.001)
_CHOICES = {
    "position": ("kps", "rotary"),
    "captions": get_args(CaptionKind),
    "edit_place": get_args(EditPlace),
    "parameters": ("full", "lora", "svd"),
    "image_tower": ("trained", "frozen"),
}


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Args:
        path: A YAML file.

    Raises:
        ValueError: If the file is missing, no YAML, or no recipe. One sentence, with what may stand there.
    """
    return make_recipe(path.stem, read_content(path), str(path))


def read_content(path: Path, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys of a recipe's file; those of the recipe that it names as its `base`, beside it, where it has none.

    Args:
        path: A YAML file.
        above: Recipes whose base this one is.

    Raises:
        ValueError: If a file is missing, no YAML, or no mapping, or bases go round in a circle. One sentence.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "none"
        raise ValueError(f"there is no recipe {path.stem!r}; beside it are: {others}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a readable YAML file ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds no recipe: a mapping of keys, such as `local_loss: finelip`, must stand there."
        )
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str) or base in (*above, path.stem):
        raise ValueError(f"{path}: base is {base!r}, not the name of another recipe beside it.")
    return read_content(path.with_name(f"{base}.yaml"), (*above, path.stem)) | content


def make_recipe(name: str, content: Mapping[str, Any], where: str = "the recipe") -> Recipe:
    """Makes a recipe of plain data.

    Raises:
        ValueError: For an unknown key, value, loss or setting. One sentence.
    """
    known = {entry.name: entry for entry in fields(Recipe) if entry.name not in ("name", "resolved")}
    if unknown := sorted(content.keys() - known.keys(), key=str):
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}: choose among {', '.join(known)}.")
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key in _LOSSES:
            values[key] = _term(value, _LOSSES[key], f"{where}, {key}")
        elif key in _CHOICES and value not in _CHOICES[key]:
            raise ValueError(f"{where}: {key} is {value!r}, not one of {', '.join(_CHOICES[key])}.")
        elif key == "refine":
            values[key] = tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)
            if wrong := [part for part in values[key] if part not in ("image", "text")]:
                raise ValueError(f"{where}: refine holds {wrong[0]!r}, not image or text.")
        elif key in _FLAGS and not isinstance(value, bool):
            raise ValueError(f"{where}: {key} is {value!r}, not true or false.")
        elif key in _TEXTS and not isinstance(value, str):
            raise ValueError(f"{where}: {key} is {value!r}, not a text.")
        elif key in _CHOICES or key in _FLAGS or key in _TEXTS:
            values[key] = value
        elif key in _OPTIONAL and value in (None, "none"):
            values[key] = None
        else:
            values[key] = _number(value, f"{where}: {key}", "float" not in str(known[key].type), _LEAST.get(key, 0))
    recipe = Recipe(name=name, resolved=dict(content), **values)
    if recipe.length_curriculum > 1:
        raise ValueError(f"{where}: length_curriculum is {recipe.length_curriculum:g}, but a share is at most 1.")
    if not recipe.terms:
        raise ValueError(f"{where} has no loss: give global_loss, local_loss, or another of {', '.join(_LOSSES)}.")
    names = [term.name for term in recipe.terms.values()]
    for term in recipe.terms.values():
        if names.count(term.name) > 1:
            raise ValueError(f"{where} names {term.name} twice: give it once, with a weight.")
        if "edited_embeds" in term.loss.reads and not recipe.num_edits:
            raise ValueError(f"{where}: {term.name} compares edits of captions: choose num_edits, 4 say.")
        for need, kinds in _DRAWN.items():
            if need in term.loss.reads and recipe.captions not in kinds:
                raise ValueError(
                    f"{where}: {term.name} compares {need}, which captions: {recipe.captions} does not draw; "
                    f"choose captions: {' or '.join(kinds)}."
                )
    return recipe


def _term(value: Any, losses: Mapping[str, Loss], where: str) -> Term | None:
    if value in (None, "none"):
        return None
    name, settings = value, dict[str, Any]()
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, settings),) = value.items()
    if not isinstance(name, str) or name not in losses:
        raise ValueError(f"{where} is {value!r}, not none or one of {', '.join(sorted(losses))}.")
    if not isinstance(settings, Mapping | None):
        raise ValueError(f"{where}: the settings of {name} are {settings!r}, not {{setting: value}}.")
    settings = dict(settings or {})
    weight = _number(settings.pop("weight", 1.0), f"{where}: weight")
    parameters = inspect.signature(losses[name].function).parameters
    allowed = [key for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    if unknown := sorted(settings.keys() - set(allowed), key=str):
        raise ValueError(f"{where}: {name} has no setting {unknown[0]!r}; it has {', '.join(['weight', *allowed])}.")
    for key, setting in settings.items():
        choices = get_args(parameters[key].annotation)
        if choices and setting not in choices:
            raise ValueError(f"{where}: {key} is {setting!r}, not one of {', '.join(choices)}.")
        if not choices:
            settings[key] = _number(setting, f"{where}: {key}", parameters[key].annotation is int)
    return Term(name, weight, settings, losses[name])


def _number(value: Any, where: str, whole: bool = False, least: float = 0) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {value!r}, not a number.") from None
    if not least <= number < math.inf or (whole and number != int(number)):
        raise ValueError(f"{where} is {value}, but must be a {'whole ' if whole else ''}number of at least {least}.")
    return int(number) if whole else number
