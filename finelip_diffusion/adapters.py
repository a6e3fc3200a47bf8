"""LoRA and textual inversion in a long encoder and in the stock one that stands beside it."""

from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from .lengthening import STOCK
from .text_encoder import TextEncoder
from .upstream import even_alphas, fit_text_encoder_names


class AdapterPipeline(DiffusionPipeline):
    """What pipelines of two encoders in each place do about adapters: both get them, both lose them."""

    _lora_loadable_modules: ClassVar[list[str]]
    _places: ClassVar[tuple[str, ...]] = ("",)

    @classmethod
    def lora_state_dict(cls, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Reads a LoRA as diffusers does, and keeps the alphas that diffusers loses."""
        state_dict, network_alphas, *rest = super().lora_state_dict(*args, **kwargs)
        return *even_alphas(state_dict, network_alphas), *rest

    @classmethod
    def load_lora_into_text_encoder(
        cls,
        state_dict: dict[str, Tensor],
        network_alphas: dict[str, float] | None,
        text_encoder: TextEncoder,
        **kwargs: Any,
    ) -> None:
        """Loads a LoRA into a long encoder as diffusers does, and into the stock one that stands beside it."""
        prefix = kwargs.get("prefix") or cls.text_encoder_name
        for each, _ in _and_stock(kwargs.get("_pipeline"), text_encoder):
            fitting = fit_text_encoder_names(state_dict, each, prefix)
            super().load_lora_into_text_encoder(fitting, network_alphas, each, **kwargs)

    def fuse_lora(self, components: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        """Fuses LoRAs as diffusers does, those of a stock encoder with those of the long one."""
        super().fuse_lora(self._lora_components(components), *args, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Takes LoRAs out again as diffusers does, those of a stock encoder with those of the long one."""
        super().unfuse_lora(self._lora_components(components), **kwargs)

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Weighs LoRAs as diffusers does, those of a stock encoder as those of the long one."""

        def complete(weights: Any) -> Any:
            if not isinstance(weights, dict):
                return weights
            stock = {f"{STOCK}{name}": weights[name] for name in weights}
            return {**{name: stock[name] for name in stock if name in self._lora_loadable_modules}, **weights}

        several = isinstance(adapter_weights, list)
        weights = [complete(each) for each in adapter_weights] if several else complete(adapter_weights)
        super().set_adapters(adapter_names, weights)

    def _lora_components(self, components: list[str] | None) -> list[str]:
        """All that can have a LoRA, or the named ones with the stock encoders beside them."""
        names = list(self._lora_loadable_modules if components is None else components)
        beside = [name for name in self._lora_loadable_modules if name.removeprefix(STOCK) in names]
        return [*names, *(name for name in beside if name not in names)]

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | list[str] | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder: TextEncoder | None = None,
        **kwargs: Any,
    ) -> None:
        """Loads an embedding into a long encoder as diffusers does, and into the stock one that stands beside it."""
        for each, other in _and_stock(self, text_encoder or self.text_encoder):
            super().load_textual_inversion(pretrained_model_name_or_path, token, other or tokenizer, each, **kwargs)

    def unload_textual_inversion(
        self,
        tokens: str | list[str] | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        """Takes embeddings out of a long encoder as diffusers does, and of the stock one that stands beside it."""
        for each, other in _and_stock(self, text_encoder or self.text_encoder):
            super().unload_textual_inversion(tokens, other or tokenizer, each)
            each.config.vocab_size = each.get_input_embeddings().num_embeddings


def _and_stock(pipe: Any, text_encoder: TextEncoder) -> list[tuple[TextEncoder, CLIPTokenizer | None]]:
    """An encoder without its tokenizer, and, if it is a pipeline's long one, the stock one beside it with its own."""
    found: list[tuple[TextEncoder, CLIPTokenizer | None]] = [(text_encoder, None)]
    for place in pipe._places if isinstance(pipe, AdapterPipeline) else ():
        stock = getattr(pipe, f"{STOCK}text_encoder{place}")
        if stock is not None and text_encoder is getattr(pipe, f"text_encoder{place}"):
            found.append((stock, getattr(pipe, f"{STOCK}tokenizer{place}")))
    return found
