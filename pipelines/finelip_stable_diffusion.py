"""Long prompts for Stable Diffusion 1.x and 2.x; README.md says how to load this file."""

from finelip_diffusion import FineLIPStableDiffusionPipeline

__all__ = ["FineLIPStableDiffusionPipeline"]
