"""From a batch to a loss: what a recipe's terms need is encoded, gathered from all processes, and compared."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.random import fork_rng
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import CLIPModel

from .data.stored import TensorStore, recalled
from .model import FineLIPModel, last_tokens
from .recipes import Recipe
from .refinement import AttentionPooling, TokenRefinement

SIGMOID_BIAS = -10.0  # where SigLIP's bias starts
HEADS: dict[str, Callable[[int, int], nn.Module | nn.Parameter]] = {
    "aggregation": TokenRefinement,
    "pooling": lambda width, _: AttentionPooling(width),
    "logit_bias": lambda *_: nn.Parameter(torch.tensor(SIGMOID_BIAS)),
}
"""What a loss may read beside representations: modules with parameters of their own, of (width, tokens)."""

Representations = dict[str, Tensor]
IMAGE = ("image_embeds", "image_tokens", "local_image_tokens", "local_image_mask")
TEXT = ("text_embeds", "text_tokens", "text_mask", "local_text_tokens", "local_text_mask", "span_embeds")
KEPT = ("kept_states", "kept_penultimate", "kept_embeds")
TEACHER = ("teacher_kept_states", "teacher_kept_penultimate", "teacher_kept_embeds")
TEACHER_IMAGE = "teacher_image_embeds"
STORED = ("image", "teacher", "teacher_image")
"""What `data.stored` can keep: of a frozen image tower, and of the teacher, of prompts and of images."""


class Objective(nn.Module):
    """The loss of a recipe; holds the heads that its terms need."""

    def __init__(self, recipe: Recipe, width: int, num_refined_tokens: int):
        """Args: the recipe; the width of projected tokens, E; the number of tokens that refinement leaves, K."""
        super().__init__()
        self.recipe = recipe
        self.names = {name for term in recipe.terms.values() for name in term.loss.reads}
        for name in sorted(self.names & HEADS.keys()):
            setattr(self, name, HEADS[name](width, num_refined_tokens))

    @property
    def needs(self) -> set[str]:
        """Names of the representations that the terms compare."""
        return {"image_ids" if name == "same" else name for name in self.names - HEADS.keys()}

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with the stock CLIP."""
        return not self.needs.isdisjoint({*TEACHER, TEACHER_IMAGE})

    def forward(self, representations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weighted terms by name; their sum is the loss."""
        values: dict[str, Any] = dict(representations)
        values |= {name: getattr(self, name) for name in self.names & HEADS.keys()}
        if "same" in self.names:
            ids = representations["image_ids"]
            values["same"] = ids[:, None] == ids
        terms = {}
        for term in self.recipe.terms.values():
            read = [values[name] for name in term.loss.reads]
            terms[term.name] = term.weight * term.loss.function(*read, **term.settings)
        return terms


class TrainingStep(nn.Module):
    """Model and objective as one module, so that whatever wraps it for several devices sees one forward."""

    def __init__(
        self,
        model: FineLIPModel,
        objective: Objective,
        teacher: CLIPModel | None = None,
        gather: Callable[[Representations], Representations] = dict,
        stores: Mapping[str, TensorStore] | None = None,
    ):
        """Puts the parts together.

        Args:
            model: what is trained.
            objective: what for.
            teacher: the stock CLIP, frozen, for recipes that preserve its latent space.
            gather: joins the representations of all processes, with gradients.
            stores: what is looked up rather than computed, by `STORED`: `image` needs a frozen image tower.
        """
        super().__init__()
        self.stores = dict(stores or {})
        self.model, self.objective, self.gather = model, objective, gather
        self._teacher = [teacher]  # in a list: no part of the state, nor of what is trained

    def frozen_towers(self) -> dict[str, dict[str, Tensor]]:
        """What `stores` may keep: the weights that it depends on, by `STORED`, where the objective reads it."""
        needs, clip = self.objective.needs, self.model.clip
        vision = {"vision_model": clip.vision_model, "visual_projection": clip.visual_projection}
        frozen = not any(weight.requires_grad for part in vision.values() for weight in part.parameters())
        towers = {}
        if frozen and not needs.isdisjoint(IMAGE):
            towers["image"] = nn.ModuleDict(vision).state_dict()
        (teacher,) = self._teacher
        for name, read in {"teacher": TEACHER, "teacher_image": (TEACHER_IMAGE,)}.items():
            if teacher is not None and not needs.isdisjoint(read):
                towers[name] = teacher.state_dict()
        return towers

    def encode(self, batch: Mapping[str, Tensor]) -> Representations:
        """The representations that the objective needs of a batch of `data.Collator`."""
        model, needs = self.model, self.objective.needs
        found: Representations = {"logit_scale": model.clip.logit_scale.exp(), "image_ids": batch["image_ids"]}
        if not needs.isdisjoint(IMAGE):
            found |= self._images(batch)
            if "local_image_tokens" in needs:
                found["local_image_tokens"], found["local_image_mask"] = model.local_image(found["image_tokens"])
        if not needs.isdisjoint(TEXT):
            mask = batch["attention_mask"]
            if "span_embeds" in needs:
                tokens, found["span_embeds"] = model.span_embeds(batch["input_ids"], batch["sub_spans"])
                embeds = F.normalize(last_tokens(tokens, mask), dim=-1)
            else:
                embeds, tokens, _ = model.encode_text(batch["input_ids"], mask)
            found["text_embeds"], found["text_tokens"], found["text_mask"] = embeds, tokens, mask
            if "local_text_tokens" in needs:
                found["local_text_tokens"], found["local_text_mask"] = model.local_text(tokens, mask)
        if "short_embeds" in needs:
            found["short_embeds"] = model.encode_text(batch["short_ids"], batch["short_mask"])[0]
        if "sub_embeds" in needs:
            found["sub_embeds"] = self._several(batch["sub_ids"], batch["sub_mask"])
            found["sub_spans"] = batch["sub_spans"]
        if "edited_embeds" in needs:
            embeds = self._several(batch["edited_ids"], batch["edited_mask"])
            found["edited_embeds"], found["edited_valid"] = F.normalize(embeds, dim=-1), batch["edited_valid"]
        if "progress" in needs:
            done = torch.ones(len(batch["image_ids"]), device=batch["image_ids"].device)  # beside another training
            found["progress"] = batch.get("progress", done)
        if not needs.isdisjoint(KEPT):
            found |= dict(zip(KEPT, _states(model.clip, batch), strict=True)) | {"kept_mask": batch["kept_mask"]}
        if self.objective.needs_teacher:
            found |= self._taught(batch)
        return {name: tensor for name, tensor in found.items() if name in needs}

    def _several(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings of several texts an image, not of length 1; (B, S, T) twice -> (B, S, E)."""
        flat = mask.flatten(0, 1)
        embeds = last_tokens(self.model.encode_text(ids.flatten(0, 1), flat)[1], flat)
        return embeds.unflatten(0, ids.shape[:2])

    def _images(self, batch: Mapping[str, Tensor]) -> Representations:
        """What the image tower makes of images; of a store, tokens only where they are needed."""
        tokens_are_read = not self.objective.needs.isdisjoint(IMAGE[1:])

        def compute(part: Mapping[str, Tensor]) -> Representations:
            embeds, tokens = self.model.encode_image(part["pixel_values"])
            return {"image_embeds": embeds} | ({"image_tokens": tokens} if tokens_are_read else {})

        return recalled(self.stores.get("image"), batch.get("pixel_keys"), batch, compute)

    @torch.no_grad()
    def _taught(self, batch: Mapping[str, Tensor]) -> Representations:
        """What the teacher makes of prompts and images."""
        (teacher,) = self._teacher
        assert teacher is not None, "a recipe that preserves needs the stock CLIP"
        needs = self.objective.needs

        def of_prompts(part: Mapping[str, Tensor]) -> Representations:
            made = dict(zip(TEACHER, _states(teacher, part), strict=True))
            return {name: values for name, values in made.items() if name in needs}

        def of_images(part: Mapping[str, Tensor]) -> Representations:
            embeds = teacher.visual_projection(teacher.vision_model(part["pixel_values"]).pooler_output)
            return {TEACHER_IMAGE: F.normalize(embeds, dim=-1)}

        found: Representations = {}
        if not needs.isdisjoint(TEACHER):
            keys, mask = batch.get("kept_keys"), batch["kept_mask"]
            found |= recalled(self.stores.get("teacher"), keys, batch, of_prompts, mask)
        if TEACHER_IMAGE in needs:
            found |= recalled(self.stores.get("teacher_image"), batch.get("pixel_keys"), batch, of_images)
        return found

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Terms of the loss by name, of the joint batch of all processes."""
        return self.objective(self.gather(self.encode(batch)))


def _states(clip: CLIPModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Last states, penultimate states and embeddings of the prompts that fit a stock encoder."""
    output = clip.text_model(batch["kept_ids"], output_hidden_states=True)
    ends = last_tokens(output.last_hidden_state, batch["kept_mask"])
    embeds = F.normalize(clip.text_projection(ends), dim=-1)
    return output.last_hidden_state, output.hidden_states[-2], embeds


def cached_backward(
    step: TrainingStep,
    batch: Mapping[str, Tensor],
    micro_batch_size: int,
    backward: Callable[[Tensor], None],
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Gradients of the whole batch in the memory of a small one (GradCache, arXiv 2101.06983).

    The batch is encoded in parts without gradients; the loss of the whole gives the gradient of each representation;
    each part is encoded again, from the same random state, and handed its share. The gradients equal the plain step's.

    Args:
        step: the step, not wrapped.
        batch: of B examples.
        micro_batch_size: examples encoded at once.
        backward: of the loss; `Tensor.backward`, or accelerate's.
        scale: factor of the loss.

    Returns:
        The terms of the loss, without gradients.
    """
    parts = [
        {name: tensor[first : first + micro_batch_size] for name, tensor in batch.items()}
        for first in range(0, len(batch["image_ids"]), micro_batch_size)
    ]
    with torch.no_grad():
        states, encoded = [], []
        for part in parts:
            states.append((torch.get_rng_state(), get_device_states(part["image_ids"])))
            encoded.append(step.encode(part))
    torch.clear_autocast_cache()  # torch 2.6 keeps what was cast without gradients, and would give it out with them
    whole = {name: _joined(part[name] for part in encoded) for name in encoded[0]}
    trained = [name for name in whole if whole[name].is_floating_point() and name not in (*TEACHER, TEACHER_IMAGE)]
    for name in trained:
        whole[name].requires_grad_(True)
    terms = step.objective(step.gather(whole))
    backward(scale * torch.stack(list(terms.values())).sum())
    first = 0
    for part, state in zip(parts, states, strict=True):
        again, count = _encode_again(step, part, *state), len(part["image_ids"])
        handed, gradients = [], []
        for name in trained:
            gradient = whole[name].grad
            if gradient is None or not again[name].requires_grad:
                continue
            if gradient.ndim:
                gradient = gradient[first : first + count]
            elif first:  # a scalar has its gradient once
                continue
            handed.append(again[name])
            gradients.append(gradient)
        torch.autograd.backward(handed, gradients)
        first += count
    return {name: value.detach() for name, value in terms.items()}


def _encode_again(
    step: TrainingStep, part: Mapping[str, Tensor], state: Tensor, device_states: tuple[list[int], list[Tensor]]
) -> Representations:
    """Encodes a part from a random state, and leaves the one that was found: dropout drops what it dropped before."""
    device = part["image_ids"].device.type
    with fork_rng(device_states[0], device_type=device):
        torch.set_rng_state(state)
        set_device_states(*device_states, device_type=device)
        return step.encode(part)


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    parts = list(tensors)
    return torch.cat(parts) if parts[0].ndim else parts[0].clone()
