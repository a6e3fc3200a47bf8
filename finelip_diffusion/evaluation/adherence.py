"""How much of a prompt arrives in its image, and where along the prompt it stops.

A reader of scenes tells fact by fact; a CLIP scores sentence by sentence, for any model; what a changed word changes
shows in the pixels. Values are kept by prompt, so that two encoders can be compared prompt by prompt.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPTokenizer, PreTrainedTokenizerBase

from ..model import FineLIPModel, load_clip
from ..prompts import sentence_bounds
from ..scenes import CELL_SIZE, Caption, Scene, alterations, as_record, describe, findings, read, stock_border
from .intervals import bootstrap_interval

DEBIASED = 0.3  # share of what all texts have in common that LongAlign keeps
TOKEN_EDGES = (0, 40, 76, 110, 150, 190, 249, 350, 500)
"""Where the parts of a prompt begin, counted in tokens; the start token is 0, a stock encoder reads up to 75."""

Figure = dict[str, Any]
"""`value`, its 95% interval `low` and `high`, `n`, and the paired `difference` from a baseline, or None."""


# ------------------------------------------------------------------------------------------------------------ figures


def figure(values: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]] | None = None) -> Figure:
    """A mean with its 95% bootstrap interval over prompts, and its paired difference from a baseline.

    Prompts are drawn anew, not values: the facts of one image hang together.

    Args:
        values: by prompt, any number for each.
        baseline: the same values of another condition, in the same places.

    Returns:
        `n` counts values. The difference is None without a baseline.

    Raises:
        ValueError: if the baseline has other prompts, or another number of values for one.
    """
    result: Figure = _interval(values) | {"difference": None}
    if baseline is not None:
        if [len(own) for own in values] != [len(own) for own in baseline]:
            raise ValueError("the baseline's values are not those of the same facts of the same prompts.")
        pairs = zip(values, baseline, strict=True)
        result["difference"] = _interval([[a - b for a, b in zip(own, other, strict=True)] for own, other in pairs])
    return result


def _interval(values: Sequence[Sequence[float]]) -> Figure:
    counts = torch.tensor([len(own) for own in values])
    flat = torch.tensor([float(value) for own in values for value in own], dtype=torch.float64)
    return bootstrap_interval(flat, torch.arange(len(counts)).repeat_interleave(counts))


def curve(points: Sequence[Sequence[tuple[int, float]]]) -> list[Figure]:
    """Means along the prompt.

    Args:
        points: by prompt, (token, value): where the fact or sentence ends, and what it is worth.

    Returns:
        A figure for each part of `TOKEN_EDGES` that holds any point, with its first token `from`, and `to`, the first
        one of the next part, or None.
    """
    parts: list[list[list[float]]] = [[[] for _ in points] for _ in TOKEN_EDGES]
    for place, own in enumerate(points):
        for token, value in own:
            parts[bisect_right(TOKEN_EDGES, token) - 1][place].append(value)
    edges: list[int | None] = [*TOKEN_EDGES, None]
    return [
        {"from": edges[number], "to": edges[number + 1], **_interval(part)}
        for number, part in enumerate(parts)
        if any(part)
    ]


# ---------------------------------------------------------------------------------------------------- a CLIP as judge


@dataclass(frozen=True)
class Sentence:
    """A sentence of a prompt, `prompt[start:end]`, and the index of its last token; the start token has index 0."""

    start: int
    end: int
    token: int


def sentences_of(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[Sentence]:
    """The sentences of a prompt, as `segment` cuts it."""
    encoding = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoding["offset_mapping"]
    return [
        Sentence(offsets[first][0], offsets[stop - 1][1], stop) for first, stop in sentence_bounds(prompt, offsets)
    ]


class _Scorer(nn.Module):
    """A CLIP as torchmetrics calls one."""

    def __init__(self, model: FineLIPModel):
        super().__init__()
        self.model, self.config = model, model.config.clip_config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values)[0]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.encode_text(input_ids, attention_mask)[0]


@dataclass(frozen=True)
class Judge:
    """A CLIP that scores images against texts: the stock one of 77 tokens, or a long one.

    Texts longer than it reads are cut in front of the end token, which keeps its place; torchmetrics' own cut loses
    the end token, whose state is the embedding (its issue 2883).
    """

    name: str
    source: str
    model: FineLIPModel
    tokenizer: CLIPTokenizer
    image_processor: CLIPImageProcessor

    @property
    def max_length(self) -> int:
        """Tokens that it reads, start and end included."""
        return self.model.config.clip_config.text_config.max_position_embeddings

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, E), of length 1, in float32 on the CPU."""
        pixel_values = self.image_processor(list(images), return_tensors="pt").pixel_values
        embeds, _ = self.model.encode_image(pixel_values.to(self.model.device, self.model.dtype))
        return embeds.float().cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """(N, E), of length 1, in float32 on the CPU."""
        parts = []
        for first in range(0, len(texts), batch_size):
            batch = self._encode(list(texts[first : first + batch_size])).to(self.model.device)
            parts.append(self.model.encode_text(batch["input_ids"], batch["attention_mask"])[0].float().cpu())
        return torch.cat(parts)

    def _encode(self, texts: list[str]) -> Any:
        return self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt", verbose=False
        )

    def for_torchmetrics(self) -> Callable[[], tuple[nn.Module, Callable[..., Any]]]:
        """What `torchmetrics.multimodal.CLIPScore(judge.for_torchmetrics())` takes: model and processor."""

        def processor(text: list[str] | None = None, images: Any = None, **_: Any) -> Any:
            return self._encode(text) if text is not None else self.image_processor(images, return_tensors="pt")

        return lambda: (_Scorer(self.model).eval(), processor)


def load_judge(name: str, source: str, device: torch.device | str = "cpu") -> Judge:
    """Loads a CLIP to judge by.

    Args:
        name: for the report.
        source: whatever `load_clip` takes.
        device: where it runs.

    Raises:
        ValueError: if there is no such model. One sentence.
    """
    model, tokenizer, image_processor = load_clip(source)
    return Judge(name, source, model.to(device).eval(), tokenizer, image_processor)


def clip_scores(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """CLIPScore of each pair: 100 times the cosine, (N, E) and (N, E) -> (N,)."""
    return 100 * F.cosine_similarity(image_embeds.double(), text_embeds.double(), dim=-1)


@dataclass(frozen=True)
class Sentences:
    """The sentences of N prompts as a judge reads them.

    Attributes:
        embeds: (S, E), of length 1.
        prompts: (S,), the number of the prompt that a sentence belongs to.
        tokens: (S,), where in it the sentence ends.
        number: N.
    """

    embeds: Tensor
    prompts: Tensor
    tokens: Tensor
    number: int


def embed_sentences(judge: Judge, prompts: Sequence[str]) -> Sentences:
    """Embeds each sentence of each prompt, by itself."""
    parts = [
        (row, prompt, part) for row, prompt in enumerate(prompts) for part in sentences_of(prompt, judge.tokenizer)
    ]
    return Sentences(
        judge.embed_texts([prompt[part.start : part.end] for _, prompt, part in parts]),
        torch.tensor([row for row, _, _ in parts]),
        torch.tensor([part.token for _, _, part in parts]),
        len(prompts),
    )


def listening(image_embeds: Tensor, sentences: Sentences) -> list[list[tuple[int, float]]]:
    """How much of each sentence is in the image: its CLIPScore there less that with another prompt's image.

    The other image is that of the prompt half the list further on, so what all images of a model have in common, and
    how well a sentence scores with anything, cancel out.

    Args:
        image_embeds: (N, E), one image for each prompt, by the judge of the sentences.
        sentences: of N prompts, at least two.

    Returns:
        By prompt, (token, difference) of each sentence; token is where the sentence ends.

    Raises:
        ValueError: if there are fewer than two prompts.
    """
    if sentences.number < 2:
        raise ValueError("a sentence is compared with another prompt's image: give at least 2 prompts.")
    rows = sentences.prompts
    others = (rows + sentences.number // 2) % sentences.number
    own_scores, other_scores = (clip_scores(image_embeds[which], sentences.embeds) for which in (rows, others))
    points: list[list[tuple[int, float]]] = [[] for _ in range(sentences.number)]
    for row, token, value in zip(
        rows.tolist(), sentences.tokens.tolist(), (own_scores - other_scores).tolist(), strict=True
    ):
        points[row].append((token, value))
    return points


def dense_scores(
    image_embeds: Tensor, sentences: Sentences, kept: float = 1.0
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """DenScore of LongAlign (arXiv 2410.11817; its `loss.py`): the mean of a prompt's sentence embeddings, times its
    image's, times 100.

    The mean is not brought to length 1. Debiased, what texts have in common is kept to a share of 0.3: with v the mean
    over all prompts, of length 1, t - (1 - 0.3) (t . v) v takes the place of t.

    Args:
        image_embeds: (N, E), one image for each prompt, by the judge of the sentences.
        sentences: of N prompts.
        kept: share of v that is kept; 1 is the original score.

    Returns:
        The score of each prompt, and by prompt (token, score) of each sentence, of which it is the mean.
    """
    rows, embeds = sentences.prompts, sentences.embeds.double()
    counts = torch.bincount(rows, minlength=sentences.number).clamp(min=1)[:, None]
    means = torch.zeros(sentences.number, embeds.shape[1], dtype=torch.float64).index_add_(0, rows, embeds) / counts
    common = F.normalize(means.mean(0), dim=0)
    embeds = embeds - (1 - kept) * (embeds @ common)[:, None] * common
    scores = 100 * (embeds * F.normalize(image_embeds.double(), dim=-1)[rows]).sum(-1)
    points: list[list[tuple[int, float]]] = [[] for _ in range(sentences.number)]
    for row, token, score in zip(rows.tolist(), sentences.tokens.tolist(), scores.tolist(), strict=True):
        points[row].append((token, score))
    return [sum(score for _, score in own) / max(len(own), 1) for own in points], points


# ---------------------------------------------------------------------------------------------------- scenes, as read


def reading(caption: Caption, scene: Scene, image: Image.Image, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the reader finds of a caption in an image, as plain data.

    Returns:
        `facts`, the record of each; `background`, whether it is right; `uncalled`, whether each cell that the caption
        leaves empty holds something.
    """
    shown = read(image)
    called, filled = ({item.cell for item in each.objects} for each in (scene, shown))
    return {
        "facts": [as_record(finding) for finding in findings(caption, shown, tokenizer)],
        "background": shown.background == scene.background,
        "uncalled": [cell in filled for cell in range(9) if cell not in called],
    }


# -------------------------------------------------------------------------------------------------------- tail changes


@dataclass(frozen=True)
class Change:
    """A prompt told again with one thing changed after token 77.

    Attributes:
        prompt: the changed prompt.
        span: its characters that are new, [start, end).
        old: what stood there.
        cell: of a scene, the cell that changes; None where no place is known.
    """

    prompt: str
    span: tuple[int, int]
    old: str
    cell: int | None = None


def change_scene(scene: Scene, seed: int, tokenizer: PreTrainedTokenizerBase) -> Change | None:
    """Changes the shape, color or size of one object that a caption tells wholly after token 77.

    Wording and order stay.

    Args:
        scene: of the held-out split; so is the changed one.
        seed: of its caption, and of the choice.
        tokenizer: counts tokens.

    Returns:
        The change, or None where the caption has no such object or no held-out alternative.
    """
    caption = describe(scene, seed)
    border = stock_border(caption, tokenizer)
    late = [fact.object for fact in caption.facts if border is not None and fact.start >= border]
    choices = []
    for other in alterations(scene, late):
        old, new = set(scene.objects) - set(other.objects), set(other.objects) - set(scene.objects)
        if {item.cell for item in old} == {item.cell for item in new} and len(new) == 1 and other.split == "test":
            choices.append((other, min(new).cell))
    if not choices:
        return None
    other, cell = random.Random(seed).choice(choices)
    return _change(caption, describe(other, seed, like=scene), cell)


def change_ending(prompt: str, other: str, tokenizer: PreTrainedTokenizerBase) -> Change | None:
    """Puts another prompt's last sentence in the place of this one's, or None where that begins before token 77."""
    border, last = stock_border(prompt, tokenizer), sentences_of(prompt, tokenizer)[-1:]
    ending = [other[part.start : part.end] for part in sentences_of(other, tokenizer)[-1:]]
    if border is None or last[0].start < border or not ending:
        return None
    return _change(prompt, prompt[: last[0].start] + ending[0], None)


def _change(before: str, after: str, cell: int | None) -> Change | None:
    """What differs between two prompts, in whole words; None where nothing does."""
    if before == after:
        return None
    first = _alike(before, after)
    last = _alike(before[first:][::-1], after[first:][::-1])
    while first and before[first - 1].isalnum():
        first -= 1
    while last and before[-last].isalnum():
        last -= 1
    return Change(str(after), (first, len(after) - last), str(before[first : len(before) - last]), cell)


def _alike(one: str, other: str) -> int:
    """Characters that two texts begin with in common."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


@dataclass(frozen=True)
class Difference:
    """What tells two images apart.

    Attributes:
        rms: root mean square difference of pixels in 0..1.
        inside: share of the squared difference that lies in a scene's cell, a ninth of the picture; None without a
            cell, or where no pixel differs by more than one level of 255, which batches of another size may do.
    """

    rms: float
    inside: float | None


def change_in_image(before: Image.Image, after: Image.Image, cell: int | None = None) -> Difference:
    """How much two images of one size differ, and how much of that in a cell of a scene."""
    one, other = (np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in (before, after))
    squares = np.square(one - other)
    inside = None
    if cell is not None and squares.max() > (1.5 / 255) ** 2:
        top, left = (CELL_SIZE * index for index in divmod(cell, 3))
        inside = float(squares[top : top + CELL_SIZE, left : left + CELL_SIZE].sum() / squares.sum())
    return Difference(float(np.sqrt(squares.mean())), inside)


# ------------------------------------------------------------------------------------------------------ what UNets see


@torch.inference_mode()
def prediction_drift(
    pipe: Any, prompts: Sequence[str], long_prompt: str, seed: int = 0, num_steps: int = 4
) -> list[float]:
    """How far a UNet's prediction for short prompts moves when an encoder takes the stock one's place.

    The stock encoder draws; at each of its steps the UNet sees the same noisy latents with the other encoder's states.

    Args:
        pipe: one of this package's pipelines, with a stock encoder.
        prompts: texts that fit the stock encoder.
        long_prompt: the strategy to compare with `"truncate"`.
        seed: of the noise; prompt i has `seed + i`.
        num_steps: denoising steps.

    Returns:
        By prompt, the root mean square difference relative to that of the stock prediction, over all steps.
    """
    drifts = []
    for number, prompt in enumerate(prompts):
        stock, other = (_predictions(pipe, prompt, how, seed + number, num_steps) for how in ("truncate", long_prompt))
        moved = size = 0.0
        for (arguments, kept), (others, _) in zip(stock, other, strict=True):
            conditioning = {
                key: others[key] for key in ("encoder_hidden_states", "added_cond_kwargs") if key in others
            }
            again = pipe.unet(**{**arguments, **conditioning, "return_dict": False})[0]
            moved += (again - kept).double().square().sum().item()
            size += kept.double().square().sum().item()
        drifts.append((moved / size) ** 0.5)
    return drifts


def _predictions(pipe: Any, prompt: str, long_prompt: str, seed: int, num_steps: int) -> list[tuple[dict, Tensor]]:
    """Arguments and output of the UNet at each step of one drawing without guidance."""
    calls: list[tuple[dict, Tensor]] = []

    def record(_: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        calls.append((dict(zip(("sample", "timestep"), args, strict=False)) | kwargs, output[0]))

    handle = pipe.unet.register_forward_hook(record, with_kwargs=True)
    try:
        pipe(
            prompt,
            long_prompt=long_prompt,
            num_inference_steps=num_steps,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )
    finally:
        handle.remove()
    return calls
