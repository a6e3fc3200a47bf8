"""Draws one long prompt twice from the same noise: as Stable Diffusion reads it, and with the long encoder.

python examples/demo.py                      # examples/unseen_prompt.txt -> demo.png
python examples/demo.py --prompt-file my.txt --seed 3 --out my.png
"""

import argparse
import logging
import textwrap
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont

from finelip_diffusion import FineLIPStableDiffusionPipeline
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.scenes import find_facts, findings, read

PROMPT = Path(__file__).with_name("unseen_prompt.txt")  # in a wording that the model was not trained on
PANEL = 480  # pixels, the side of a drawn image on the picture
MARGIN = 24
FONT, SMALL = ImageFont.load_default(20), ImageFont.load_default(16)


def right(prompt: str, image: Image.Image, tokenizer) -> str:
    """How many of the objects that a prompt states an image shows, such as "4 of 8"; empty where it states none."""
    found = findings(find_facts(prompt), read(image), tokenizer)
    return f"{sum(each.found for each in found)} of {len(found)}" if found else ""


def compare(prompt: str, seed: int, steps: int) -> tuple[Image.Image, Image.Image, int, tuple[str, str]]:
    """Both images, how many characters of the prompt the stock encoder reads, and what each image got right."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # of loading; drawing keeps its own
    stock = diffusers.StableDiffusionPipeline.from_pretrained(BUNDLED_MODEL)
    pipe = FineLIPStableDiffusionPipeline.from_pretrained()
    print(pipe.describe_prompt(prompt, long_prompt="truncate"))
    print(pipe.describe_prompt(prompt))
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 3.0}
    for library in ("diffusers", "transformers"):  # the report has said what the stock pipeline drops
        logging.getLogger(library).setLevel(logging.ERROR)
    cut = stock(prompt, generator=torch.Generator().manual_seed(seed), **settings).images[0]
    whole = pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images[0]
    scores = right(prompt, cut, pipe.tokenizer), right(prompt, whole, pipe.tokenizer)
    if all(scores):
        print(f"Objects drawn as the prompt asks: {' | '.join(scores)}")
    return cut, whole, len(prompt) - len(pipe.describe_prompt(prompt, long_prompt="truncate").dropped), scores


def picture(
    prompt: str, cut: Image.Image, whole: Image.Image, seen_by_stock: int, scores: tuple[str, str]
) -> Image.Image:
    """Both images under their labels and scores, and the prompt with what the stock encoder drops in red."""
    lines, position = [], 0
    for line in textwrap.wrap(prompt, 120, drop_whitespace=False):
        lines.append(
            (line.lstrip(), max(0, min(len(line), seen_by_stock - position) - len(line) + len(line.lstrip())))
        )
        position += len(line)
    width = 2 * PANEL + 3 * MARGIN
    canvas = Image.new("RGB", (width, PANEL + 6 * MARGIN + 24 * (len(lines) + 1)), "white")
    draw = ImageDraw.Draw(canvas)
    labels = ("77 tokens (Stable Diffusion)", "248 tokens (the long encoder)")
    panels = [
        (f"{label}: {score}" if score else label, image)
        for label, score, image in zip(labels, scores, (cut, whole), strict=True)
    ]
    for column, (label, image) in enumerate(panels):
        left = MARGIN + column * (PANEL + MARGIN)
        draw.text((left, MARGIN), label, "black", FONT)
        canvas.paste(image.resize((PANEL, PANEL), Image.Resampling.NEAREST), (left, 2 * MARGIN + 8))
    top = PANEL + 3 * MARGIN + 8
    draw.text((MARGIN, top), "The prompt; the 77-token encoder never reads what is red:", "black", SMALL)
    for row, (line, seen) in enumerate(lines):
        height = top + 24 * (row + 1) + 8
        draw.text((MARGIN, height), line[:seen], "black", SMALL)
        draw.text((MARGIN + draw.textlength(line[:seen], SMALL), height), line[seen:], "#c00000", SMALL)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-file", type=Path, default=PROMPT)
    parser.add_argument("--out", type=Path, default=Path("demo.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    try:
        prompt = args.prompt_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"The prompt file cannot be read as UTF-8 text: {error}.")
    if not prompt:
        parser.error(f"The prompt file {args.prompt_file} is empty: write a prompt into it.")
    if not args.out.parent.is_dir() or args.out.suffix != ".png" or args.steps < 1:
        parser.error(f"--out {args.out} must be a .png in a folder that exists, and --steps {args.steps} at least 1.")
    picture(prompt, *compare(prompt, args.seed, args.steps)).save(args.out)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    main()
