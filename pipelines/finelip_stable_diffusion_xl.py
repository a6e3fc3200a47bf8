"""Long prompts for Stable Diffusion XL; README.md says how to load this file."""

from finelip_diffusion import FineLIPStableDiffusionXLPipeline

__all__ = ["FineLIPStableDiffusionXLPipeline"]
