"""A vision-language model as judge: how probable it finds the right answer to a question about a picture."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .images import fingerprint_of
from .questions import NUMBERS, ONE_WORD, Answer, Question

YES_OR_NO = "{} Answer yes or no."
SHOWS = 'Does this figure show "{}"? Please answer Yes or No.'  # VQAScore for Qwen-VL: t2v_metrics' default
"""How a question is put, and a prompt as a whole (VQAScore, arXiv 2404.01291)."""


def whole(text: str) -> Question:
    """The question of VQAScore: whether a picture shows a text."""
    return Question(text, asked=SHOWS.format(text))


def put(question: Question) -> str:
    """A question with its instruction, as the judge reads it."""
    return question.asked or (ONE_WORD if question.answer in NUMBERS else YES_OR_NO).format(question.text)


@dataclass(frozen=True)
class VisionJudge:
    """A vision-language model of transformers.

    The probability of an answer is that of its first token, of the whole vocabulary, right after the question: summed
    over the ways to write it (`yes`, `Yes`, with and without a space before it) that are one token each; for numbers
    the digit counts, too.

    Attributes:
        name: for the report.
        source: folder or hub id.
        revision: the hub's commit, or a fingerprint of the weights.
        model: of `AutoModelForImageTextToText`.
        processor: of `AutoProcessor`, padding on the left.
        batch_size: questions at once; changes nothing but time.
    """

    name: str
    source: str
    revision: str
    model: Any
    processor: Any
    batch_size: int = 8

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], questions: Sequence[Question]) -> list[Answer]:
        """Answers to questions about one picture each."""
        found: list[Answer] = []
        for first in range(0, len(questions), self.batch_size):
            part = slice(first, first + self.batch_size)
            probabilities = self._next_token(images[part], [put(each) for each in questions[part]])
            found += [self._answer(row, each) for row, each in zip(probabilities, questions[part], strict=True)]
        return found

    def _next_token(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        """Probabilities of the token that follows, (N, V), on the CPU."""
        options = {"enable_thinking": False} if "enable_thinking" in self._template else {}
        chats = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                tokenize=False, add_generation_prompt=True, **options,
            )
            for text in texts
        ]  # fmt: skip
        start = getattr(self.processor.tokenizer, "bos_token", None)
        batch = self.processor(
            text=chats,
            images=[[image.convert("RGB")] for image in images],
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (start and chats[0].startswith(start)),  # the template may have set it
        ).to(self.model.device)
        batch = {
            name: value.to(self.model.dtype) if torch.is_floating_point(value) else value
            for name, value in batch.items()
        }
        keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        return self.model(**batch, **keep, use_cache=False).logits[:, -1].float().softmax(-1).cpu()

    @property
    def _template(self) -> str:
        return str(self.processor.chat_template or "")

    @cached_property
    def _tokens(self) -> dict[str, list[int]]:
        """By answer, the tokens that say it."""
        answers = {word: [word] for word in ("yes", "no")}
        answers |= {word: [word, str(number)] for number, word in enumerate(NUMBERS, 1)}
        found = {}
        for word, ways in answers.items():
            forms = [f"{space}{way}" for each in ways for way in (each, each.capitalize()) for space in ("", " ")]
            coded = [self.processor.tokenizer.encode(form, add_special_tokens=False) for form in forms]
            found[word] = sorted({ids[0] for ids in coded if len(ids) == 1})
        return found

    def check(self) -> None:
        """Raises:
        ValueError: if the model cannot be asked. One sentence.
        """
        missing = [word for word in ("yes", "no") if not self._tokens[word]]
        if not self._template:
            reason = "it has no chat template, so no question can be put to it"
        elif getattr(self.model.config, "is_encoder_decoder", False):
            reason = "its text comes from a decoder of its own, whose first token is not an answer"
        elif missing:
            reason = f"its tokenizer has no token for {' and '.join(missing)}"
        else:
            return
        raise ValueError(
            f"{self.source} cannot judge pictures: {reason}; give a model such as Qwen/Qwen3-VL-8B-Instruct."
        )

    def _answer(self, probabilities: torch.Tensor, question: Question) -> Answer:
        choices = NUMBERS if question.answer in NUMBERS else ("yes", "no")
        if not self._tokens[question.answer]:
            raise ValueError(
                f"{self.source} has no token for {question.answer!r}, the right answer to {question.text!r}."
            )
        own = {word: float(probabilities[self._tokens[word]].sum()) for word in choices}
        right = own.pop(question.answer)
        return Answer(min(right, 1.0), right > max(own.values()))


def load_vision_judge(
    name: str,
    source: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    batch_size: int = 8,
) -> VisionJudge:
    """Loads a vision-language model to judge by.

    Args:
        name: for the report.
        source: folder or hub id of anything that `AutoModelForImageTextToText` loads.
        device: where it runs.
        dtype: of the weights; `"auto"` is that of the files.
        revision: of a hub id.
        batch_size: questions at once.

    Raises:
        ValueError: If there is no such model, or it cannot be asked. One sentence.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options = {} if revision is None else {"revision": revision}
    try:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **options).to(device).eval()
        processor = AutoProcessor.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(
            f"{source} is not a vision-language model that transformers can load "
            f"({' '.join(str(error).split())[:160]}): give a folder or hub id such as Qwen/Qwen3-VL-8B-Instruct."
        ) from error
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"{source} has no tokenizer beside its model: give the folder or hub id of both.")
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    commit = None if Path(source).exists() else getattr(model.config, "_commit_hash", None)
    judge = VisionJudge(name, source, commit or fingerprint_of({"model": model}), model, processor, batch_size)
    judge.check()
    return judge
