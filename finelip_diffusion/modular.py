"""SDXL's text encoder step for diffusers' modular pipelines, reading whole prompts."""

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import StableDiffusionXLTextEncoderStep
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .lengthening import STOCK, Place, default_settings
from .prompt_encoder import PromptEncoder

_TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
_STATES = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


class FineLIPStableDiffusionXLTextEncoderStep(StableDiffusionXLTextEncoderStep):
    """Takes the place of `text_encoder` among the blocks of an SDXL modular pipeline.

    A long encoder is given to the pipeline as `text_encoder`, with its tokenizer; the stock one that it replaces may
    stand beside it as `stock_text_encoder`. The inputs of `FineLIPStableDiffusionXLPipeline` about prompts are inputs
    of the block; None is the best that the components can do.
    """

    @property
    def description(self) -> str:
        return "Text encoder step that reads prompts of any length, with weights and blends"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            *super().expected_components,
            ComponentSpec(f"{STOCK}text_encoder", CLIPTextModel),
            ComponentSpec(f"{STOCK}text_encoder_2", CLIPTextModelWithProjection),
            ComponentSpec(f"{STOCK}tokenizer", CLIPTokenizer),
            ComponentSpec(f"{STOCK}tokenizer_2", CLIPTokenizer),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            *super().inputs,
            InputParam("long_prompt", type_hint=str, description="How prompts are read that do not fit 77 tokens"),
            InputParam("weighting", type_hint=str, description="The syntax in which words get their weights"),
            InputParam("blend", type_hint=float, description="Share of the long encoder's states"),
            InputParam("second_encoder", type_hint=str, description="The second encoder's part beside a long one"),
            InputParam("hidden_state", type_hint=str, description="The states that the UNet reads"),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Encodes the prompts of a call.

        Args:
            components: The modular pipeline.
            state: The state of the call.

        Returns:
            Both, the state with the embeddings.

        Raises:
            ValueError: As for a call of `FineLIPStableDiffusionXLPipeline`.
        """
        block_state = self.get_block_state(state)
        self.check_inputs(block_state)
        settings = default_settings(block_state.long_prompt, _place(components, ""), _place(components, "_2"))
        settings = settings.but(
            weighting=block_state.weighting,
            blend=block_state.blend,
            second_encoder=block_state.second_encoder,
            hidden_state=block_state.hidden_state,
        )
        guided, device = components.guider.num_conditions > 1, components._execution_device
        lora_scale = (block_state.cross_attention_kwargs or {}).get("scale")
        call = {name: getattr(block_state, name) for name in _TEXTS} | dict.fromkeys(_STATES)
        texts = {**call, "clip_skip": block_state.clip_skip}
        call |= PromptEncoder(components, settings).ready(texts, guided, device, lora_scale)
        found = self.encode_prompt(
            components, device=device, prepare_unconditional_embeds=guided, lora_scale=lora_scale, **call
        )
        for name, states in zip(_STATES, found, strict=True):
            setattr(block_state, name, states)
        self.set_block_state(state, block_state)
        return components, state


def _place(components: Any, ending: str) -> Place:
    names = [f"{stock}{part}{ending}" for stock in ("", STOCK) for part in ("text_encoder", "tokenizer")]
    text_encoder, tokenizer, *stock_parts = (getattr(components, name, None) for name in names)
    return Place(text_encoder, tokenizer, stock_parts[0], stock_parts[1], chosen=False)
