"""What people prefer, as HPSv2, PickScore and ImageReward learned it: through their packages, or transformers.

None of them reads a long prompt: HPSv2 and PickScore cut it at 77 tokens, ImageReward at 35. So each sentence is
scored by itself, too.
"""

from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from PIL import Image

from .adherence import clip_scores, load_judge
from .images import fingerprint_of

Score = Callable[[Sequence[Image.Image], Sequence[str]], list[float]]
"""(images, texts) of one length -> a score of each pair."""


@dataclass(frozen=True)
class Preference:
    """A model of what people prefer.

    Attributes:
        name: of `PREFERENCES`.
        source: package, folder or hub id.
        revision: a fingerprint of the weights.
        score: scores pairs.
    """

    name: str
    source: str
    revision: str
    score: Score

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """A score of each pair of a picture and a text."""
        return self.score(images, texts)


def load_preference(item: str, device: torch.device | str = "cpu") -> Preference:
    """Loads a model of what people prefer.

    Args:
        item: NAME of `PREFERENCES`, or NAME=SOURCE with weights of its kind.
        device: where it runs.

    Raises:
        ValueError: If there is no such name, its package is not installed or does not work beside the installed
            transformers, or its weights are missing. One sentence.
    """
    name, _, source = item.partition("=")
    if name not in PREFERENCES:
        raise ValueError(f"there is no preference model {name!r}: choose among {', '.join(PREFERENCES)}.")
    load, default, package = PREFERENCES[name]
    try:
        parts, score = load(source or default, torch.device(device))
    except ImportError as error:
        raise ValueError(f"{name} needs the package {package}, which cannot be imported ({error}).") from error
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{name} cannot be loaded from {source or default} ({' '.join(str(error).split())[:160]})."
        ) from error
    return Preference(name, source or default, fingerprint_of(parts), score)


def _load_pick_score(source: str, device: torch.device) -> tuple[dict[str, Any], Score]:
    """PickScore (arXiv 2305.01569): 100 times the cosine of a CLIP; its own logit scale is 100 as well."""
    judge = load_judge("pick_score", source, device)

    def score(images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        return clip_scores(judge.embed_images(images), judge.embed_texts(texts)).tolist()

    return {"model": judge.model}, score


def _load_hps_v2(source: str, device: torch.device) -> tuple[dict[str, Any], Score]:
    """HPSv2 (arXiv 2306.09341): the cosine of its CLIP. Its own `score` reads the weights again for every picture, so
    the model is made by the package and loaded once."""
    import huggingface_hub
    from hpsv2.img_score import initialize_model, model_dict
    from hpsv2.src.open_clip import get_tokenizer
    from hpsv2.utils import hps_version_map

    file = (
        huggingface_hub.hf_hub_download("xswu/HPSv2", hps_version_map[source]) if source in hps_version_map else source
    )
    initialize_model()
    model, transform = model_dict["model"], model_dict["preprocess_val"]
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
    model.to(device).eval()
    tokenizer = get_tokenizer("ViT-H-14")

    @torch.inference_mode()
    def score(images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        pixels = torch.stack([transform(image.convert("RGB")) for image in images]).to(device)
        found = model(pixels, tokenizer(list(texts)).to(device))
        return (found["image_features"] * found["text_features"]).sum(-1).float().tolist()

    return {"model": model}, score


def _load_image_reward(source: str, device: torch.device) -> tuple[dict[str, Any], Score]:
    """ImageReward (arXiv 2304.05977), by its own `score`."""
    import ImageReward

    with redirect_stdout(StringIO()):  # it prints what it loads
        model = ImageReward.load(source, device=str(device))

    @torch.inference_mode()
    def score(images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        return [float(model.score(text, image.convert("RGB"))) for image, text in zip(images, texts, strict=True)]

    return {"model": model}, score


PREFERENCES: dict[str, tuple[Callable[[str, torch.device], tuple[dict[str, Any], Score]], str, str]] = {
    "hps_v2": (_load_hps_v2, "v2.1", "hpsv2"),
    "pick_score": (_load_pick_score, "yuvalkirstain/PickScore_v1", "transformers"),
    "image_reward": (_load_image_reward, "ImageReward-v1.0", "image-reward"),
}
"""By name: how it is loaded, from what if nothing is said, and which package does it."""
