"""The script of image tuning, run as a user runs it: a tiny Stable Diffusion of the real classes, drawn scenes."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import scripts
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from tiny_models import pixels
from transformers import CLIPTextModel, CLIPTokenizer

from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.model import load_clip
from finelip_diffusion.runs import read_preset
from finelip_diffusion.scenes import describe, render, sample_scene
from finelip_diffusion.tuning import load_parts

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train" / "finetune_text_to_image.py"
TERMS = ("denoising=1", "kept_states=1", "kept_predictions=1")
WEIGHTS = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder of twelve scenes, and prompts without images."""
    folder = tmp_path_factory.mktemp("data")
    lines, prompts = [], []
    for seed in range(12):
        scene = sample_scene(seed)
        render(scene).save(folder / f"{seed}.png")
        prompts.append(str(describe(scene, seed)))
        lines.append(json.dumps({"file_name": f"{seed}.png", "text": prompts[-1]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "prompts.txt").write_text("\n".join(prompts))
    return folder


def flags_of(base: Path, data: Path, folder: Path, terms: tuple[str, ...] = TERMS, **flags: object) -> list[str]:
    """Four updates of two images, with rates at which weights visibly move."""
    small = {
        "pretrained_model_name_or_path": base, "train_data": data, "output_dir": folder, "train_batch_size": 2,
        "max_train_steps": 4, "learning_rate": 1e-3, "lr_warmup_steps": 1, "checkpointing_steps": 2, "kept_every": 2,
        "validation_prompts": data / "prompts.txt", "num_validation_prompts": 1, "validation_steps": 2,
        "validation_inference_steps": 1, "report_to": "none", "cache_dir": data / "cache",
    }  # fmt: skip
    given = [f"--{name}={value}" for name, value in (small | flags).items() if not isinstance(value, tuple)]
    lists = [word for name, value in flags.items() if isinstance(value, tuple) for word in (f"--{name}", *value)]
    return [*given, "--terms", *terms, *lists]


def tune(*args: object, bare: bool = False, **flags: object) -> subprocess.CompletedProcess[str]:
    done = scripts.run(SCRIPT, *flags_of(*args, **flags), bare=bare)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def retold(data: Path, folder: Path) -> dict[str, Path]:
    """Lists of the images in their own words and in others, and of others than these, and in another order."""
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    long = [line | {"file_name": str(data / line["file_name"])} for line in lines]
    plain = [line | {"text": f"plain words {number}"} for number, line in enumerate(long)]
    files = {name: folder / f"{name}.jsonl" for name in ("plain", "long", "fewer", "turned")}
    for file, rows in zip(files.values(), (plain, long, plain[1:], plain[::-1]), strict=True):
        file.write_text("\n".join(map(json.dumps, rows)))
    return files


def weights_of(folder: Path, place: str = "text_encoder") -> dict[str, torch.Tensor]:
    """An encoder's weights as transformers 5 names them."""
    weights = load_file(folder / place / "model.safetensors")
    return {name.removeprefix("text_model."): weight for name, weight in weights.items()}


def assert_same(one: Path, other: Path, file: str = WEIGHTS) -> None:
    left, right = load_file(one / file), load_file(other / file)
    assert left.keys() == right.keys()
    for name, weight in left.items():
        assert torch.equal(weight, right[name]), name


@pytest.fixture(scope="module")
def straight(stable_diffusion_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    tune(stable_diffusion_folder, data, folder, report_to="tensorboard", bare=True)
    return folder


def test_it_leaves_what_pipelines_load(straight: Path, stable_diffusion_folder: Path) -> None:
    encoder = CLIPTextModel.from_pretrained(straight, subfolder="text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(straight, subfolder="tokenizer")
    assert tokenizer.model_max_length == encoder.config.max_position_embeddings == 248
    plain = StableDiffusionPipeline.from_pretrained(stable_diffusion_folder, text_encoder=encoder, tokenizer=tokenizer)
    ours = FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, finelip=straight)
    prompt = str(describe(sample_scene(3), 3))
    assert torch.equal(pixels(plain, prompt), pixels(ours, prompt))
    stock, tuned = weights_of(stable_diffusion_folder), weights_of(straight)
    name = "encoder.layers.3.mlp.fc1.weight"
    assert (tuned[name] - stock[name]).abs().max() > 1e-4  # it trains
    card = (straight / "README.md").read_text()
    assert "StableDiffusionPipeline.from_pretrained" in card and "--terms denoising=1 kept_states=1" in card
    points = [json.loads(line) for line in (straight / "validation.jsonl").read_text().splitlines()]
    assert [point["update"] for point in points] == [2, 4] and all(point["milliseconds"] > 0 for point in points)


def test_validation_images_are_in_the_log(straight: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(straight / "logs" / "finetune_text_to_image"), {"images": 0, "scalars": 0})
    log.Reload()
    assert [image.step for image in log.Images("validation")] == [2, 4]
    assert [event.step for event in log.Scalars("denoising")] == [1, 2, 3, 4]
    assert [event.value for event in log.Scalars("captions_cut")] == [0.0] * 4


def test_a_run_that_was_stopped_ends_as_a_straight_one(
    straight: Path, stable_diffusion_folder: Path, data: Path, tmp_path: Path
) -> None:
    """Bit for bit, average and validation included, with the latents in the cache."""
    shutil.copytree(straight / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copy(straight / "validation.jsonl", tmp_path)
    latents = {file: file.stat().st_mtime_ns for file in (data / "cache").rglob("*.npy")}
    assert latents
    done = tune(stable_diffusion_folder, data, tmp_path, resume_from_checkpoint="latest")
    assert f"Going on from {tmp_path / 'checkpoint-2'}" in done.stdout
    assert_same(straight, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in (data / "cache").rglob("*.npy")} == latents
    assert len((tmp_path / "validation.jsonl").read_text().splitlines()) == 2


def set_environment(values: dict[str, str]) -> None:
    """What torchrun tells each of its processes."""
    os.environ.update(values)


def test_two_processes_train_as_one(stable_diffusion_folder: Path, data: Path, tmp_path: Path) -> None:
    """A batch of four, or two of two. Updates are in proportion to gradients, which AdamW's are not where a gradient
    is nothing but rounding."""
    told = retold(data, tmp_path)
    smooth = {"adam_epsilon": 1, "learning_rate": 1.0, "num_validation_prompts": 0, "max_train_steps": 2,
              "terms": ("denoising=1", "restated_predictions=1", "restated_attention=1"), "padded_batches": 1,
              "train_data": told["long"], "restated_data": told["plain"]}  # fmt: skip
    tune(stable_diffusion_folder, data, tmp_path / "one", train_batch_size=4, **smooth)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617", "WORLD_SIZE": "2"}
    processes = [
        scripts.start(
            SCRIPT, *flags_of(stable_diffusion_folder, data, tmp_path / "two", **smooth), out=tmp_path,
            before=partial(set_environment, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in processes:
        process.join(scripts.TIMEOUT)
        assert process.exitcode == 0, (tmp_path / "stderr").read_text()[-2000:]
    one, two = (weights_of(tmp_path / name) for name in ("one", "two"))
    stock, name = weights_of(stable_diffusion_folder), "encoder.layers.0.mlp.fc1.weight"
    moved = (one[name] - stock[name]).abs().max()
    assert moved > 1e-5
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=float(moved) / 100, msg=name)  # sums of two halves


def test_encoder_then_unet_by_adapters(stable_diffusion_folder: Path, data: Path, tmp_path: Path) -> None:
    """Two stages; stopped in the second, it goes on there."""
    stages = {"train": ("text_encoder", "unet_lora"), "lora_rank": 2, "unet_lora_rank": 2, "unet_learning_rate": 1e-2}
    tune(stable_diffusion_folder, data, tmp_path / "a", **stages)
    lora = "pytorch_lora_weights.safetensors"
    assert any(weight.any() for name, weight in load_file(tmp_path / "a" / lora).items() if "lora.up" in name
               or "lora_B" in name)  # fmt: skip
    assert set(weights_of(tmp_path / "a")) == set(weights_of(stable_diffusion_folder))
    shutil.copytree(tmp_path / "a" / "text_encoder", tmp_path / "b" / "text_encoder")
    shutil.copytree(tmp_path / "a" / "unet_lora" / "checkpoint-2", tmp_path / "b" / "unet_lora" / "checkpoint-2")
    tune(stable_diffusion_folder, data, tmp_path / "b", resume_from_checkpoint="latest", **stages)
    for file in (WEIGHTS, lora):
        assert_same(tmp_path / "a", tmp_path / "b", file)
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, finelip=tmp_path / "a")
    base = FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder)
    name = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert not torch.equal(pipe.unet.state_dict()[name], base.unet.state_dict()[name])


def test_sdxl_is_taught_by_prompts_alone(stable_diffusion_xl_folder: Path, data: Path, tmp_path: Path) -> None:
    """The second encoder alone is trained, with its pooled output, by the UNet under a window for each sentence."""
    terms = ("teacher_predictions=1", "kept_states=1", "kept_predictions=1")
    flags = {"train_data": data / "prompts.txt", "encoders": ("text_encoder_2",), "num_teacher_prompts": 4,
             "gradient_checkpointing": True, "resume_from_checkpoint": "latest"}  # fmt: skip
    tune(stable_diffusion_xl_folder, data, tmp_path, terms, max_train_steps=2, **flags)
    tune(stable_diffusion_xl_folder, data, tmp_path, terms, max_train_steps=3, **flags)
    for name, moves in (("text_encoder", False), ("text_encoder_2", True)):
        before, after = (weights_of(folder, name) for folder in (stable_diffusion_xl_folder, tmp_path))
        weight = "encoder.layers.0.mlp.fc1.weight"
        assert torch.equal(before[weight], after[weight]) is not moves
    pipe = FineLIPStableDiffusionXLPipeline.from_pretrained(stable_diffusion_xl_folder, finelip=tmp_path)
    tuned = weights_of(tmp_path, "text_encoder_2")["text_projection.weight"]
    assert torch.equal(pipe.text_encoder_2.state_dict()["text_projection.weight"], tuned)
    assert (tmp_path / "tokenizer_2").is_dir() and "tokenizer_2=tokenizer_2" in (tmp_path / "README.md").read_text()
    assert len(list((data / "cache").glob("trajectories-*"))) == 1


def test_an_encoder_learns_other_words_for_pictures_that_it_draws(
    script: ModuleType, stable_diffusion_folder: Path, data: Path, tmp_path: Path
) -> None:
    """From a list of the same images in other words; two updates and a resumed one are three."""
    told = retold(data, tmp_path)
    terms = ("restated_predictions=1", "restated_attention=1", "kept_states=1")
    flags = {"restated_data": told["plain"], "num_validation_prompts": 0, "max_train_steps": 3}
    for folder, more in ((tmp_path / "one", {}), (tmp_path / "two", {"resume_from_checkpoint": "latest"})):
        if more:
            shutil.copytree(tmp_path / "one" / "checkpoint-2", folder / "checkpoint-2")
        tune(stable_diffusion_folder, told["long"], folder, terms, **flags | more, cache_dir=tmp_path / "c")
    assert_same(tmp_path / "one", tmp_path / "two")
    stock, tuned = weights_of(stable_diffusion_folder), weights_of(tmp_path / "one")
    name = "encoder.layers.3.mlp.fc1.weight"
    assert (tuned[name] - stock[name]).abs().max() > 1e-4
    for other in ("fewer", "turned"):
        with pytest.raises(ValueError, match="is not of the images of --train_data, in the same order"):
            script.main(script.Arguments(
                output_dir=tmp_path / "out", pretrained_model_name_or_path=str(stable_diffusion_folder),
                train_data=str(told["long"]), restated_data=str(told[other]),
                terms=["restated_predictions=1"], report_to="none", train_batch_size=2, cache_dir=tmp_path / "c",
            ))  # fmt: skip


def test_facts_are_learned_by_the_words_that_state_them(
    script: ModuleType, stable_diffusion_folder: Path, data: Path, tmp_path: Path
) -> None:
    """Of scenes; two updates and a resumed one are three. Captions that are only texts are refused."""
    terms = ("stated_facts=1", "kept_states=1")
    flags = {"train_data": "scenes:all", "num_scenes": 64, "num_validation_prompts": 0, "max_train_steps": 3}
    for folder, more in ((tmp_path / "one", {}), (tmp_path / "two", {"resume_from_checkpoint": "latest"})):
        if more:
            shutil.copytree(tmp_path / "one" / "checkpoint-2", folder / "checkpoint-2")
        tune(stable_diffusion_folder, data, folder, terms, **flags | more, cache_dir=tmp_path / "c")
    assert_same(tmp_path / "one", tmp_path / "two")
    stock, tuned = weights_of(stable_diffusion_folder), weights_of(tmp_path / "one")
    name = "encoder.layers.3.mlp.fc1.weight"
    assert (tuned[name] - stock[name]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="is not for stated_facts: no caption says where it states an object"):
        script.main(script.Arguments(
            output_dir=tmp_path / "out", pretrained_model_name_or_path=str(stable_diffusion_folder),
            train_data=str(data), terms=["stated_facts=1"], report_to="none", train_batch_size=2,
        ))  # fmt: skip


def test_a_recipe_goes_along_and_its_model_still_retrieves(data: Path, tmp_path: Path) -> None:
    """On the bundled model: FineLIP's loss with heads that are drawn anew, and a term that keeps the stock space."""
    tune(BUNDLED_MODEL, data, tmp_path, ("denoising=1", "finelip_sparc=0.1", "teacher_predictions=1"),
         num_validation_prompts=0, max_train_steps=2, recipe_batch_size=4, num_teacher_prompts=2,
         validation_inference_steps=1, mixed_precision="bf16", teacher=0.5,
         freeze_token_embedding=True)  # fmt: skip
    model = load_clip(tmp_path / "finelip_model")[0]
    tuned = weights_of(tmp_path)
    for name, weight in model.clip.text_model.state_dict().items():
        assert torch.equal(weight, tuned[name.removeprefix("text_model.")]), name
    frozen = load_clip(BUNDLED_MODEL / "clip")[0]
    name = "visual_projection.weight"
    assert torch.equal(model.clip.state_dict()[name], frozen.clip.state_dict()[name])
    assert model.config.refine_text


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_text_to_image", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["finetune_text_to_image"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"terms": ["denoise=1"]}, r"--terms has denoise=1: choose among denoising, teacher_predictions, .*finelip"),
        ({"terms": ["denoising=much"]}, "a weight is a number: denoising=1"),
        ({"terms": ["denoising=-1"]}, "with a weight of at least 0"),
        ({"terms": ["denoising=1", "denoising=2"]}, "each once"),
        ({"terms": ["denoising=1", "finelip=1", "sparc=1"]}, "--terms names 2 recipes"),
        ({"terms": ["kept_states=1"], "train": ["unet_lora"]}, "has nothing that trains unet_lora: give denoising"),
        ({"train": ["unet"]}, "--train is unet: choose among text_encoder, unet_lora"),
        ({"encoders": ["text_encoder", "text_encoder"]}, "each once"),
        ({"terms": ["restated_predictions=1"]}, "--restated_data and a term restated_predictions or restated_att"),
        ({"terms": ["restated_attention=1"]}, "--restated_data and a term restated_predictions or restated_att"),
        ({"restated_data": "scenes"}, "or restated_attention need each other: give both, or none"),
        ({"restated_finelip": "stretched"}, "--restated_finelip is for .* and stated_facts, and --terms has none"),
        ({"teacher": "paraphrase"}, "--teacher is paraphrase: give segment, chunk, or a share"),
        ({"teacher": "1"}, "--teacher is 1: give segment"),
        ({"padded_batches": 1.5}, "--padded_batches is 1.5, but a share lies in 0..1"),
        ({"lora_rank": 0}, "--lora_rank is 0, but must be at least 1"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(script: ModuleType, flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        script.Arguments(output_dir=Path("x"), **flags)


def test_wrong_sources_are_one_sentence(
    script: ModuleType, stable_diffusion_folder: Path, data: Path, tmp_path: Path
) -> None:
    def fails(message: str, **flags: object) -> None:
        with pytest.raises(ValueError, match=message):
            script.main(script.Arguments(
                **{"output_dir": tmp_path / "out", "pretrained_model_name_or_path": str(stable_diffusion_folder),
                   "train_data": str(data), "report_to": "none", "max_train_steps": 1} | flags
            ))  # fmt: skip

    fails("is a FluxPipeline: give a Stable Diffusion", pretrained_model_name_or_path=str(tmp_path / "flux"))
    fails("--encoders has text_encoder_2, but the base has text_encoder", encoders=["text_encoder_2"])
    fails("has no images, which denoising needs", train_data=str(data / "prompts.txt"))
    fails("do not fill a batch of 16", train_batch_size=16)


@pytest.fixture(autouse=True)
def flux(tmp_path: Path) -> None:
    """A pipeline of another kind."""
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')


@pytest.mark.parametrize("term", ["restated_predictions=1", "restated_attention=1"])
def test_a_pass_for_other_words_takes_memory(script: ModuleType, term: str, tmp_path: Path) -> None:
    """Alone, as much as one for the noise; beside that, nothing more: the captions are the same."""
    parts, counted = load_parts(BUNDLED_MODEL), []
    for terms in (["denoising=1"], [term], ["denoising=1", term]):
        data = {"restated_data": "scenes"} if term in terms else {}
        args = script.Arguments(output_dir=tmp_path, terms=terms, resolution=144, **data)
        counted.append(script.memory_of(parts, [], "text_encoder", args, torch.float32)["activations (about)"])
    assert counted[0] == counted[1] == counted[2]


def test_presets_are_read_and_described(script: ModuleType, data: Path, tmp_path: Path) -> None:
    """`--dry_run` of each preset says what is trained and what memory it takes, and writes nothing."""
    for preset in ("scenes", "reword", "sd15", "sdxl"):
        values = read_preset(["--preset", preset], script.PRESETS, script.Arguments)
        script.Arguments(output_dir=tmp_path / "none", **values)
    done = scripts.run(SCRIPT, "--preset", "sd15", "--pretrained_model_name_or_path", BUNDLED_MODEL, "--output_dir",
                       tmp_path / "none", "--mixed_precision", "no", "--dry_run", "True")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "train text_encoder: denoising 1" in done.stdout and "frozen UNet" in done.stdout
    assert not (tmp_path / "none").exists()
