"""docs/one_gpu.md: its very commands, from first to last, on a tiny Stable Diffusion with random weights."""

import json
import re
import shlex
from pathlib import Path

import pytest
import scripts
import torch
from test_readme import blocks
from tiny_models import make_stable_diffusion
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from finelip_diffusion.scenes import describe, render, sample_scene

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "one_gpu.md"
SMALLER = {  # after the page's own flags, of which the last one counts
    "finetune_encoder.py": "--train_batch_size 8 --micro_batch_size 4 --max_train_steps 1 --dataloader_num_workers 0 "
    "--num_validation_examples 8 --mixed_precision no --report_to none",
    "finetune_text_to_image.py": "--train_batch_size 4 --gradient_accumulation_steps 2 --max_train_steps 1 "
    "--dataloader_num_workers 0 --num_validation_prompts 1 --validation_inference_steps 1 --mixed_precision no "
    "--aspect_ratio_buckets False --num_teacher_prompts 4 --report_to none",
    "evaluate_fid.py": "--num_prompts 4 --num_short 2 --num_changed 1 --num_drift 1 --num_inference_steps 1 "
    "--dtype float32 --features clip_fd={clip} --judges clip={clip} --kid_subset_size 2 --num_resamples 2 "
    "--num_examples 1",
}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands for the page's names: a model, its CLIP, a folder in DOCCI's layout, prompts, and where runs go."""
    folder = tmp_path_factory.mktemp("one_gpu")
    pipe = make_stable_diffusion()
    pipe.save_pretrained(folder / "sd")
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=8)  # fmt: skip
    torch.manual_seed(0)
    config = CLIPConfig(text_config=pipe.text_encoder.config.to_dict(), vision_config=vision.to_dict(),
                        projection_dim=32)  # fmt: skip
    CLIPModel(config).save_pretrained(folder / "clip")
    pipe.tokenizer.save_pretrained(folder / "clip")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "clip")
    (folder / "docci" / "images").mkdir(parents=True)
    lines, prompts = [], []
    for seed in range(40):
        scene = sample_scene(seed)
        render(scene).save(folder / "docci" / "images" / f"{seed}.png")
        prompts.append(str(describe(scene, seed)))
        lines.append(json.dumps({"image_file": f"{seed}.png", "description": prompts[-1], "example_id": str(seed),
                                 "split": "test" if seed % 4 == 0 else "train"}))  # fmt: skip
    (folder / "docci" / "docci_descriptions.jsonlines").write_text("\n".join(lines))
    (folder / "prompts.txt").write_text("\n".join(prompts[:8]))
    return {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(folder / "sd"),
        "openai/clip-vit-large-patch14": str(folder / "clip"),
        "data/docci": str(folder / "docci"),
        "data/prompts.txt": str(folder / "prompts.txt"),
        "runs/": f"{folder}/runs/",
    }


def in_place(text: str, names: dict[str, str]) -> str:
    for name, place in names.items():
        text = text.replace(name, place)
    return text


def test_every_command_of_the_page_works_after_the_other(
    names: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = []
    for block in blocks(PAGE, "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(in_place(line, names), comments=True)
            script = next((word for word in words if word.startswith("train/")), None)
            if script is None:  # pip, and the benchmark, which has tests of its own
                assert words[0] == "pip" or words[1] == "benchmarks/image_tuning.py"
                continue
            ran.append(Path(script).name)
            smaller = SMALLER[ran[-1]].format(clip=names["openai/clip-vit-large-patch14"])
            if ran[-1] == "evaluate_fid.py":
                smaller += f" --model {names['stable-diffusion-v1-5/stable-diffusion-v1-5']}"
            done = scripts.run(ROOT / script, *words[words.index(script) + 1 :], *smaller.split())
            assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    assert ran == ["finetune_encoder.py", "finetune_text_to_image.py", "finetune_text_to_image.py", "evaluate_fid.py"]
    runs = Path(names["runs/"])
    report = json.loads((runs / "sd15-evaluation" / "report.json").read_text())
    assert [name.removeprefix("base/") for name in report["conditions"]] == ["truncate", "chunk", "FineLIP", "tuned"]
    (block,) = blocks(PAGE, "python")
    code = in_place(block.code, names).replace("torch.float16", "torch.float32").replace('"cuda"', '"cpu"')
    code = code.replace("num_inference_steps=30", "num_inference_steps=1")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(PAGE), "exec"), {})
    assert (tmp_path / "picture.png").is_file()


def test_the_page_counts_what_torch_counts() -> None:
    """The table of operations, and the hours that follow from it and from the published rates."""
    text = PAGE.read_text()
    unet, encoder, tower = (
        [float(value) for value in re.search(rf"\| {name}[^|]*\| ([\d.]+)[^|]*\| ([\d.]+)", text).groups()]
        for name in ("frozen UNet", "text encoder", "image tower")
    )
    pair = 2 * (encoder[0] + tower[0]) + encoder[1] + tower[1]  # encoded once more for gradient caching
    counted = {"2": 256_000 * pair, "3": 192_000 * (sum(unet) + sum(encoder)), "4": 5_200 * 50 * 2 * unet[0]}
    for stage, teraflop in counted.items():
        hours = re.search(rf"\| {stage}: .*\| ([\d.]+) hours \| ([\d.]+) hours \|", text).groups()
        for said, rate in zip(hours, (165, 71), strict=True):
            assert float(said) == pytest.approx(teraflop / (0.4 * rate) / 3600, abs=0.1)
