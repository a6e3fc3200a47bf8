"""Where diffusers is broken for what this package makes: one function for each mend, to be deleted with its cause."""

import copy
from functools import cache
from typing import Any

from diffusers import DiffusionPipeline
from transformers import CLIPTextModel


def mend_clip_skip(pipe: DiffusionPipeline) -> None:
    """Makes `clip_skip` work in a Stable Diffusion 1.x or 2.x pipeline of diffusers.

    transformers 5.6 flattened `CLIPTextModel`, and diffusers (0.42.1) still looks for the final LayerNorm in its
    `text_model`: https://github.com/huggingface/diffusers/issues/14124. The mend belongs to the pipeline and touches
    no encoder: for diffusers' LoRA loader, an encoder that has a `text_model` is one whose layers bear that prefix.

    Args:
        pipe: Gets a class of the same name whose `encode_prompt` shows diffusers the encoder in its old outline. A
            pipeline that does not read through a flat `CLIPTextModel` alone is left as it is.
    """
    encoder = getattr(pipe, "text_encoder", None)
    flat = isinstance(encoder, CLIPTextModel) and not hasattr(encoder, "text_model")
    if flat and "text_encoder_2" not in pipe.components and not isinstance(pipe, _ClipSkip):
        pipe.__class__ = _with_clip_skip(type(pipe))  # type: ignore[arg-type]


@cache
def _with_clip_skip(pipeline_class: type) -> type:
    names = {name: getattr(pipeline_class, name) for name in ("__doc__", "__module__", "__qualname__")}
    return type(pipeline_class.__name__, (_ClipSkip, pipeline_class), names)


class _ClipSkip:
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("clip_skip") is None:
            return super().encode_prompt(*args, **kwargs)  # type: ignore[misc]
        reader = copy.copy(self)
        vars(reader)["text_encoder"] = _Nested(reader.text_encoder)  # type: ignore[attr-defined]
        return super(_ClipSkip, reader).encode_prompt(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by the name of diffusers' class, which is this one's, too."""
        _, _, *state = tuple(super().__reduce_ex__(protocol))
        return (_empty, (type(self).__mro__[2],), *state)


def _empty(pipeline_class: type) -> Any:
    return object.__new__(_with_clip_skip(pipeline_class))


class _Nested:
    """A flat encoder in the outline that diffusers knows: everything is its own, and so is `text_model`."""

    def __init__(self, text_encoder: CLIPTextModel):
        self.text_model = text_encoder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.text_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.text_model, name)
