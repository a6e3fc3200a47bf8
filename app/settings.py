"""What decides a picture beside the model, checked once, and as plain data."""

import math
import random
from dataclasses import asdict, dataclass, fields
from typing import Any

from finelip_diffusion.prompts import LONG_PROMPTS
from finelip_diffusion.weighting import WEIGHTINGS, parse_weights

MAX_CHARACTERS = 20_000  # of a prompt
MAX_IMAGES = 4  # of one request

BOUNDS: dict[str, tuple[float, float, int]] = {  # name: least, greatest, multiple of (0: any number)
    "steps": (1, 150, 1),
    "guidance_scale": (0, 30, 0),
    "seed": (0, 2**32 - 1, 1),
    "num_images": (1, MAX_IMAGES, 1),
    "width": (64, 2048, 8),
    "height": (64, 2048, 8),
}
CHOICES = {"long_prompt": LONG_PROMPTS, "weighting": WEIGHTINGS}


@dataclass(frozen=True)
class Settings:
    """All that decides a picture, beside the model.

    Attributes:
        prompt: What to draw.
        negative_prompt: What to avoid.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        seed: Of the first picture; the next ones have those that follow.
        num_images: Pictures to draw.
        long_prompt: How the prompt is read.
        weighting: What brackets in the prompts mean.
        width, height: In pixels; None is the model's own.

    Raises:
        ValueError: If a value is of another kind or outside its bounds.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int = 20
    guidance_scale: float = 7.5
    seed: int = 0
    num_images: int = 1
    long_prompt: str = "stretch"
    weighting: str = "plain"
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, checked(getattr(self, item.name), item.name))
        if not self.prompt:
            raise ValueError("The prompt is empty: write what the image should show.")

    @property
    def text(self) -> str:
        """The prompt as it is read, without the syntax of weights."""
        return parse_weights(self.prompt, self.weighting)[0][1].text


def checked(value: Any, name: str) -> Any:
    """A value that the setting of this name may have.

    Raises:
        ValueError: If it is of another kind or outside its bounds.
    """
    if name in ("prompt", "negative_prompt"):
        return checked_text(value, name.replace("_", " "))
    if name in CHOICES:
        if value not in CHOICES[name]:
            words = {"long_prompt": "The strategy", "weighting": "Brackets"}[name]
            raise ValueError(f"{words} must be one of {', '.join(CHOICES[name])}.")
        return value
    if value is None and name in ("width", "height"):
        return None
    return checked_number(value, name)


def checked_text(text: Any, name: str) -> str:
    """A text that an encoder and a PNG can hold, without white space around it."""
    if not isinstance(text, str):
        raise ValueError(f"The {name} is not a text.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"The {name} has {len(text):,} characters: shorten it to {MAX_CHARACTERS:,}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"The {name} holds characters that are not valid text: take them out.") from None
    return text.replace("\0", " ").strip()


def checked_number(value: Any, name: str) -> float:
    """A number within its bounds; whole where it has to be."""
    least, greatest, multiple = BOUNDS[name]
    kind = {0: "number", 1: "whole number"}.get(multiple, f"multiple of {multiple}")
    label = name.replace("_", " ").capitalize()
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise ValueError(f"{label} is not a number: choose a {kind} from {least} to {greatest}.")
    if not least <= value <= greatest or (multiple and value % multiple):
        raise ValueError(f"{label} cannot be {str(value)[:20]}: choose a {kind} from {least} to {greatest}.")
    return int(value) if multiple else float(value)


def new_seed() -> int:
    """Any seed, such that `MAX_IMAGES` of them can follow each other."""
    return random.randrange(int(BOUNDS["seed"][1]) - MAX_IMAGES)


def as_settings(values: dict[str, Any]) -> Settings:
    """Settings out of plain data; what is missing keeps its default, what is unknown is left out."""
    known = {item.name for item in fields(Settings)}
    return Settings(**{name: value for name, value in values.items() if name in known})


def as_record(settings: Settings) -> dict[str, Any]:
    """Settings as plain data."""
    return asdict(settings)
