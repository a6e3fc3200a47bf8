"""A recipe: which captions, which losses, which parameters make a long-text encoder. Data, read from YAML."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from .data.captions import CaptionKind
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
        position: how the position table is stretched; `kps`, knowledge-preserved stretching.
        captions: what is read beside the whole caption: nothing more (`full`), its `first_sentence`, sentences drawn
            without the first (`debias`), runs of sentences (`sub_captions`).
        num_sub_captions: runs of sentences for a caption.
        longest_sub_caption: sentences in a run, at most.
        global_loss: of the embeddings of image and caption.
        coarse: of a coarse image embedding and the short caption.
        local_loss: of tokens.
        preserve: keeps the stock latent space, on prompts that fit 77 tokens.
        refine: whose tokens FineLIP's refinement condenses.
        parameters: `full`, or `lora` (rank `lora_rank`; positions and heads are trained in full).
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
    position: Literal["kps"] = "kps"
    captions: CaptionKind = "full"
    num_sub_captions: int = 8
    longest_sub_caption: int = 3
    global_loss: Term | None = None
    coarse: Term | None = None
    local_loss: Term | None = None
    preserve: Term | None = None
    refine: tuple[Literal["image", "text"], ...] = ()
    parameters: Literal["full", "lora"] = "full"
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
    def prompts(self) -> PromptKind | None:
        """The prompts that its terms need beside the captions."""
        return next((term.loss.prompts for term in self.terms.values() if term.loss.prompts), None)


_LOSSES = {"global_loss": CONTRASTIVE, "coarse": CONTRASTIVE, "local_loss": CONTRASTIVE, "preserve": PRESERVING}
_DRAWN: dict[str, tuple[CaptionKind, ...]] = {  # what a term may read -> the captions that it is drawn from
    "short_embeds": ("first_sentence", "debias"),
    "sub_embeds": ("sub_captions",),
}
_LEAST = {"num_sub_captions": 1, "longest_sub_caption": 1, "lora_rank": 1, "logit_scale": 1}
_CHOICES = {
    "position": ("kps",),
    "captions": get_args(CaptionKind),
    "parameters": ("full", "lora"),
    "image_tower": ("trained", "frozen"),
}


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Args:
        path: A YAML file.

    Raises:
        ValueError: If the file is missing, no YAML, or no recipe. One sentence, with what may stand there.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "none"
        raise ValueError(f"there is no recipe {path.stem!r}; beside it are: {others}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no readable YAML file ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds no recipe: a mapping of keys, such as `local_loss: finelip`, must stand there."
        )
    return make_recipe(path.stem, content, str(path))


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
        elif key in _CHOICES or key == "description":
            values[key] = value
        elif key == "logit_scale" and value in (None, "none"):
            values[key] = None
        else:
            values[key] = _number(value, f"{where}: {key}", "float" not in str(known[key].type), _LEAST.get(key, 0))
    recipe = Recipe(name=name, resolved=dict(content), **values)
    if not recipe.terms:
        raise ValueError(f"{where} has no loss: give global_loss, local_loss, or another of {', '.join(_LOSSES)}.")
    names = [term.name for term in recipe.terms.values()]
    for term in recipe.terms.values():
        if names.count(term.name) > 1:
            raise ValueError(f"{where} names {term.name} twice: give it once, with a weight.")
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
