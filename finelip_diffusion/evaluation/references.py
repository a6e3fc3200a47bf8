"""What images are compared with: references, what an autoencoder leaves of them, and pictures with facts wrong."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..scenes import ATTRIBUTES, Scene
from .images import Settings, fingerprint_of, located

REFERENCES = ("original", "reconstructed")


@dataclass(frozen=True)
class Autoencoder:
    """A model's autoencoder: whatever the model draws has gone through its decoder.

    Attributes:
        vae: in float32.
        processor: between images and pixels from -1 to 1.
        area: pixels of an image that the model draws.
        weights: fingerprint.
    """

    vae: Any
    processor: VaeImageProcessor
    area: int
    weights: str

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Encodes images and decodes them again, at about the area that the model draws, in their own proportions."""
        found: list[Image.Image] = []
        for (width, height), some in groupby(images, lambda image: self.size(image.size)):
            pixels = self.processor.preprocess(list(some), height=height, width=width).to(self.vae.device)
            latents = self.vae.encode(pixels).latent_dist.mode()
            found += self.processor.postprocess(self.vae.decode(latents).sample.cpu(), output_type="pil")
        return found

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height at which an image of a size goes through the autoencoder."""
        step = self.processor.config.vae_scale_factor
        factor = (self.area / (size[0] * size[1])) ** 0.5
        width, height = (max(step, step * round(side * factor / step)) for side in size)
        return width, height


def load_autoencoder(settings: Settings, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder of the model that is evaluated, in float32: that of SDXL overflows in half precision.

    Raises:
        ValueError: If the model has none. One sentence.
    """
    source = located(settings.model)
    try:
        vae: Any = AutoencoderKL.from_pretrained(source, subfolder="vae", torch_dtype=torch.float32)
        unet: dict[str, Any] = dict(UNet2DConditionModel.load_config(source, subfolder="unet"))
    except OSError as error:
        raise ValueError(
            f"{settings.model} has no vae/ to reconstruct the references by ({' '.join(str(error).split())[:120]}): "
            "give a Stable Diffusion folder or hub id."
        ) from error
    step = 2 ** (len(vae.config.block_out_channels) - 1)
    own = step * unet["sample_size"]
    area = (settings.height or own) * (settings.width or own)
    return Autoencoder(
        vae.to(device).eval(), VaeImageProcessor(vae_scale_factor=step), area, fingerprint_of({"vae": vae})
    )


def with_wrong_facts(scene: Scene, number: int, seed: int) -> Scene:
    """A scene of which `number` objects have another shape, color or size: so many facts of its caption are wrong.

    What is wrong of fewer is wrong of more: two sets differ by the further facts alone.

    Args:
        scene: of at least `number` objects.
        number: of objects that differ, each in one attribute.
        seed: any integer.

    Raises:
        ValueError: If the scene has fewer objects.
    """
    if number > len(scene.objects):
        raise ValueError(f"the scene has {len(scene.objects)} objects, so {number} of its facts cannot be wrong.")
    rng = random.Random(f"wrong {seed}")
    altered = {}
    for item in rng.sample(scene.objects, len(scene.objects)):
        name = rng.choice([name for name in ATTRIBUTES if name != "cell"])
        value = rng.choice([value for value in ATTRIBUTES[name] if value != getattr(item, name)])
        altered[item] = replace(item, **{name: value})
    changes = dict(list(altered.items())[:number])
    return Scene(scene.background, tuple(sorted(changes.get(item, item) for item in scene.objects)))
