"""Long prompts for Stable Diffusion: 248-token CLIP text encoders as a drop-in for diffusers pipelines.

The public names. Each is imported on first use, so `import finelip_diffusion` itself loads no library.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attaching import attach
    from .encoding import PromptEmbeds
    from .model import FineLIPConfig, FineLIPModel
    from .pipeline import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline
    from .prompts import PromptReport
    from .text_encoder import load_text_encoder

# transformers says so on every import of a pipeline; no pipeline here needs torchvision, and PIL does the same.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision (not installed)" not in record.getMessage()
)

__version__ = "0.1.0"

__all__ = [
    "FineLIPConfig",
    "FineLIPModel",
    "FineLIPStableDiffusionPipeline",
    "FineLIPStableDiffusionXLPipeline",
    "PromptEmbeds",
    "PromptReport",
    "__version__",
    "attach",
    "load_text_encoder",
]

_MODULES = {
    "FineLIPConfig": "model",
    "FineLIPModel": "model",
    "FineLIPStableDiffusionPipeline": "pipeline",
    "FineLIPStableDiffusionXLPipeline": "pipeline",
    "PromptEmbeds": "encoding",
    "PromptReport": "prompts",
    "attach": "attaching",
    "load_text_encoder": "text_encoder",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
