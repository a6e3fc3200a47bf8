"""Long prompts for diffusers' own pipelines: img2img, inpaint, ControlNet and others."""

import inspect
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from .encoding import PromptEmbeds
from .lengthening import STOCK, check_lengths, check_widths, default_settings, in_place, is_stock
from .prompt_encoder import PromptEncoder, joined_signature, own_encode_prompt
from .prompts import LongPrompt, PromptReport, Weighting
from .text_encoder import TextEncoder


def attach(
    pipe: DiffusionPipeline,
    finelip: str | Path | None = None,
    *,
    long_prompt: LongPrompt | None = None,
    weighting: Weighting = "plain",
    blend: float = 1.0,
    second_encoder: str | None = None,
    hidden_state: str = "penultimate",
    **options: Any,
) -> DiffusionPipeline:
    """Gives a diffusers pipeline that reads through CLIP all that this package's pipelines do with prompts.

    The pipeline keeps its class. Only this one object gets an `encode_prompt` of its own, which diffusers' `__call__`
    finds there and asks for the states of every prompt, and beside it `encode` and `describe_prompt`. Text encoders
    are replaced only where a long one is wanted: with `finelip`, or under `long_prompt="stretch"`. The UNet stays; one
    that was adapted to the encoder is given to the pipeline by `pipe.register_modules(unet=...)`. `attach` again
    chooses again. docs/compatibility.md lists the pipelines.

    Pipelines that join CLIP's states with those of a T5 (SD3, Flux), and those without an `encode_prompt` of the usual
    kind, read a longer window by themselves: `"stretch"`, without weights and blends.

    Args:
        pipe: The pipeline; its components are replaced, never changed, so others that share them keep theirs.
        finelip: Any source of `load_text_encoder`, for `text_encoder`; None keeps the pipeline's own.
        long_prompt: How prompts are read; None is the best that the encoders can do: `"stretch"` with a trained long
            encoder, `"chunk"` without.
        weighting: The syntax of weights: `"plain"` (none), `"a1111"` or `"compel"`.
        blend: Share of the long encoder's states in what `"stretch"` reads; the rest are the stock encoder's.
        second_encoder: SDXL's second encoder, as in `FineLIPStableDiffusionXLPipeline`.
        hidden_state: SDXL's states, as there.
        **options: For `load_text_encoder`, such as `pad_token`.

    Returns:
        `pipe`.

    Raises:
        ValueError: If the pipeline has a text encoder that is neither a CLIP nor a T5 beside one, no UNet or
            transformer that attends to it, or no `text_encoder` for `finelip` to replace; if it cannot read in the way
            that was asked for; if it is set up for offloading already; if encoders and UNet or transformer do not fit
            each other; and whatever `load_text_encoder` raises.
    """
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
    clips = {name: part for name, part in encoders.items() if isinstance(part, TextEncoder)}
    served = all(name in clips or isinstance(part, T5EncoderModel) for name, part in encoders.items())
    kind = type(pipe).__name__
    if not (clips and served and {"unet", "transformer"} & set(pipe.components)):
        found = ", ".join(f"{name} ({type(part).__name__})" for name, part in encoders.items()) or "no text encoder"
        raise ValueError(
            f"{kind} reads prompts through {found}: attach needs CLIP text encoders, alone or beside a T5, and a UNet "
            "or transformer that attends to their states."
        )
    if finelip is not None and "text_encoder" not in clips:
        raise ValueError(f"{kind} has no text_encoder that finelip={finelip} could replace.")
    first, *others = clips
    places: dict[str, Any] = {}
    for name in clips:
        tokenizer = name.replace("text_encoder", "tokenizer")
        places[name] = in_place(
            clips[name],
            getattr(pipe, tokenizer),
            getattr(pipe, STOCK + name, None),
            getattr(pipe, STOCK + tokenizer, None),
            finelip if name == "text_encoder" else None,
            stretch=long_prompt == "stretch" if name == first else not is_stock(places[first].text_encoder),
            warn=name == first,
            **options,
        )
    every = _takes_states(pipe)
    settings = default_settings(long_prompt, places[first], places[others[0]] if others and every else None)
    settings = settings.but(weighting=weighting, blend=blend, second_encoder=second_encoder, hidden_state=hidden_state)
    if not every and (settings.long_prompt != "stretch" or weighting != "plain" or blend < 1):
        raise ValueError(
            f"{kind} encodes prompts in a way of its own and can read a longer window alone, without weights and "
            "blends: give finelip=, or long_prompt='stretch' to stretch its encoder without training."
        )
    long = {name: place for name, place in places.items() if not is_stock(place.text_encoder)}
    replaced = {name: place.text_encoder for name, place in long.items() if place.text_encoder is not clips[name]}
    if replaced and any(hasattr(part, "_hf_hook") for part in encoders.values()):
        raise ValueError("the pipeline is set up for offloading already: attach first, then enable the offloading.")
    check_lengths([place.text_encoder for place in places.values()])
    check_widths([place.text_encoder for place in places.values()], parts.get("unet"))
    if "transformer" in pipe.components:
        _check_same_width(places[first].text_encoder, clips[first])

    pipe.register_modules(
        **replaced, **{name.replace("text_encoder", "tokenizer"): place.tokenizer for name, place in long.items()}
    )
    if not every:
        if hasattr(pipe, "tokenizer_max_length"):  # SD3 and Flux note when they are made what CLIP reads
            encoder: Any = places[first].text_encoder
            pipe.tokenizer_max_length = encoder.config.max_position_embeddings
        return pipe
    for name, place in long.items():  # beside the components: diffusers' class has no place for them
        window = name != first and settings.second_encoder == "window"
        kept = settings.long_prompt != "stretch" or settings.blend < 1 or window
        setattr(pipe, STOCK + name, place.stock_text_encoder if kept else None)
        setattr(pipe, STOCK + name.replace("text_encoder", "tokenizer"), place.stock_tokenizer if kept else None)
    pipe.prompt_settings = settings
    pipe.encode_prompt = attached = AttachedEncoder(pipe)
    pipe.encode, pipe.describe_prompt = attached.encode, attached.describe_prompt
    return pipe


class AttachedEncoder:
    """`encode_prompt`, `encode` and `describe_prompt` of a pipeline that `attach` has treated, as in this package's.

    It belongs to its pipeline: deep copies and pickles take it along; a shallow copy reads with the encoders of the
    pipeline that it was copied from until it is attached itself.

    Args:
        pipeline: The pipeline.
    """

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline

    @property
    def __signature__(self) -> inspect.Signature:
        return joined_signature(own_encode_prompt(self.pipeline), type(self).__call__)

    def __call__(
        self,
        *args: Any,
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `FineLIPStableDiffusionPipeline.encode_prompt`."""
        encoder = self._encoder(long_prompt, weighting, blend)
        return encoder.encode_prompt(own_encode_prompt(self.pipeline), args, kwargs)

    def encode(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        *,
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
        **kwargs: Any,
    ) -> PromptEmbeds:
        """As `FineLIPStableDiffusionPipeline.encode`."""
        return self._encoder(long_prompt, weighting, blend).encode(prompt, negative_prompt, **kwargs)

    def describe_prompt(
        self,
        prompt: str | list[str],
        long_prompt: LongPrompt | None = None,
        weighting: Weighting | None = None,
        blend: float | None = None,
    ) -> PromptReport | list[PromptReport]:
        """As `FineLIPStableDiffusionPipeline.describe_prompt`."""
        return self._encoder(long_prompt, weighting, blend).describe(prompt)

    def _encoder(self, long_prompt: str | None, weighting: str | None, blend: float | None) -> PromptEncoder:
        settings = self.pipeline.prompt_settings.but(long_prompt=long_prompt, weighting=weighting, blend=blend)
        return PromptEncoder(self.pipeline, settings)


def _takes_states(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline's `encode_prompt` passes ready states on to a UNet, as Stable Diffusion's and SDXL's do."""
    if "unet" not in pipe.components or not hasattr(type(pipe), "encode_prompt"):
        return False
    needed = {"prompt_embeds", "negative_prompt_embeds", "do_classifier_free_guidance"}
    return needed <= inspect.signature(type(pipe).encode_prompt).parameters.keys()


def _check_same_width(new: TextEncoder, old: TextEncoder) -> None:
    """`check_width` where a transformer reads states and pooled output, which diffusers pads and joins."""
    names = ["hidden_size", "projection_dim" if isinstance(old, CLIPTextModelWithProjection) else "hidden_size"]
    (width, pooled), (old_width, old_pooled) = ([getattr(part.config, name) for name in names] for part in (new, old))
    if (width, pooled) != (old_width, old_pooled):
        raise ValueError(
            f"the text encoder is {width} wide and pools to {pooled}, but the one it replaces is {old_width} wide and "
            f"pools to {old_pooled}: choose an encoder of the CLIP that the transformer was trained with."
        )
