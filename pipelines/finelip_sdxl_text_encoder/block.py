"""Long prompts in SDXL's modular pipelines; ../README.md says how to load this folder."""

from finelip_diffusion.modular import FineLIPStableDiffusionXLTextEncoderStep

__all__ = ["FineLIPStableDiffusionXLTextEncoderStep"]
