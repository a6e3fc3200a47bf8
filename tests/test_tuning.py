"""Image tuning's parts: terms against plain loops, the teacher's trajectories, buckets, LoRA, counted memory."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from test_single_file import Base, same_weights
from tiny_models import pixels
from torch import Tensor

from finelip_diffusion import FineLIPStableDiffusionPipeline
from finelip_diffusion.data.datasets import open_dataset, stable_hash
from finelip_diffusion.data.latents import (
    BucketSampler,
    LatentCollator,
    bucket_sizes,
    fit_image,
    nearest_size,
    write_latents,
)
from finelip_diffusion.denoising import denoising_target, min_snr_weights, sample_timesteps
from finelip_diffusion.evaluation.retrieval import embed_gallery, evaluate, scenes_gallery
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.low_rank import adapt_encoder, adapt_unet, fuse, save_unet_lora
from finelip_diffusion.memory import Counter, activation_bytes
from finelip_diffusion.model import FineLIPModel, load_clip
from finelip_diffusion.probing import FactProbe
from finelip_diffusion.scenes import Object, Scene, describe, render, sample_scene
from finelip_diffusion.teaching import Prompts, TrajectoryDataset, make_teacher, write_trajectories
from finelip_diffusion.text_encoder import load_text_encoder, save_text_encoder, text_layers
from finelip_diffusion.tuning import STRETCHED, Parts, TuningStep, encode, keep_start, load_parts, share_tower
from finelip_diffusion.validation import Curve, counts_of, draw, prompts_of, recall


@pytest.fixture(scope="module")
def _parts(stable_diffusion_folder: Path, encoder_folder: Path) -> Parts:
    return load_parts(stable_diffusion_folder, encoder_folder)


def copied(parts: Parts) -> Parts:
    """All but the tokenizers, which nothing changes: the copy of one takes half a second."""
    tokenizers = [place.tokenizer for place in parts.places.values()]
    return copy.deepcopy(parts, {id(each): each for each in tokenizers})


@pytest.fixture
def parts(_parts: Parts) -> Iterator[Parts]:
    """Nothing is trained; tests that change weights copy them."""
    yield copied(_parts)


@pytest.fixture(scope="module")
def parts_xl(stable_diffusion_xl_folder: Path) -> Parts:
    return load_parts(stable_diffusion_xl_folder, STRETCHED)


def batch_of(parts: Parts, size: int = 3, length: int = 90) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(size, 4, 8, 8, generator=generator) for _ in range(2))
    batch = {
        "latents": latents,
        "noise": noise,
        "timesteps": torch.tensor([5, 500, 990])[:size],
        "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(size, 1),
        "kept_rows": torch.tensor([0, 2]),
    }
    for place, ending in enumerate(("", "_2")[: len(parts.places)]):
        end = list(parts.places.values())[place].tokenizer.eos_token_id
        for name, rows, columns in (("input_ids", size, length), ("kept_ids", 2, 77)):
            ids = torch.randint(1, 1000, (rows, columns), generator=generator)
            ids[:, -1] = end
            batch[f"{name}{ending}"] = ids
    return batch


def test_a_model_in_one_file_is_the_same_in_parts(tmp_path: Path) -> None:
    base = Base("xl", tmp_path)
    options = {"config": str(base.folder)}
    found, expected = load_parts(base.file, STRETCHED, **options), load_parts(base.folder, STRETCHED)
    assert found.is_xl and expected.is_xl and found.places.keys() == expected.places.keys()
    for name, place in expected.places.items():
        assert place.encoder.config.max_position_embeddings == 248
        assert same_weights(place.encoder, found.places[name].encoder)
        assert same_weights(place.stock, found.places[name].stock)
    assert same_weights(expected.unet, found.unet) and same_weights(expected.vae, found.vae)
    assert found.side == 16 and found.scheduler.config.prediction_type == "epsilon"


# --------------------------------------------------------------------------------------------------------------- terms


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_target_and_its_weights_are_those_of_the_papers(kind: str) -> None:
    """x_t = a x + s e; v = a e - s x (arXiv 2202.00512); weights of min-SNR (arXiv 2303.09556, section 3.4)."""
    scheduler = DDPMScheduler(prediction_type=kind)
    x, e = torch.randn(2, 3, 4, 4, 4).unbind(0)
    steps = torch.tensor([0, 400, 999])
    target = denoising_target(scheduler, x, e, steps)
    weights = min_snr_weights(scheduler, steps, 5.0)
    for row, step in enumerate(steps):
        a, s = scheduler.alphas_cumprod[step].sqrt(), (1 - scheduler.alphas_cumprod[step]).sqrt()
        expected = {"epsilon": e[row], "sample": x[row], "v_prediction": a * e[row] - s * x[row]}[kind]
        torch.testing.assert_close(target[row], expected)
        snr = float(a**2 / s**2)
        divisor = {"epsilon": snr, "sample": 1, "v_prediction": snr + 1}[kind]
        assert float(weights[row]) == pytest.approx(min(snr, 5) / divisor, rel=1e-4)
    with pytest.raises(ValueError, match="is 'flow', not epsilon"):
        scheduler.register_to_config(prediction_type="flow")
        denoising_target(scheduler, x, e, steps)


def test_timesteps_lean_where_they_are_asked_to() -> None:
    even, high = (sample_timesteps(20_000, 1000, how, torch.Generator().manual_seed(0)) for how in
                  ("uniform", "high_noise"))  # fmt: skip
    assert (even.min(), even.max(), high.max()) == (0, 999, 999)
    assert float(even.float().mean()) == pytest.approx(499.5, abs=6)  # three errors of the mean of 20,000
    assert float(high.float().mean()) == pytest.approx(1000 * 2 / 3 - 0.5, abs=6)  # of 1 - u²
    with pytest.raises(ValueError, match="timestep_sampling='low' is not one of uniform, high_noise"):
        sample_timesteps(1, 1000, "low", torch.Generator())  # type: ignore[arg-type]


def test_terms_are_plain_loops(parts: Parts) -> None:
    """Each example by itself, as the text of docs/image_tuning.md says it."""
    weights = {"denoising": 1.0, "kept_states": 2.0, "kept_predictions": 0.5}
    step, batch = TuningStep(parts, weights, min_snr_gamma=5.0), batch_of(parts)
    with torch.no_grad():
        found = step(batch)
        place, unet, scheduler = parts.places["text_encoder"], parts.unet, parts.scheduler
        snr = min_snr_weights(scheduler, batch["timesteps"], 5.0)
        losses, states, predictions = [], [], []
        for row in range(3):
            x, e, t = batch["latents"][row : row + 1], batch["noise"][row : row + 1], batch["timesteps"][row]
            noisy = scheduler.add_noise(x, e, t[None])
            read = place.encoder(batch["input_ids"][row : row + 1]).last_hidden_state
            losses.append(snr[row] * F.mse_loss(unet(noisy, t, read).sample, e))
        for number, row in enumerate((0, 2)):
            ids = batch["kept_ids"][number : number + 1]
            stock, long = place.stock(ids).last_hidden_state, place.encoder(ids).last_hidden_state
            states.append(F.mse_loss(long, stock))
            x, e, t = batch["latents"][row : row + 1], batch["noise"][row : row + 1], batch["timesteps"][row]
            noisy = scheduler.add_noise(x, e, t[None])
            predictions.append(F.mse_loss(unet(noisy, t, long).sample, unet(noisy, t, stock).sample))
    expected = {
        "denoising": torch.stack(losses).mean(),
        "kept_states": 2 * torch.stack(states).mean(),
        "kept_predictions": 0.5 * torch.stack(predictions).mean(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)  # sums in another order


def test_other_words_are_held_to_the_picture_that_the_encoder_made_of_plain_ones(parts: Parts) -> None:
    """Against a plain loop, after the encoder has moved; nothing to learn where both captions are one."""
    keep_start(parts)
    encoder, start = parts.places["text_encoder"].encoder.requires_grad_(True), parts.places["text_encoder"].start
    step, batch = TuningStep(parts, {"restated_predictions": 2.0}), batch_of(parts)
    assert start is not None and start is not encoder
    assert step(batch | {"restated_ids": batch["input_ids"]})["restated_predictions"].item() == 0
    with torch.no_grad():
        text_layers(encoder)[0].mlp.fc2.weight.add_(0.1)
    batch["restated_ids"] = batch["input_ids"].flip(0)[:, :80]
    expected = []
    for row in range(3):
        t = batch["timesteps"][row]
        noisy = parts.scheduler.add_noise(batch["latents"][row : row + 1], batch["noise"][row : row + 1], t[None])
        states = encoder(batch["input_ids"][row : row + 1]), start(batch["restated_ids"][row : row + 1])
        own, plain = (parts.unet(noisy, t, each.last_hidden_state).sample for each in states)
        expected.append(F.mse_loss(own, plain))
    found = step(batch)["restated_predictions"]
    torch.testing.assert_close(found, 2 * torch.stack(expected).mean(), rtol=1e-5, atol=1e-7)
    found.backward()
    assert all(weight.grad is not None for weight in step.trained.values())
    assert all(weight.grad is None for each in (start, parts.unet) for weight in each.parameters())


@pytest.mark.parametrize("base", ["sd", "xl"])
def test_other_words_are_held_to_what_each_layer_returned(base: str, parts: Parts, parts_xl: Parts) -> None:
    """Against attention written out for each row and layer; the UNet is asked once, and has no gradients."""
    parts = parts if base == "sd" else copied(parts_xl)
    keep_start(parts)
    places = list(parts.places.values())
    for place in places:
        place.encoder.requires_grad_(True)
    step, batch = TuningStep(parts, {"restated_attention": 2.0}), batch_of(parts)
    same = {name.replace("input", "restated"): ids for name, ids in batch.items() if name.startswith("input")}
    assert step(batch | same)["restated_attention"].item() == 0
    with torch.no_grad():
        for place in places:
            text_layers(place.encoder)[0].mlp.fc2.weight.add_(0.1)
    batch |= {name: ids.flip(0)[:, :80] for name, ids in same.items()}
    ids = [
        [batch[f"{name}{ending}"] for ending in ("", "_2")[: len(places)]] for name in ("input_ids", "restated_ids")
    ]
    own = encode([place.encoder for place in places], ids[0], base == "xl")
    plain = encode([place.start for place in places if place.start is not None], ids[1], base == "xl")
    inputs: list[tuple[Any, Tensor]] = []
    hooks = [layer.register_forward_pre_hook(lambda layer, args: inputs.append((layer, args[0])))
             for name, layer in parts.unet.named_modules() if name.endswith("attn2")]  # fmt: skip
    step.predict(step.noised(batch), plain)
    for hook in hooks:
        hook.remove()
    errors = []
    for layer, queries in inputs:
        outputs = []
        for states in (own.states, plain.states):
            rows = []
            for row in range(3):
                parts_of = layer.to_q(queries[row]), layer.to_k(states[row]), layer.to_v(states[row])
                heads = zip(*(each.unflatten(-1, (layer.heads, -1)).unbind(-2) for each in parts_of), strict=True)
                attended = [(q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in heads]
                rows.append(layer.to_out[0](torch.cat(attended, -1)))
            outputs.append(torch.stack(rows))
        errors += [F.mse_loss(*pair) / pair[1].square().mean() for pair in zip(*outputs, strict=True)]
    if base == "xl":
        pooled = zip(own.pooled, plain.pooled, strict=True)
        errors += [F.mse_loss(*pair) / pair[1].square().mean() for pair in pooled]
    assert len(inputs) == len(hooks) > 1
    calls = list[int]()
    parts.unet.conv_in.register_forward_pre_hook(lambda *_: calls.append(1))
    found = step(batch)["restated_attention"]
    assert len(calls) == 1
    torch.testing.assert_close(found, 2 * torch.stack(errors).mean(), rtol=1e-4, atol=1e-7)
    found.backward()
    moved = {name for name, weight in step.trained.items() if weight.grad is not None and weight.grad.any()}
    assert any("layers/0/" in name for name in moved) and all("text_encoder" in name for name in moved)
    frozen = [parts.unet, *(place.start for place in places if place.start is not None)]
    assert all(weight.grad is None for each in frozen for weight in each.parameters())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("other", "asked"), [("restated_predictions", 2), ("restated_attention", 1)])
def test_terms_of_the_same_captions_share_their_prediction(
    parts: Parts, other: str, asked: int, precision: torch.dtype
) -> None:
    """The gradient of two is the sum of theirs, and the UNet is asked once for both, and once for the target."""
    keep_start(parts)
    encoder, calls, texts = parts.places["text_encoder"].encoder.requires_grad_(True), list[int](), list[int]()
    batch = batch_of(parts)
    batch["restated_ids"] = batch["input_ids"].flip(0)[:, :80]
    counted = parts.unet.conv_in.register_forward_pre_hook(lambda *_: calls.append(1))
    read = encoder.register_forward_pre_hook(lambda *_: texts.append(1))
    gradients, terms = [], ({"denoising": 0.5}, {other: 1.0})
    for own in (*terms, terms[0] | terms[1]):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = torch.stack(list(TuningStep(parts, own)(batch).values())).sum()
        loss.backward()
        gradients.append(
            torch.cat([weight.grad.flatten() for weight in encoder.parameters() if weight.grad is not None])
        )
    counted.remove()
    read.remove()
    assert len(calls) == 1 + asked + 2 and len(texts) == 3 + 3 and not {"predicted", "read"} & batch.keys()
    assert len(gradients[2]) == sum(weight.numel() for weight in encoder.parameters())
    error = (gradients[0] + gradients[1] - gradients[2]).norm() / gradients[2].norm()
    assert error < (1e-5 if precision == torch.float32 else 0.05)


def test_other_words_may_be_read_by_another_encoder(parts: Parts, tmp_path: Path) -> None:
    """The target is what that one reads; one of another length is refused."""
    other = copy.deepcopy(parts.places["text_encoder"])
    with torch.no_grad():
        text_layers(other.encoder)[0].mlp.fc2.weight.add_(0.1)
    save_text_encoder(other.encoder, other.tokenizer, tmp_path)
    keep_start(parts, tmp_path)
    start = parts.places["text_encoder"].start
    assert start is not None and not any(weight.requires_grad for weight in start.parameters())
    found, expected = start.state_dict(), other.encoder.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    step, batch = TuningStep(parts, {"restated_predictions": 1.0}), batch_of(parts)
    batch["restated_ids"] = batch["input_ids"].flip(0)
    with torch.no_grad():
        target = step.predict(step.noised(batch), step.read(batch, "restated_ids", [other.encoder]))
        assert step(batch)["restated_predictions"] == F.mse_loss(step.predicted(dict(batch)), target)
    parts.places["text_encoder"].encoder.config.max_position_embeddings = 300
    with pytest.raises(ValueError, match="reads 248 tokens, and the one that is trained 300: give encoders of the"):
        keep_start(parts, tmp_path)


@pytest.mark.parametrize("base", ["sd", "xl"])
def test_facts_are_read_where_the_encoder_had_them(base: str, parts: Parts, parts_xl: Parts) -> None:
    """The probe's loss on all states that a UNet reads; the probe is not trained, and no UNet is asked."""
    parts = parts if base == "sd" else copied(parts_xl)
    batch = batch_of(parts)
    for place in parts.places.values():
        place.encoder.requires_grad_(True)
    states = TuningStep(parts, {}).captions(dict(batch)).states
    torch.manual_seed(0)
    parts.probe = FactProbe(states.shape[-1])
    batch["facts"] = torch.tensor([[0, 2, 5, 8, 1, 2, 0], [0, 6, 6, 4, 0, 0, 1], [2, 1, 3, 0, 3, 4, 1]])
    parts.unet.conv_in.register_forward_pre_hook(lambda *_: pytest.fail("the UNet was asked"))
    step = TuningStep(parts, {"stated_facts": 2.0})
    found = step(batch)["stated_facts"]
    torch.testing.assert_close(found, 2 * parts.probe(states, batch["facts"]))
    found.backward()
    assert not any("probe" in name for name in step.trained)
    assert all(weight.grad is None for weight in parts.probe.parameters())
    moved = {name for name, weight in step.trained.items() if weight.grad is not None and weight.grad.any()}
    assert all(any(name.startswith(f"{place}/") for name in moved) for place in parts.places)


def test_gradients_reach_the_encoder_alone(parts: Parts) -> None:
    parts.places["text_encoder"].encoder.requires_grad_(True)
    step = TuningStep(parts, {"denoising": 1.0, "kept_predictions": 1.0})
    torch.stack(list(step(batch_of(parts)).values())).sum().backward()
    assert all(weight.grad is None for weight in parts.unet.parameters())
    assert all(weight.grad is None for weight in parts.places["text_encoder"].stock.parameters())
    got = [name for name, weight in step.trained.items() if weight.grad is not None and weight.grad.any()]
    assert len(got) == len(step.trained) == len(list(parts.places["text_encoder"].encoder.parameters()))


def test_recomputed_activations_give_the_same_gradients(parts: Parts) -> None:
    encoder = parts.places["text_encoder"].encoder.requires_grad_(True).train()
    step, gradients = TuningStep(parts, {"denoising": 1.0, "kept_states": 1.0, "kept_predictions": 1.0}), []
    layers = [text_layers(encoder)[0].mlp, parts.unet.up_blocks[1].resnets[0]]
    calls: list[int] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, *_: calls.append(layers.index(module)))
    for recomputed in (False, True):
        calls.append(-1)
        if recomputed:
            parts.unet.enable_gradient_checkpointing()
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.stack(list(step(batch_of(parts)).values())).sum().backward()
        gradients.append([weight.grad.clone() for weight in step.trained.values() if weight.grad is not None])
        step.zero_grad()
    once, twice = " ".join(map(str, calls)).split("-1")[1:]
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(twice.count(layer) > once.count(layer) for layer in "01")
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_sdxl_reads_what_diffusers_reads(parts_xl: Parts) -> None:
    """States and pooled output against diffusers' own `encode_prompt`; both are kept."""
    batch = batch_of(parts_xl)
    text = "a red cat under a green tree beside two blue dogs asleep . " * 12
    tokens = [place.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
              for place in parts_xl.places.values()]  # fmt: skip
    with torch.no_grad():
        read = encode([place.encoder for place in parts_xl.places.values()], tokens, True)
        states, _, pooled, _ = parts_xl.pipeline.encode_prompt(text, do_classifier_free_guidance=False)
        torch.testing.assert_close(read.states, states)
        torch.testing.assert_close(read.pooled, pooled)
        found = TuningStep(parts_xl, {"denoising": 1.0, "kept_states": 1.0})(batch)
        ids = [batch["kept_ids"], batch["kept_ids_2"]]
        stock = encode([place.stock for place in parts_xl.places.values()], ids, True)
        long = encode([place.encoder for place in parts_xl.places.values()], ids, True)
    expected = F.mse_loss(long.states, stock.states) + F.mse_loss(long.pooled, stock.pooled)
    torch.testing.assert_close(found["kept_states"], expected)


# ------------------------------------------------------------------------------------------------------------- teacher


def test_trajectories_are_the_pipelines_own(parts: Parts, tmp_path: Path) -> None:
    """Of two prompts of different lengths: where diffusers' loop goes, and what its UNet predicts there."""
    kind: Any = parts.kind
    teacher = make_teacher(parts.pipeline, kind, parts.stock, long_prompt="segment")
    prompts = ["A red cat.", "A red cat under a tree. Two blue dogs are asleep beside it."]
    found = write_trajectories(
        tmp_path / "kept", teacher, prompts, side=16, steps=3, points=3, guidance_scale=4.0, seed=7, batch_size=2
    )
    assert found.prompts == prompts and found.noisy.shape == (2, 3, 4, 8, 8)
    for row, prompt in enumerate(prompts):
        order = np.argsort(-found.timesteps[row])
        start = torch.from_numpy(found.noisy[row][order][:1].astype(np.float32))
        calls: list[tuple[Tensor, Tensor]] = []
        hook = parts.unet.register_forward_hook(
            lambda _, args, output, calls=calls: calls.append((args[0][1], output[0][1]))  # the guided half
        )
        how = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 16, "width": 16, "output_type": "latent"}
        teacher(prompt, latents=start, **how)
        hook.remove()
        for place, (noisy, prediction) in enumerate(calls):
            for name, value in (("noisy", noisy), ("predictions", prediction)):
                kept = torch.from_numpy(getattr(found, name)[row][order][place].astype(np.float32))
                torch.testing.assert_close(kept, value, rtol=0, atol=0.02)  # float16, of values up to 10
    again = TrajectoryDataset(found, None, 16)[4, 0]
    assert again["caption"] == prompts[1] and float(again["timesteps"]) == found.timesteps[1, 1]
    assert len(TrajectoryDataset(found, None, 16)) == 6
    some = write_trajectories(
        tmp_path / "some", teacher, prompts, side=16, steps=3, points=1, guidance_scale=4.0, seed=7, batch_size=1
    )
    place = list(found.timesteps[0]).index(some.timesteps[0, 0])
    assert np.abs(some.noisy[0, 0] - found.noisy[0, place]).max() < 0.02  # the batch decides nothing


def test_prompts_of_a_file_are_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two \n")
    prompts = Prompts(file)
    assert [prompts.caption(index, 9) for index in range(len(prompts))] == ["one", "two"]
    assert prompts_of(file, 1, "scenes") == ["one"]
    file.write_text("\n")
    with pytest.raises(ValueError, match="is empty: write a prompt a line"):
        Prompts(file)
    with pytest.raises(ValueError, match="cannot be read"):
        prompts_of(tmp_path / "none.txt", 1, "scenes")


# ---------------------------------------------------------------------------------------------------------------- data


def test_buckets_have_one_area_and_the_nearest_ratio_wins() -> None:
    sizes = bucket_sizes(512)
    assert (512, 512) in sizes and all(height % 64 == width % 64 == 0 for height, width in sizes)
    assert all(0.75 < height * width / 512**2 <= 1 and 0.5 <= height / width <= 2 for height, width in sizes)
    assert nearest_size((1000, 500), sizes) == min(sizes, key=lambda size: size[0] / size[1])
    assert nearest_size((300, 300), sizes) == (512, 512)
    with pytest.raises(ValueError, match="a resolution of 16 has no aspect ratio buckets"):
        bucket_sizes(16)


def test_captions_of_like_length_meet_and_an_epoch_has_the_same_examples() -> None:
    buckets = np.repeat([0, 1], 60)

    def drawn(numbers: np.ndarray, draws: list[int]) -> np.ndarray:
        return np.array([stable_hash(*place) % 200 for place in zip(numbers.tolist(), draws, strict=True)])

    plain, alike = (BucketSampler(buckets, 6, 3, 0, 1, 0, each) for each in (None, drawn))
    spread = []
    for sampler in (plain, alike):
        batches = [sampler.batch(step) for step in range(40)]  # of two epochs, each with draws of its own
        for epoch in (batches[:20], batches[20:]):
            assert sorted(number for batch in epoch for number, _ in batch) == list(range(120))
        assert all(len({buckets[number] for number, _ in batch}) == 1 for batch in batches)
        spread.append(np.mean([np.ptp([stable_hash(*place) % 200 for place in batch]) for batch in batches]))
    assert spread[1] < 0.3 * spread[0]
    assert [alike.batch(step) for step in range(5)] == [BucketSampler(buckets, 6, 3, 0, 1, 0, drawn).batch(step)
                                                        for step in range(5)]  # fmt: skip


def test_an_image_covers_its_bucket() -> None:
    """What is left over is cut equally on both sides, and SDXL is told where."""
    image = Image.new("RGB", (40, 10), (255, 0, 0))
    image.paste((0, 0, 255), (10, 0, 30, 10))
    found, corner = fit_image(image, (10, 20))
    assert found.shape == (3, 10, 20) and corner == (0, 10)
    assert torch.equal(found[2], torch.ones(10, 20)) and torch.equal(found[0], -torch.ones(10, 20))


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of two shapes of images."""
    folder = tmp_path_factory.mktemp("images")
    lines = []
    for seed in range(10):
        scene = sample_scene(seed)
        render(scene).resize((64, 64) if seed % 2 else (96, 48)).save(folder / f"{seed}.png")
        lines.append(f'{{"file_name": "{seed}.png", "text": "{describe(scene, seed)}"}}')
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_latents_are_the_autoencoders_bucket_by_bucket(parts: Parts, image_folder: Path, tmp_path: Path) -> None:
    dataset: Any = open_dataset(image_folder)
    latents = write_latents(tmp_path / "kept", dataset, parts.vae, [(16, 16), (8, 32)])
    assert {size: len(table) for size, table in latents.tables.items()} == {(16, 16): 5, (8, 32): 5}
    for number in (0, 1):
        size = [(16, 16), (8, 32)][latents.rows[number][0]]
        image, corner = fit_image(dataset.read(number, 0).image, size)
        with torch.no_grad():
            expected = parts.vae.encode(image[None]).latent_dist.mean[0] * parts.vae.config.scaling_factor
        torch.testing.assert_close(latents[number], expected, rtol=2e-3, atol=2e-3)  # float16
        assert latents.time_ids[number].tolist()[2:] == [*corner, *size]
    batches = [BucketSampler(latents.rows[:, 0], 2, 0, rank, 2, 0) for rank in (0, 1)]
    for step in range(4):
        rows = [number for sampler in batches for number, _ in sampler.batch(step)]
        assert len(set(rows)) == 4 and len({latents.rows[row][0] for row in rows}) == 1
    with pytest.raises(ValueError, match="do not fill a batch of 12"):
        BucketSampler(latents.rows[:, 0], 12, 0, 0, 1, 0)
    with torch.no_grad():
        parts.vae.quant_conv.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="latents are not finite"):
        write_latents(tmp_path / "broken", dataset, parts.vae, [(16, 16)])
    assert not (tmp_path / "broken").exists()


def test_a_batch_is_tokenized_as_diffusers_does_it(parts_xl: Parts) -> None:
    tokenizers = [place.tokenizer for place in parts_xl.places.values()]
    captions = [str(describe(sample_scene(seed), seed)) for seed in range(4)] + ["a cat " * 300]
    examples = [{"latents": torch.zeros(4, 2, 2), "time_ids": torch.zeros(6), "caption": caption, "kept": caption,
                 "draw": draw} for draw, caption in enumerate(captions)]  # fmt: skip
    batch = LatentCollator(tokenizers, 0.0, 2)(examples)
    for name, tokenizer in zip(("input_ids", "input_ids_2"), tokenizers, strict=True):
        expected = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(batch[name], expected)
    assert (batch["longest"], batch["cut"]) == (602, 1) and batch["kept_rows"].tolist() == [0, 2, 4]
    for row, caption in zip(batch["kept_ids"][:2].tolist(), (captions[0], captions[2]), strict=True):
        words = row[1 : row.index(tokenizers[0].eos_token_id)]
        whole = tokenizers[0](caption, add_special_tokens=False).input_ids
        assert 0 < len(words) <= 75 and any(whole[i : i + len(words)] == words for i in range(len(whole)))
    restated = LatentCollator(tokenizers, 0.0, 0)([example | {"restated": "a dog"} for example in examples])
    assert torch.equal(restated["restated_ids"][0], restated["restated_ids"][4]) and restated["longest_restated"] == 4
    assert torch.equal(restated["input_ids"], batch["input_ids"])
    assert restated["restated_ids_2"].shape == batch["input_ids_2"].shape
    left_out = LatentCollator(tokenizers, 1.0, 2)(examples)
    assert left_out["longest"] == 2 and not torch.equal(left_out["kept_ids"], batch["kept_ids"])


# ---------------------------------------------------------------------------------------------------------- low ranks


def test_adapters_start_at_nothing_and_fuse_to_what_they_did(parts: Parts) -> None:
    encoder, ids = parts.places["text_encoder"].encoder, torch.arange(1, 20)[None]
    names = set(encoder.state_dict())
    with torch.no_grad():
        before = encoder(ids).last_hidden_state
        adapt_encoder(encoder, 2)
        assert torch.equal(encoder(ids).last_hidden_state, before)
        trained = {name for name, weight in encoder.named_parameters() if weight.requires_grad}
        assert all(".lora_" in name or "position_embedding" in name for name in trained)
        assert len(trained) == 1 + 2 * 6 * encoder.config.num_hidden_layers
        for name, weight in encoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        moved = encoder(ids).last_hidden_state
        fuse(encoder)
        assert set(encoder.state_dict()) == names
        torch.testing.assert_close(
            encoder(ids).last_hidden_state, moved, rtol=1e-4, atol=1e-4
        )  # sums in another order
    assert not torch.allclose(moved, before, atol=1e-2)


def test_a_unets_lora_is_loaded_by_diffusers_and_found_beside_the_encoder(
    parts: Parts, stable_diffusion_folder: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    adapt_unet(parts.unet, 2)
    with torch.no_grad():
        for name, weight in parts.unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
    wanted = pixels(parts.pipeline, "A red cat.", height=16, width=16)
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part).symlink_to(encoder_folder / part)
    save_unet_lora(parts.pipeline, tmp_path)
    plain = StableDiffusionPipeline.from_pretrained(
        stable_diffusion_folder, text_encoder=parts.pipeline.text_encoder, tokenizer=parts.pipeline.tokenizer
    )
    without = pixels(plain, "A red cat.", height=16, width=16)
    plain.load_lora_weights(tmp_path)
    torch.testing.assert_close(pixels(plain, "A red cat.", height=16, width=16), wanted)
    ours = FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, finelip=tmp_path)
    assert not hasattr(ours.unet, "peft_config") or not ours.unet.peft_config
    drawn = pixels(ours, "A red cat.", height=16, width=16)
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-3)  # the product is added to the weights
    assert not torch.allclose(drawn, without, atol=1e-2)
    given = FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, finelip=tmp_path, unet=plain.unet)
    assert given.unet is plain.unet
    with torch.no_grad():
        batch = batch_of(parts)
        step = TuningStep(parts, {"kept_predictions": 1.0})
        found, kept = step(batch)["kept_predictions"], step.keep(batch)
        after, before = step.predict(kept.noised, kept.after), step.predict(kept.noised, kept.before)
        parts.unet.disable_adapters()
        stock = step.predict(kept.noised, kept.before)
        torch.testing.assert_close(found, F.mse_loss(after, stock))  # the base's own UNet
        assert not torch.allclose(found, F.mse_loss(after, before), rtol=0.01)


def test_a_shared_tower_is_one(parts: Parts) -> None:
    model = FineLIPModel.from_clip(BUNDLED_MODEL / "clip", refine_image=False, refine_text=False)
    bundled = load_parts(None).places["text_encoder"].encoder
    share_tower(model, bundled)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        assert torch.equal(model.clip.text_model(ids).last_hidden_state, bundled(ids).last_hidden_state)
    assert {id(weight) for weight in bundled.parameters()} <= {id(weight) for weight in model.parameters()}
    short, _, image_processor = load_clip(BUNDLED_MODEL / "clip")  # of 77 positions
    stretched, tokenizer = load_text_encoder(
        BUNDLED_MODEL / "clip", max_length=248, dtype=torch.float32, projection=False
    )
    share_tower(short, stretched)
    gallery = embed_gallery(short.eval(), tokenizer, image_processor, scenes_gallery(4))
    ranks = evaluate(gallery)["ranks"]["whole/global/text_to_image/group"]
    assert sum(rank == 0 for rank in ranks) > 8  # a reader of 77 tokens finds one of eight in each of the four groups
    with pytest.raises(ValueError, match=r"text tower has \(layers, width\) \(\d+, \d+\) and the encoder \(4, 32\)"):
        share_tower(model, parts.places["text_encoder"].encoder)


# -------------------------------------------------------------------------------------------------------------- memory


def test_counted_memory_is_what_autograd_keeps(parts: Parts) -> None:
    """The same forward pass on a CPU, where the fused kernel keeps a little beside: a number for each query."""
    encoder = parts.places["text_encoder"].encoder.requires_grad_(True).train()
    sizes: dict[int, int] = {}
    weights = {weight.data_ptr() for module in (encoder, parts.unet) for weight in module.parameters()}

    def take(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(take, lambda tensor: tensor):
        read = encode([encoder], [torch.ones(2, 90, dtype=torch.long)], False)
        prediction = parts.unet(torch.randn(2, 4, 8, 8), 5, read.states).sample
    assert prediction.requires_grad
    counted = activation_bytes(parts, 2, 90, 16, torch.float32, False)
    assert counted == pytest.approx(sum(sizes.values()), rel=0.05)
    assert activation_bytes(parts, 4, 90, 16, torch.float32, False) == pytest.approx(2 * counted, rel=0.02)
    assert activation_bytes(parts, 2, 90, 16, torch.float16, False) == pytest.approx(counted / 2, rel=0.05)
    less = activation_bytes(parts, 2, 90, 16, torch.float32, True)
    assert 0 < less < 0.8 * counted
    assert activation_bytes(parts, 2, 90, 16, torch.float32, False, unet_rank=2) < counted


def test_a_counter_counts_a_storage_once() -> None:
    layer = torch.nn.Linear(4, 4, device="meta")
    counter = Counter(layer)
    x = torch.empty(8, 4, device="meta", requires_grad=True)
    with counter.counting():
        (layer(x) * layer(x).detach() + x.sin() + x.sin()).sum()
    assert counter.kept == 2 * x.nbytes  # x for the product with the weight and for its sines, and the factor


# ---------------------------------------------------------------------------------------------------------- validation


def test_prompts_are_drawn_each_from_its_seed(parts: Parts) -> None:
    prompts = ["A red cat.", "Two dogs.", "A tree."]
    images = draw(parts.pipeline, prompts, 16, 2, 3.0, 5, batch_size=2)
    assert images.shape == (3, 3, 16, 16)
    for row, prompt in enumerate(prompts):
        alone = pixels(parts.pipeline, prompt, seed=5 + row, height=16, width=16, guidance_scale=3.0)
        torch.testing.assert_close(images[row].permute(1, 2, 0), alone[0], rtol=0, atol=1e-4)  # another batch


def test_recall_is_told_by_the_rendered_picture() -> None:
    tokenizer = load_parts(None).places["text_encoder"].tokenizer
    scene = sample_scene(3, "test", (8, 8))
    caption = describe(scene, 3)
    picture = torch.from_numpy(np.array(render(scene))).permute(2, 0, 1)[None] / 255
    bare = Scene(scene.background, tuple[Object, ...]())
    empty = torch.from_numpy(np.array(render(bare))).permute(2, 0, 1)[None] / 255
    (found,), (none,) = (counts_of([caption], images, tokenizer) for images in (picture, empty))
    assert found[0] == found[1] > 0 and found[2] == found[3] > 0 and found[1] + found[3] == 8
    assert none == [0, found[1], 0, found[3]]
    assert recall([found, none]) == {"found_before_77": 0.5, "found_after_77": 0.5}
    assert recall(counts_of(["a cat"], picture, tokenizer)) == {}
    assert prompts_of(None, 2, "scenes:all") != prompts_of(None, 2, "scenes")


def test_a_curve_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    curve = Curve(tmp_path / "curve.jsonl", 0)
    for update in (1, 2, 3):
        curve.add(update, {"found": update / 3}, [[update, 3, 0, 0]], 5.0)
    again = Curve(tmp_path / "curve.jsonl", 2)
    assert [point["update"] for point in again.points] == [1, 2]
    again.add(3, {"found": 0.0}, [[0, 3, 0, 0]], 5.0)
    assert [point["figures"]["found"] for point in Curve(tmp_path / "curve.jsonl", 9).points] == [1 / 3, 2 / 3, 0.0]
