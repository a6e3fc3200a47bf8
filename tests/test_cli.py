"""The command line, run as a user runs it."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import tiny_text_encoder
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finelip_diffusion import cli
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.text_encoder import load_text_encoder
from finelip_diffusion.tokenizer import clip_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def finelip(*args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    command = [sys.executable, "-m", "finelip_diffusion.cli", *map(str, args)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture
def prompt_file(tmp_path, text_of):
    path = tmp_path / "prompt.txt"
    path.write_text(text_of(90) + " a crown — 王冠\n", encoding="utf-8")
    return path


@pytest.fixture
def generate(stable_diffusion_folder, finelip_folder, prompt_file, tmp_path, capsys):
    """Runs `finelip generate` here, two steps, and returns the exit status and what was printed."""

    def run(*args: object, model=stable_diffusion_folder, prompt=("--prompt-file", prompt_file), out=tmp_path / "out"):
        command = ["generate", *prompt, "--out", out, "--model", model, "--finelip", finelip_folder, "--steps", 2]
        try:
            status = cli.main([str(part) for part in [*command, *args]])
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_generate_as_a_user_runs_it(stable_diffusion_folder, finelip_folder, prompt_file, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    args = ["generate", "--prompt-file", prompt_file, "--out", out, "--model", stable_diffusion_folder]
    args += ["--finelip", finelip_folder, "--seed", 5, "--num-images", 2, "--steps", 2, "--negative-prompt", "dull"]
    done = finelip(*args)
    assert done.returncode == 0, done.stderr
    assert "1 window of 248 positions" in done.stdout
    assert "nothing dropped" in done.stdout
    assert "image 2 of 2" in done.stderr  # the progress bar
    assert sorted(path.name for path in out.iterdir()) == ["image-5.png", "image-6.png"]
    with Image.open(out / "image-6.png") as image:
        image.load()
        assert image.text["prompt"] == prompt_file.read_text(encoding="utf-8").strip()
        assert image.text["negative_prompt"] == "dull"
        settings = json.loads(image.text["settings"])
    assert settings["seed"] == 6
    assert settings["steps"] == 2
    assert settings["long_prompt"] == "stretch"

    assert cli.main([str(part) for part in args]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "image-5.png" in error
    assert "--overwrite" in error


def test_an_image_depends_on_its_seed_alone(generate, tmp_path):
    assert generate("--seed", 3, "--num-images", 2, out=tmp_path / "two")[0] == 0
    assert generate("--seed", 4, out=tmp_path / "one")[0] == 0
    two, one = (Image.open(tmp_path / name / "image-4.png") for name in ("two", "one"))
    assert two.tobytes() == one.tobytes()
    assert two.tobytes() != Image.open(tmp_path / "two" / "image-3.png").tobytes()


def test_existing_files_are_replaced_only_when_told_and_looked_for_first(generate, tmp_path):
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / "image-1.png"
    mine.write_text("mine")
    status, _, error = generate("--num-images", 2, model=tmp_path / "not even looked at")
    assert status == 1
    assert f"{mine} would be overwritten" in error
    assert mine.read_text() == "mine"
    assert generate("--num-images", 2, "--overwrite")[0] == 0
    assert Image.open(mine).format == "PNG"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["image-0.png", "image-1.png"]


def test_a_failed_write_leaves_nothing(generate, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)  # the one thing that cannot be built here: a full disk
    status, _, error = generate()
    sentence = f"{tmp_path / 'out' / 'image-0.png'} cannot be written (No space left on device): free some space "
    assert status == 1 and error.splitlines()[-1].startswith(f"finelip generate: error: {sentence}")
    assert list((tmp_path / "out").iterdir()) == []


def test_truncate_says_what_it_drops(generate):
    status, out, _ = generate("--long-prompt", "truncate")
    assert status == 0
    assert "of 77 positions" in out
    assert out.splitlines()[1].endswith("a crown — 王冠'")


def test_weights_and_a_blend(generate, tmp_path):
    prompt = ("--prompt", "a (red cat:1.4) under a tree")
    status, out, error = generate("--weighting", "a1111", "--blend", "0.5", prompt=prompt)
    assert status == 0, error
    assert "text_encoder: 1 window of 248 positions (6 tokens), 248 states, 2 tokens weighted, nothing dropped" in out
    with Image.open(tmp_path / "out" / "image-0.png") as image:
        settings = json.loads(image.text["settings"])
    assert (settings["weighting"], settings["blend"]) == ("a1111", 0.5)
    status, _, error = generate("--blend", "2", out=tmp_path / "none")
    assert (status, error.splitlines()[-1].split(": ", 2)[2][:24]) == (1, "blend=2.0 is not a share")


def test_a_picture_says_what_it_was_drawn_with(generate, stable_diffusion_folder, tmp_path):
    """Not what was asked for: a blend without an encoder to blend is refused, a default is written out."""
    status, _, error = generate("--blend", "0.5", "--long-prompt", "chunk")
    assert (status, error.count("\n")) == (1, 1)
    assert "blend=0.5 mixes into what the long encoder reads, but long_prompt='chunk'" in error
    assert not list((tmp_path / "out").glob("*.png"))
    args = ["--model", stable_diffusion_folder, "--steps", "1", "--prompt", "a cat", "--out", tmp_path / "plain"]
    assert cli.main(["generate", *map(str, args)]) == 0
    with Image.open(tmp_path / "plain" / "image-0.png") as image:
        assert json.loads(image.text["settings"])["long_prompt"] == "chunk"


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--steps", "0"], "argument --steps: 0 must be at least 1"),
        (["--seed", "-1"], "argument --seed: -1 must be 0 to"),
        (["--seed", "red"], "argument --seed: 'red' is not a whole number"),
        (["--num-images", "0"], "argument --num-images: 0 must be at least 1"),
        (["--height", "60"], "argument --height: 60 must be at least 8 and divisible by 8"),
        (["--guidance-scale", "nan"], "argument --guidance-scale: nan must be finite"),
        (["--guidance-scale", "much"], "argument --guidance-scale: 'much' is not a number"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--long-prompt", "fold"], "argument --long-prompt: invalid choice: 'fold'"),
        (["--prompt", "a cat"], "not allowed with argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_malformed_commands(generate, args, reason):
    status, out, error = generate(*args)
    assert status == 2
    assert out == ""
    assert error.count("\n") == 1
    assert reason in error


def test_one_line_for_whatever_is_wrong(generate, tmp_path, finelip_folder):
    empty, latin, file = tmp_path / "empty.txt", tmp_path / "latin.txt", tmp_path / "file"
    empty.write_text(" \n")
    latin.write_bytes(b"caf\xe9")
    file.write_text("")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    cases = [
        (
            {"prompt": ("--prompt-file", tmp_path / "missing.txt")},
            [],
            "missing.txt does not exist: give",
        ),
        ({"prompt": ("--prompt-file", tmp_path)}, [], "Is a directory"),
        ({"prompt": ("--prompt-file", empty)}, [], "empty.txt is empty"),
        ({"prompt": ("--prompt", "")}, [], "--prompt is empty"),
        ({"prompt": ("--prompt", "\udce9")}, [], "no UTF-8 text"),
        ({"prompt": ("--prompt-file", latin)}, [], "latin.txt is not UTF-8 text"),
        ({"out": file}, [], "exists"),
        ({"out": file / "inside"}, [], "Not a directory"),
        ({"out": "/proc/nowhere"}, [], "/proc/nowhere"),
        ({"model": tmp_path / "no model"}, [], "no model"),
        ({"model": "nobody/nothing"}, [], "nobody/nothing"),
        ({"model": other}, [], "is a FluxPipeline"),
        ({"model": file.parent}, [], "holds no model_index.json: give the folder of a pipeline"),
        ({}, ["--finelip", tmp_path / "no encoder"], "no encoder"),
        ({}, ["--device", "abacus"], "abacus"),
    ]
    for where, args, reason in cases:
        status, out, error = generate(*args, **where)
        lines = [line for line in error.splitlines() if line.startswith("finelip")]
        assert status == 1, reason
        assert lines == [error.strip()], error
        assert reason in lines[0]
        assert "image-" not in out


def test_one_side_alone_is_not_ignored(generate, tmp_path):
    """diffusers takes its own size where one of the two is missing."""
    for name, args, size in [("wide", ["--width", 64], (64, 16)), ("high", ["--height", 64], (16, 64))]:
        status, _, error = generate(*args, out=tmp_path / name)
        assert status == 0, error
        with Image.open(tmp_path / name / "image-0.png") as image:
            assert image.size == size
            settings = json.loads(image.text["settings"])
        assert (settings["width"], settings["height"]) == size


def test_no_network_is_one_sentence_after_one_try(tmp_path):
    """As a user without a network sees it: nothing listens on this port, and nothing is cached."""
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    done = finelip("describe", "--prompt", "a cat", "--model", "nobody/nothing", env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "finelip describe: error: nobody/nothing cannot be reached and is not cached (ConnectError): "
        "check the name and the network, or download it and give its path.\n"
    )


def test_loading_prints_no_warning(stable_diffusion_folder, finelip_folder):
    for dtype in ("float32", "bfloat16"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe = cli.load_pipeline(str(stable_diffusion_folder), str(finelip_folder), dtype=dtype, device="cpu")
        assert {pipe.unet.dtype, pipe.text_encoder.dtype, pipe.vae.dtype} == {getattr(torch, dtype)}


def test_defaults_are_those_of_the_readme_and_the_page():
    from studio import Settings

    from app import GUIDANCE_SCALES

    args = cli._parser().parse_args(["generate", "--prompt", "a cat", "--out", "out"])
    page = Settings("a cat")
    assert (args.steps, cli.GUIDANCE_SCALE) == (page.steps, page.guidance_scale)
    assert {True: cli.BUNDLED_GUIDANCE_SCALE, False: cli.GUIDANCE_SCALE} == GUIDANCE_SCALES
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"num_inference_steps=(\d+)", readme)) == {str(args.steps)}
    assert set(re.findall(r"guidance_scale=([\d.]+)", readme)) == {f"{cli.BUNDLED_GUIDANCE_SCALE:g}"}


def test_describe(stable_diffusion_folder, finelip_folder, prompt_file, capsys):
    args = ["describe", "--prompt-file", prompt_file, "--model", stable_diffusion_folder, "--finelip", finelip_folder]
    assert cli.main(list(map(str, args))) == 0
    report, reading = capsys.readouterr().out.splitlines()
    assert report.endswith(" tokens, long_prompt='stretch' (the default with a trained long encoder)")
    assert reading.startswith("  text_encoder: 1 window of 248 positions")
    assert reading.endswith("nothing dropped")


def test_convert(stable_diffusion_folder, tmp_path, capsys):
    out = tmp_path / "long"
    assert cli.main(["convert", str(stable_diffusion_folder), str(out), "--pad-token", "!", "--dtype", "float16"]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{out}: CLIPTextModel, 248 positions, 32 wide, 4 layers, float16, padding '!'\n"
    text_encoder = CLIPTextModel.from_pretrained(out / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    assert text_encoder.config.max_position_embeddings == tokenizer.model_max_length == 248
    assert text_encoder(tokenizer("a cat", return_tensors="pt").input_ids).last_hidden_state.isfinite().all()
    capsys.readouterr()  # transformers' progress bars

    for args, reason in [
        ([stable_diffusion_folder, out], "overwritten"),
        ([tmp_path / "missing", tmp_path / "x"], "missing"),
        ([stable_diffusion_folder, tmp_path / "x", "--max-length", 200], "200"),
    ]:
        assert cli.main(["convert", *map(str, args)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("finelip convert: error: ")
        assert error.count("\n") == 1
        assert reason in error
    assert cli.main(["convert", str(stable_diffusion_folder), str(out), "--overwrite"]) == 0


def test_convert_interpolates_between_stock_and_trained(stable_diffusion_folder, encoder_folder, tmp_path):
    stock, trained = (load_text_encoder(source)[0] for source in (stable_diffusion_folder, encoder_folder))
    for share, expected in ((0, stock), (1, trained), (0.25, None)):
        command = ["convert", str(encoder_folder), str(tmp_path / str(share))]
        assert cli.main([*command, "--interpolate", str(stable_diffusion_folder), "--share", str(share)]) == 0
        found = load_text_encoder(tmp_path / str(share))[0].state_dict()
        for name, weight in found.items():
            one, other = stock.state_dict()[name], trained.state_dict()[name]
            mixed = 0.75 * one + 0.25 * other if expected is None else expected.state_dict()[name]
            assert torch.allclose(weight, mixed, rtol=0, atol=1e-6) and (
                expected is None or torch.equal(weight, mixed)
            )


def test_convert_refuses_a_share_or_an_encoder_that_does_not_fit(stable_diffusion_folder, tmp_path, capsys):
    tiny_text_encoder(1, width=64).save_pretrained(tmp_path / "wide")
    clip_tokenizer(77).save_pretrained(tmp_path / "wide")
    for flags, reason in (
        (["--interpolate", stable_diffusion_folder, "--share", 1.5], "share is 1.5, but"),
        (["--interpolate", tmp_path / "wide"], "differ in shape or are missing in one encoder"),
    ):
        command = ["convert", stable_diffusion_folder, tmp_path / "out", *flags]
        assert cli.main(list(map(str, command))) != 0
        assert reason in capsys.readouterr().err


def test_convert_says_what_it_sets_aside(tmp_path, caplog):
    folder = tmp_path / "source"
    tiny_text_encoder(1, projection=True).save_pretrained(folder)
    clip_tokenizer(77).save_pretrained(folder)
    assert cli.main(["convert", str(folder), str(tmp_path / "out"), "--no-projection"]) == 0
    assert "text_projection" in caplog.text


def test_convert_to_other_layouts_and_back(tmp_path, capsys):
    """The bundled encoders have heads of 32 and a vocabulary of their own, which --config brings along."""
    for layout, source, projection in [
        ("comfyui", BUNDLED_MODEL / "finelip", False),
        ("openai", BUNDLED_MODEL / "clip", True),
    ]:
        file, folder, home = tmp_path / f"{layout}.safetensors", tmp_path / layout, tmp_path / f"{layout}-direct"
        assert cli.main(["convert", str(source), str(file), "--layout", layout]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith(f"{file}: CLIPTextModel")
        assert cli.main(["convert", str(file), str(folder), "--config", str(source)]) == 0
        flags = ["--projection"] if projection else []
        assert cli.main(["convert", str(source), str(home), *flags]) == 0
        kind = CLIPTextModelWithProjection if projection else CLIPTextModel
        one, other = (kind.from_pretrained(path / "text_encoder") for path in (folder, home))
        assert one.config.num_attention_heads == other.config.num_attention_heads == 4
        assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
        words = [CLIPTokenizer.from_pretrained(path / "tokenizer") for path in (folder, home)]
        assert words[0]("a small red ring").input_ids == words[1]("a small red ring").input_ids
    capsys.readouterr()
    assert (
        cli.main(["convert", str(BUNDLED_MODEL / "finelip"), str(tmp_path / "x.safetensors"), "--layout", "openai"])
        == 1
    )
    error = capsys.readouterr().err
    assert (
        "lacks the text weights text_projection.weight: leave the projection out" in error and error.count("\n") == 1
    )


def test_convert_the_second_encoder_of_a_model(stable_diffusion_xl_folder, tmp_path, capsys):
    out = tmp_path / "second"
    command = ["convert", str(stable_diffusion_xl_folder), str(out), "--subfolder", "text_encoder_2"]
    assert cli.main(command) == 0
    assert "CLIPTextModelWithProjection, 248 positions" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["text_encoder_2", "tokenizer_2"]


def test_help_loads_no_library():
    code = "import sys; from finelip_diffusion import cli; cli._parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_strategies_and_layouts_are_those_of_the_package():
    from finelip_diffusion.layouts import WRITTEN
    from finelip_diffusion.prompts import LONG_PROMPTS
    from finelip_diffusion.weighting import WEIGHTINGS

    assert cli.LONG_PROMPTS == LONG_PROMPTS
    assert cli.WEIGHTINGS == WEIGHTINGS
    assert ("diffusers", "onetrainer", *WRITTEN) == cli.LAYOUTS
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in cli.DTYPES)


def test_the_bundled_model_says_what_it_draws_before_it_draws(tmp_path, capsys):
    flags = ["--out", str(tmp_path), "--steps", "1", "--overwrite"]
    for prompt, noted in (("a witch in a forest", True), ("a small red circle at the upper left", False)):
        assert cli.main(["generate", "--prompt", prompt, *flags]) == 0
        assert ("knows only small and large circles" in capsys.readouterr().err) == noted
