"""Texts beyond the window of the training, in one longer window and in several of the trained length.

A text tells several scenes one after another, until it has as many tokens as asked for. It is compared with the mean
image embedding of its pictures, and with that of a list in which another picture, a near-duplicate or a scene of its
own, stands in one place: that of the first picture, or of the last one, which the first window does not tell of. What
is counted is how often the right list is the nearer one; chance is a half.

Readings: one window as long as the text, by NTK scaling or by the trained angles (rotary positions alone); the mean of
the embeddings of windows of the trained length, cut into even parts; the first window alone.

    python benchmarks/text_length.py --model runs/rotary/finelip_model
    python benchmarks/text_length.py --model runs/finelip/finelip_model          # windows, of a position table
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer, HfArgumentParser

from finelip_diffusion.evaluation.intervals import bootstrap_interval, markdown_table, shown
from finelip_diffusion.model import FineLIPModel, load_clip
from finelip_diffusion.rotary import rotary_settings
from finelip_diffusion.scenes import Scene, describe, render, sample_scene, vary

PICTURES = 8  # of a list, at most; a scene takes over 70 tokens
CHANGES = {
    "near-duplicate": lambda scene, seed: vary(scene, "alter", seed),
    "other scene": lambda _, seed: scene_of(seed),
}
ONE, ANGLES, WINDOWS, FIRST = "one window, NTK scaling", "one window, trained angles", "windows, mean", "first window"


@dataclass
class Arguments:
    """The defaults take a few minutes of two cores."""

    model: str = field(metadata={"help": "The CLIP or FineLIP model: a folder, a hub id or a file."})
    tokens: list[int] = field(
        default_factory=lambda: [248, 300, 500], metadata={"help": "The lengths of the texts in tokens."}
    )
    texts: int = field(default=128, metadata={"help": "The number of texts of each length."})
    seed: int = field(
        default=0, metadata={"help": "The random seed that selects the scenes, which are all from the test split."}
    )
    device: str = field(default="cpu", metadata={"help": "The device: cpu or cuda."})


def scene_of(seed: int) -> Scene:
    return sample_scene(seed, "test")


def tell(scenes: list[Scene], tokenizer: CLIPTokenizer, tokens: int, seed: int) -> tuple[list[int], int]:
    """Ids of the contents of a text of `tokens` tokens, and how many scenes it tells from beginning to end."""
    ids: list[int] = []
    whole = 0
    for number, scene in enumerate(scenes):
        ids += tokenizer(str(describe(scene, seed + number)), add_special_tokens=False, verbose=False).input_ids
        if len(ids) > tokens - 2:
            break
        whole += 1
    return ids[: tokens - 2], whole


def windows_of(ids: list[int], length: int, tokenizer: CLIPTokenizer) -> list[Tensor]:
    """Contents in windows of at most `length` tokens, each between a start and an end token, as even as they come."""
    count = -(-len(ids) // (length - 2))
    step = -(-len(ids) // count)
    return [
        torch.tensor([tokenizer.bos_token_id, *ids[first : first + step], tokenizer.eos_token_id])
        for first in range(0, len(ids), step)
    ]


def read_as(reading: str, model: FineLIPModel, ids: list[int], tokenizer: CLIPTokenizer, length: int) -> Tensor:
    """The embedding of a text, (E,), of length 1; `length` is the trained window."""
    device = model.device
    if reading in (ONE, ANGLES):
        windows = windows_of(ids, len(ids) + 2, tokenizer)
    else:
        windows = windows_of(ids, length, tokenizer)
    windows = windows[:1] if reading == FIRST else windows
    embeds = [model.encode_text(window[None].to(device))[0][0] for window in windows]
    return F.normalize(torch.stack(embeds).mean(0), dim=0)


def readings(args: Arguments, tokens: int) -> Iterator[tuple[str, FineLIPModel, int]]:
    """The ways to read texts of some length, each with its model, and the trained window."""
    model = load_clip(args.model)[0].to(args.device)
    text = model.config.clip_config.text_config
    trained = (rotary_settings(text) or {}).get("trained_length", text.max_position_embeddings)
    yield FIRST, model, trained
    yield WINDOWS, model, trained
    if rotary_settings(text) is None or tokens <= trained:
        return
    longer = load_clip(args.model, max_length=tokens)[0].to(args.device)
    yield ONE, longer, trained
    for layer in longer.clip.text_model.encoder.layers:
        config = layer.self_attn.config
        config.rotary = config.rotary | {"trained_length": tokens}
    yield ANGLES, longer, trained


@torch.no_grad()
def embed(model: FineLIPModel, processor: object, scenes: list[Scene]) -> Tensor:
    """(N, E), of length 1."""
    pixels = processor([render(scene) for scene in scenes], return_tensors="pt").pixel_values  # type: ignore[operator]
    return model.encode_image(pixels.to(model.device))[0]


@torch.no_grad()
def measure(args: Arguments, tokens: int) -> list[list[str]]:
    """Rows of the table for texts of some length."""
    base, tokenizer, processor = load_clip(args.model)
    base.to(args.device)
    texts, right = [], []
    wrong: dict[tuple[str, str], list[Tensor]] = {}
    for number in range(args.texts):
        first = (args.seed * args.texts + number) * PICTURES
        scenes = [scene_of(seed) for seed in range(first, first + PICTURES)]
        ids, whole = tell(scenes, tokenizer, tokens, first)
        pictures = embed(base, processor, scenes[:whole])
        texts.append(ids)
        right.append(pictures.mean(0))
        for place, at in (("first", 0), ("last", whole - 1)):
            for kind, change in CHANGES.items():
                changed = pictures.clone()
                changed[at] = embed(base, processor, [change(scenes[at], 10**6 + first)])[0]
                wrong.setdefault((place, kind), []).append(changed.mean(0))
    pairs = {key: torch.stack([torch.stack(right), torch.stack(lists)], dim=1) for key, lists in wrong.items()}
    rows = []
    for reading, model, trained in readings(args, tokens):
        embeds = torch.stack([read_as(reading, model, ids, tokenizer, trained) for ids in texts])
        cells = []
        for lists in pairs.values():  # (N, 2, E)
            scores = F.cosine_similarity(lists, embeds[:, None], dim=-1)
            cells.append(shown(bootstrap_interval((scores[:, 0] > scores[:, 1]).double().cpu())))
        rows.append([f"{tokens} tokens, {reading}", *cells])
    return rows


def main(args: Arguments) -> None:
    heads = ["reading", *(f"{place}, {kind}" for place in ("first", "last") for kind in CHANGES)]
    rows = [row for tokens in args.tokens for row in measure(args, tokens)]
    print(
        f"{args.model}: {args.texts} texts of each length, seed {args.seed}, torch {torch.__version__}; chance 0.5\n"
    )
    print(*markdown_table(heads, rows), sep="\n")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
