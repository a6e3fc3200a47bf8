"""Rotary positions: a CLIP text encoder without a position table, whose layers turn queries and keys instead.

Source: TULIP (Najdenkoska et al., arXiv 2410.10034, section 3), whose code turns neighboring pairs of channels. There
is no stock class for it, so what is saved names this module, and loads where this package is.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPAttention, eager_attention_forward

__all__ = ["PreTrainedModel", "RotaryTextConfig", "RotaryTextModel"]
"""What diffusers looks up here to load a saved pipeline: the class, and the class that says how it is loaded."""

THETA = 10_000.0
"""The slowest pair of channels turns once in about 2 pi theta positions."""

NTK_FACTOR = 8.0
"""How strongly theta grows with the window; TULIP's `--scaling-factor`."""


class RotaryTextConfig(CLIPTextConfig):
    """Of `RotaryTextModel`: a CLIP text tower's, with `rotary`, a dictionary.

    `theta` and `trained_length` say by which angles it was trained, and up to which window; `max_position_embeddings`
    is the window that it reads.
    """

    model_type = "rotary_clip_text_model"


def rotary_settings(config: Any) -> dict[str, Any] | None:
    """`theta` and `trained_length` of a text tower's configuration; None where it has a position table."""
    return getattr(config, "rotary", None)


def scaled_theta(theta: float, trained_length: int, length: int, width: int, factor: float = NTK_FACTOR) -> float:
    """The theta for a window: NTK scaling, which slows the slow pairs of channels and leaves the fast ones.

        theta * (factor * length / trained_length - (factor - 1)) ** (width / (width - 2))

    Args:
        theta: Of the training.
        trained_length: Its window.
        length: The window to be read; one that is not longer than the trained one changes nothing.
        width: Channels of an attention head, above 2.
        factor: At least 1.
    """
    if length <= trained_length:
        return theta
    return theta * (factor * length / trained_length - (factor - 1)) ** (width / (width - 2))


def turn(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turns each pair of neighboring channels by its angle.

        (a, b) -> (a cos - b sin, a sin + b cos)

    Args:
        states: (..., T, D).
        cosines, sines: (T, D / 2), float32.

    Returns:
        (..., T, D), in the dtype of `states`; the arithmetic is float32 or wider.
    """
    left, right = states.to(torch.promote_types(states.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([left * cosines - right * sines, left * sines + right * cosines], dim=-1)
    return turned.flatten(-2).to(states.dtype)


@lru_cache(maxsize=8)
def angles(length: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * theta ** (-2 i / width), for pairs i; (length, width / 2) each, float32."""
    with torch.inference_mode(False), torch.no_grad():
        rates = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        turns = torch.outer(torch.arange(length, dtype=torch.float64), rates)
        return turns.cos().float().to(device), turns.sin().float().to(device)


class RotaryAttention(CLIPAttention):
    """CLIP's attention, with queries and keys turned by their positions; the same weights under the same names."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As `CLIPAttention`; (B, T, D) -> (B, T, D)."""
        length, width = hidden_states.shape[-2], self.head_dim
        settings = self.config.rotary
        theta = scaled_theta(settings["theta"], settings["trained_length"], self.config.max_position_embeddings, width)
        cosines, sines = angles(length, width, theta, hidden_states.device)
        queries, keys, values = (
            projection(hidden_states).unflatten(-1, (-1, width)).transpose(1, 2)  # (B, T, D) -> (B, H, T, width)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        states, weights = attend(
            self, turn(queries, cosines, sines), turn(keys, cosines, sines), values, attention_mask,
            scaling=self.scale, dropout=self.dropout if self.training else 0.0, **kwargs,
        )  # fmt: skip
        return self.out_proj(states.flatten(-2)), weights


class RotaryEmbeddings(nn.Module):
    """Token embeddings alone, in place of CLIP's sum with a position table."""

    def __init__(self, tokens: nn.Embedding, config: Any):
        super().__init__()
        self.token_embedding, self.config = tokens, config

    def forward(
        self, input_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """(B, T) -> (B, T, D).

        Raises:
            ValueError: If there are more tokens than the window, or positions are given.
        """
        states = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if states.shape[-2] > self.config.max_position_embeddings:
            raise ValueError(
                f"{states.shape[-2]} tokens are more than the window of {self.config.max_position_embeddings}: cut "
                "them, or load the encoder with a larger max_length."
            )
        if position_ids is not None:
            raise ValueError("rotary positions count from the first token: leave position_ids out.")
        return states


def make_rotary(text_model: nn.Module, config: Any) -> None:
    """Takes the position table out of a CLIP text tower, and puts the turning into its layers; weights stay.

    Args:
        text_model: The module with `embeddings` and `encoder`; it is changed.
        config: Its configuration, with `rotary`.
    """
    tower: Any = text_model
    tower.embeddings = RotaryEmbeddings(tower.embeddings.token_embedding, config)
    for layer in tower.encoder.layers:
        with torch.device("meta"):
            attention = RotaryAttention(layer.self_attn.config)
        for name, projection in layer.self_attn.named_children():
            setattr(attention, name, projection)
        layer.self_attn = attention


def mark_trained(config: Any) -> None:
    """Writes down that a rotary tower was trained at the window that it reads: longer ones are scaled from there."""
    if (settings := rotary_settings(config)) is not None:
        width = config.hidden_size // config.num_attention_heads
        length = config.max_position_embeddings
        theta = scaled_theta(settings["theta"], settings["trained_length"], length, width)
        config.rotary = {"theta": theta, "trained_length": max(length, settings["trained_length"])}


class RotaryTextModel(CLIPTextModel):
    """A `CLIPTextModel` with rotary positions: `text_encoder` of a pipeline, where this package is installed."""

    config_class = RotaryTextConfig
    config: RotaryTextConfig

    def __init__(self, config: RotaryTextConfig):
        super().__init__(config)
        tower: Any = getattr(self, "text_model", self)
        make_rotary(tower, config)
