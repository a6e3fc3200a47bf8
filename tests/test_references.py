"""What images are compared with: reconstructions, pictures with facts wrong in order, and floors that say nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTokenizer

from finelip_diffusion.evaluation.comparison import distances, floor_label, likeness
from finelip_diffusion.evaluation.features import load_extractor
from finelip_diffusion.evaluation.images import Condition, Settings
from finelip_diffusion.evaluation.references import load_autoencoder, with_wrong_facts
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.scenes import Scene, describe, findings, render, sample_scene

SCENES = [sample_scene(seed, "test", (4, 9)) for seed in range(40)]


def test_as_many_facts_are_wrong_as_were_asked_for() -> None:
    """Told by the reader of the rendered picture, which also sees nothing that was not asked for."""
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED_MODEL / "tokenizer")
    for seed, scene in enumerate(SCENES[:12]):
        for number in (0, 1, 2, 4):
            wrong = with_wrong_facts(scene, number, seed)
            found = findings(describe(scene, seed), wrong, tokenizer)
            assert sum(not finding.found for finding in found) == number
            assert all(finding.filled for finding in found) and len(wrong.objects) == len(scene.objects)
            left = set(with_wrong_facts(scene, 1, seed).objects) - set(scene.objects)
            assert number == 0 or left <= set(wrong.objects)  # the first that is wrong stays wrong
    with pytest.raises(ValueError, match="the scene has 1 objects, so 4 of its facts cannot be wrong"):
        with_wrong_facts(Scene(SCENES[0].background, SCENES[0].objects[:1]), 4, 0)


@pytest.fixture(scope="module")
def ladder() -> dict[bool, dict[int, list[Image.Image]]]:
    """By whether they went through the autoencoder, and by how many facts are wrong."""
    drawn = {
        number: [render(with_wrong_facts(scene, number, seed)) for seed, scene in enumerate(SCENES)]
        for number in (0, 1, 2, 4)
    }
    autoencoder = load_autoencoder(Settings())
    return {False: drawn, True: {number: autoencoder(images) for number, images in drawn.items()}}


@pytest.mark.parametrize("reconstructed", [False, True])
@pytest.mark.parametrize(("name", "n"), [("effnet_fd", 20), ("clip_fd", 40), ("cmmd", 40)])
def test_more_wrong_facts_are_a_greater_distance_under_every_distance(
    ladder: dict[bool, dict[int, list[Image.Image]]], name: str, n: int, reconstructed: bool
) -> None:
    """0, 1, 2, 4 facts wrong rank in this order: Frechet, kernel distance and CMMD, to references of both kinds."""
    extractor = load_extractor(name, None if name == "effnet_fd" else str(BUNDLED_MODEL / "clip"))
    rows = {str(number): extractor(images[:n]).numpy() for number, images in ladder[reconstructed].items()}
    found = distances(name, rows, rows["0"], None, n // 2, 2)
    assert found["0"].keys() == ({"cmmd"} if name == "cmmd" else {name, name.replace("_fd", "_kid")})
    for key in found["0"]:
        values = [found[str(number)][key]["value"] for number in (0, 1, 2, 4)]
        assert values == sorted(values) and len(set(values)) == 4, (key, values)


def test_reconstructions_are_those_of_the_autoencoder() -> None:
    """Of scenes pixel for pixel; of photographs at about the area that the model draws, in their own proportions."""
    autoencoder = load_autoencoder(Settings())
    scene = render(SCENES[0])
    vae = AutoencoderKL.from_pretrained(BUNDLED_MODEL, subfolder="vae", torch_dtype=torch.float32)
    pixels = torch.from_numpy(np.array(scene)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    expected = (decoded[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).mul(255).round().byte().numpy()
    (found,) = autoencoder([scene])
    assert np.abs(np.asarray(found).astype(int) - expected).max() <= 1
    wide, tall, other = autoencoder([scene.resize((200, 100)), scene.resize((30, 60)), scene])
    assert (wide.size, other.size) == (tall.size[::-1], scene.size)
    assert 1.6 < wide.width / wide.height < 2.4 and abs(wide.width * wide.height / autoencoder.area - 1) < 0.2
    with pytest.raises(ValueError, match=r"has no vae/ to reconstruct the references by"):
        load_autoencoder(Settings(model=str(BUNDLED_MODEL / "finelip")))


def conditions(*names: str) -> list[Condition]:
    return [Condition("base", name, None, None, "truncate", "") for name in names]


def test_a_distance_that_sees_the_autoencoder_alone_is_marked() -> None:
    """Images that went through the same autoencoder: to the originals all are alike, to the reconstructions not."""
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(200, 4))
    reconstructed = reference @ np.diag([1, 1, 1, 0.01]) + [0, 0, 0, 20]  # the last feature is the decoder's
    near, far = (reconstructed + np.pad(rng.normal(0, s, (200, 3)), ((0, 0), (0, 1))) for s in (0.05, 1.5))
    outside = reference + np.array([9, 9, 9, 40])
    seen = {
        ("effnet_fd", name, "long"): rows
        for name, rows in {
            "reference": reference, "reconstructed": reconstructed, "base/truncate": far, "base/finelip": near,
            "base/other": outside, "wrong_1": reference + 0.5, "wrong_1/reconstructed": reconstructed + 0.5,
        }.items()
    }  # fmt: skip
    found, floors = likeness(
        "effnet_fd", seen, conditions("truncate", "finelip", "other"), ["original", "reconstructed"], 50, 20
    )
    original = {name: figures["effnet_fd"] for name, figures in found.items()}
    assert original["base/finelip"]["floor"] == "autoencoder"  # 400 of 400 is the decoder's offset
    assert original["base/other"]["floor"] is None
    ours = {name: figures["effnet_fd/reconstructed"] for name, figures in found.items()}
    assert ours["base/finelip"]["high"] < ours["base/truncate"]["low"]
    assert ours["base/truncate"]["floor"] is None
    assert set(floors["effnet_fd"]) == {"autoencoder", "halves", "wrong_1"}
    assert set(floors["effnet_fd/reconstructed"]) == {"halves", "wrong_1"}
    assert floors["effnet_fd"]["autoencoder"]["value"] == pytest.approx(400, rel=0.1)
    assert floors["effnet_fd"]["wrong_1"]["value"] == pytest.approx(4 * 0.25)
    assert floors["effnet_fd"]["halves"]["n"] == 100
    assert {"effnet_kid", "effnet_kid/reconstructed"} <= floors.keys()
    assert found["base/finelip"]["effnet_fd/reconstructed"]["difference"]["high"] < 0
    (only, _) = likeness("effnet_fd", seen, conditions("truncate"), ["original"], 50, 5)
    assert set(only["base/truncate"]) == {"effnet_fd", "effnet_kid"}


def test_images_as_far_as_other_references_are_marked() -> None:
    rng = np.random.default_rng(1)
    reference, other = rng.normal(size=(400, 2)), rng.normal(size=(400, 2))
    seen = {("effnet_fd", "reference", "long"): reference, ("effnet_fd", "base/truncate", "long"): other}
    found, floors = likeness("effnet_fd", seen, conditions("truncate"), ["original"], 50, 50)
    assert set(floors["effnet_fd"]) == {"halves"}
    assert found["base/truncate"]["effnet_fd"]["floor"] == "halves"


def test_floors_have_names() -> None:
    assert floor_label("wrong_1") == "rendered pictures with 1 fact wrong"
    assert floor_label("wrong_4").endswith("4 facts wrong")
    assert "autoencoder" in floor_label("autoencoder") and "half" in floor_label("halves")


def test_paths_are_kept_apart(tmp_path: Path) -> None:
    """The weights of the autoencoder are known by a fingerprint, by which kept features are told apart."""
    autoencoder = load_autoencoder(Settings())
    vae = AutoencoderKL.from_pretrained(BUNDLED_MODEL, subfolder="vae")
    with torch.no_grad():
        next(vae.parameters()).add_(1)
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "unet").symlink_to(BUNDLED_MODEL / "unet")
    assert load_autoencoder(Settings(model=str(tmp_path))).weights != autoencoder.weights
