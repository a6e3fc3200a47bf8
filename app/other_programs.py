"""What the pictures of A1111, Forge, Fooocus, ComfyUI and InvokeAI say of how they were drawn."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import comfyui_graph
from sd_parsers.exceptions import ParserError
from sd_parsers.parsers import FooocusParser, InvokeAIParser, Parser
from settings import checked

from finelip_diffusion.weighting import parse_weights

MAX_TEXT = 4_000_000  # characters that a picture may say of itself; graphs of hundreds of nodes are shorter

EXIF, USER_COMMENT, IMAGE_DESCRIPTION, MAKE, MODEL = 0x8769, 0x9286, 0x010E, 0x010F, 0x0110


@dataclass(frozen=True)
class Found:
    """What a picture says.

    Attributes:
        program: Who drew it.
        values: Settings of the page that could be read, by name.
        unread: What else it says that decided the picture and that the page does not have, in words.
    """

    program: str
    values: Mapping[str, Any]
    unread: tuple[str, ...] = ()


def texts_of(image: Any) -> dict[str, str]:
    """The texts that an opened picture carries; no pixel is decoded.

    Args:
        image: A PIL image, PNG, JPEG or WebP.

    Returns:
        By name: the text chunks of a PNG; for EXIF, A1111's `parameters` and ComfyUI's `prompt` and `workflow`.
    """
    texts = {key: text for key, text in image.info.items() if isinstance(text, str)}
    exif = image.getexif()
    comment = exif.get_ifd(EXIF).get(USER_COMMENT)
    if isinstance(comment, bytes) and (text := _user_comment(comment)):
        texts.setdefault("parameters", text)
    for tag in (IMAGE_DESCRIPTION, MAKE, MODEL):  # ComfyUI writes "prompt:{...}" there
        key, colon, text = str(exif.get(tag, "")).partition(":")
        if colon and key.lower() in ("prompt", "workflow"):
            texts.setdefault(key.lower(), text)
    return texts


def _user_comment(comment: bytes) -> str:
    """The text of EXIF's UserComment: eight bytes say how it is written."""
    code, text = comment[:8], comment[8:]
    if code == b"UNICODE\0":  # the standard leaves the order of the two bytes open, and programs differ
        big = text[:2] == b"\xfe\xff" or (text[:2] != b"\xff\xfe" and text[::2].count(0) >= text[1::2].count(0))
        return text.decode("utf-16-be" if big else "utf-16-le", "replace").lstrip("\ufeff")
    return (text if code in (b"ASCII\0\0\0", b"\0" * 8) else comment).decode("utf-8", "replace").strip("\0")


def read(texts: Mapping[str, str]) -> Found | None:
    """What the texts of a picture say, or None where no program that is known has written them.

    Raises:
        ValueError: If one has, but what it wrote cannot be read.
    """
    for key, beginning, program, parse in FORMATS:
        if texts.get(key, "").lstrip().startswith(beginning) and key in texts:
            if len(texts[key]) > MAX_TEXT:
                raise ValueError(f"What {program} wrote in this picture is too long: {len(texts[key]):,} characters.")
            try:
                values, unread = parse(texts[key])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ParserError) as error:
                raise ValueError(f"What {program} wrote in this picture cannot be read.") from error
            return _checked(program, values, unread)
    return None


def _checked(program: str, values: Mapping[str, Any], unread: list[str]) -> Found:
    """Leaves out what the page cannot take, and says so."""
    good = {}
    for name, value in values.items():
        try:
            good[name] = checked(value, name)
        except ValueError as error:
            unread.append(f"{name.replace('_', ' ')} ({str(error).rstrip('.')})")
    if not good.get("prompt"):
        unread.insert(0, "the prompt")
        good.pop("prompt", None)
    else:
        good |= _weighting(program, good["prompt"], good.get("negative_prompt", ""), unread)
    return Found(program, good, tuple(dict.fromkeys(unread)))


def _weighting(program: str, prompt: str, negative_prompt: str, unread: list[str]) -> dict[str, str]:
    """What brackets mean in the prompts of a program, and the prompts without what the page cannot take."""
    texts = {"prompt": prompt, "negative_prompt": negative_prompt}
    for name, text in texts.items():
        unread += [f"LoRA {match}" for match in re.findall(r"<(?:lora|lyco|hypernet):([^:>]+)[^>]*>", text)]
        texts[name] = re.sub(r"\s*<(?:lora|lyco|hypernet):[^>]*>", "", text).strip()
    how = "compel" if program == "InvokeAI" else "a1111"
    try:
        plain = all(parse_weights(text, how)[0][1].text == text for text in texts.values())
    except ValueError:
        plain = True
        unread.append("weights in the prompt")
    return {**texts, "weighting": "plain" if plain else how}


# ------------------------------------------------------------------------------------------------- A1111 and Forge

A1111 = {"Steps": "steps", "CFG scale": "guidance_scale", "Seed": "seed"}
A1111_UNREAD = (
    "Sampler", "Schedule type", "Model", "VAE", "Clip skip", "Denoising strength", "Hires upscale", "Refiner"
)  # fmt: skip
NAMED = re.compile(r'(?:^|,)\s*([A-Z][^:,"]*):\s*("(?:[^"\\]|\\.)*"|[^,]*)')


def _a1111(text: str) -> tuple[dict[str, Any], list[str]]:
    """The prompt, a line that begins with `Negative prompt:`, and last a line `Steps: 20, Sampler: ..., Size: 8x8`."""
    lines = text.strip().split("\n")
    last = max((index for index, line in enumerate(lines) if line.startswith("Steps: ")), default=len(lines))
    named = {match[1]: match[2].strip().strip('"') for match in NAMED.finditer(" ".join(lines[last:]))}
    prompt, _, negative = "\n".join(lines[:last]).partition("Negative prompt:")
    values: dict[str, Any] = {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    values |= {name: float(named[key]) for key, name in A1111.items() if key in named}
    if match := re.fullmatch(r"(\d+)x(\d+)", named.get("Size", "")):
        values |= {"width": int(match[1]), "height": int(match[2])}
    if "steps" not in values:
        raise ValueError("no line of settings")
    return values, [f"{key.lower()} {named[key]}" for key in A1111_UNREAD if key in named]


# --------------------------------------------------------------------------------------------------------- InvokeAI

INVOKEAI = {
    "positive_prompt": "prompt", "negative_prompt": "negative_prompt", "steps": "steps", "seed": "seed",
    "cfg_scale": "guidance_scale", "width": "width", "height": "height",
}  # fmt: skip


def _invokeai(text: str) -> tuple[dict[str, Any], list[str]]:
    """A flat JSON object, since InvokeAI 3."""
    data = json.loads(text)
    values = {name: data[key] for key, name in INVOKEAI.items() if data.get(key) is not None}
    return values, list(_invokeai_unread(data))


def _invokeai_unread(data: Mapping[str, Any]) -> Iterator[str]:
    for key, words in (("scheduler", "scheduler"), ("model", "model"), ("vae", "VAE"), ("clip_skip", "clip skip")):
        if value := data.get(key):
            yield f"{words} {_name(value)}"
    for item in data.get("loras") or []:
        yield f"LoRA {_name(item.get('model') or item.get('lora') or item)}"
    for key in ("controlnets", "ipAdapters", "t2iAdapters", "control_layers", "canvas_v2_metadata"):
        if data.get(key):
            yield key


def _name(value: Any) -> str:
    return str(value.get("name") or value.get("model_name") or "") if isinstance(value, Mapping) else str(value)


# ------------------------------------------------------------------------------ Fooocus, and InvokeAI before version 3


def _by_sd_parsers(parser: Parser, key: str) -> Callable[[str], tuple[dict[str, Any], list[str]]]:
    """A reader of `sd-parsers`.

    It reads A1111, newer InvokeAI and ComfyUI as well, but less: it refuses a second `Negative prompt:`, forgets the
    model's name where InvokeAI says `name`, and follows no link of a graph to a text or a number.
    """

    def parse(text: str) -> tuple[dict[str, Any], list[str]]:
        info = parser.parse({key: text})
        sampler = info.samplers[0]
        says = {**info.metadata, **sampler.parameters}
        values: dict[str, Any] = {
            "prompt": ", ".join(item.value for item in info.prompts),
            "negative_prompt": ", ".join(item.value for item in info.negative_prompts),
        }
        numbers = {
            "steps": "steps",
            "seed": "seed",
            "guidance_scale": "cfg_scale",
            "width": "width",
            "height": "height",
        }
        values |= {name: float(says[key]) for name, key in numbers.items() if key in says}
        if match := re.fullmatch(r"\((\d+), (\d+)\)", str(says.get("resolution"))):
            values |= {"width": int(match[1]), "height": int(match[2])}
        unread = [f"sampler {sampler.name}", *([f"model {sampler.model}"] if sampler.model else [])]
        unread += [
            f"{word} {says[word]}" for word in ("scheduler", "styles", "sharpness", "refiner_model") if word in says
        ]
        unread += [f"LoRA {item[0]}" for item in says.get("loras") or []]
        return values, unread

    return parse


FORMATS = (  # name of the text, how it begins, who wrote it, how it is read
    ("parameters", "{", "Fooocus", _by_sd_parsers(FooocusParser(), "parameters")),
    ("parameters", "", "A1111 or Forge", _a1111),
    ("invokeai_metadata", "", "InvokeAI", _invokeai),
    ("sd-metadata", "", "InvokeAI", _by_sd_parsers(InvokeAIParser(), "sd-metadata")),
    ("Dream", "", "InvokeAI", _by_sd_parsers(InvokeAIParser(), "Dream")),
    ("prompt", "", "ComfyUI", comfyui_graph.read),
)
