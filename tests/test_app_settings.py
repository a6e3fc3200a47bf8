"""Settings of the page, and the PNGs that remember them."""

import json
import math
from dataclasses import replace
from io import BytesIO

import numpy as np
import png_settings
import pytest
import settings as page_settings
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_app_drawing import NAME, draw

from finelip_diffusion.cli import main
from finelip_diffusion.scenes import IMAGE_SIZE


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": " \n\0 "}, "The prompt is empty"),
        ({"prompt": None}, "The prompt is not a text"),
        ({"prompt": "x" * 20_001}, "The prompt has 20,001 characters: shorten it to 20,000."),
        ({"prompt": "broken \ud800 half"}, "The prompt holds characters that are not valid text"),
        ({"negative_prompt": "x" * 20_001}, "The negative prompt has 20,001 characters"),
        ({"steps": 0}, "Steps cannot be 0: choose a whole number from 1 to 150."),
        ({"steps": 10_000}, "Steps cannot be 10000: choose"),
        ({"steps": 2.5}, "Steps cannot be 2.5: choose a whole number"),
        ({"steps": "20"}, "Steps is not a number"),
        ({"steps": True}, "Steps is not a number"),
        ({"steps": None}, "Steps is not a number"),
        ({"steps": 10**400}, "Steps cannot be 10000000000000000000:"),
        ({"guidance_scale": math.nan}, "Guidance scale is not a number"),
        ({"guidance_scale": math.inf}, "Guidance scale is not a number"),
        ({"guidance_scale": -1}, "Guidance scale cannot be -1: choose a number from 0 to 30."),
        ({"seed": -1}, "Seed cannot be -1: choose a whole number from 0 to 4294967295."),
        ({"seed": 2**32}, "Seed cannot be 4294967296"),
        ({"num_images": 5}, "Num images cannot be 5: choose a whole number from 1 to 4."),
        ({"width": 100}, "Width cannot be 100: choose a multiple of 8 from 64 to 2048."),
        ({"height": 10**9}, "Height cannot be 1000000000"),
        ({"long_prompt": "/etc/passwd"}, "The strategy must be one of stretch"),
        ({"weighting": "/etc/passwd"}, "Brackets must be one of plain"),
    ],
    ids=str,
)
def test_settings_that_do_not_hold_are_one_sentence(values, words):
    with pytest.raises(ValueError) as caught:
        page_settings.Settings(**{"prompt": "a prompt", **values})
    assert words in str(caught.value)


def test_settings_take_what_a_browser_sends():
    settings = page_settings.Settings(" a\0prompt ", steps=20.0, seed=7.0, guidance_scale=3)
    assert settings.prompt == "a prompt"
    assert (type(settings.steps), type(settings.seed), type(settings.guidance_scale)) == (int, int, float)


# -------------------------------------------------------------------------------------------------------------- PNGs


def png(**chunks: str) -> bytes:
    info, content = PngInfo(), BytesIO()
    for key, value in chunks.items():
        info.add_itxt(key, value, zip=len(value) > 10**6)
    Image.new("RGB", (8, 8)).save(content, "PNG", pnginfo=info)
    return content.getvalue()


def test_a_png_brings_back_prompt_and_settings(room):
    picture = draw(room, prompt="שלום 👩‍👩‍👧 <b>", seed=7, negative_prompt="„blurry“", long_prompt="chunk")[-1]
    content = png_settings.to_png(picture, NAME)
    settings, model = png_settings.settings_of(content)
    assert model == NAME
    assert settings.width == settings.height == IMAGE_SIZE
    assert replace(settings, width=None, height=None) == picture.settings
    again = draw(room, **page_settings.as_record(settings))[-1]
    assert np.array_equal(np.asarray(again.image), np.asarray(Image.open(BytesIO(content))))


def test_a_png_of_the_command_line_comes_back_too(tmp_path):
    (tmp_path / "prompt.txt").write_text("A large red star in the very centre.")
    assert (
        main(["generate", "--prompt-file", str(tmp_path / "prompt.txt"), "--out", str(tmp_path), "--steps", "1"]) == 0
    )
    settings, model = png_settings.settings_of((tmp_path / "image-0.png").read_bytes())
    assert (settings.prompt, settings.steps, settings.guidance_scale, model) == (
        "A large red star in the very centre.", 1, 3.0, "bundled",
    )  # fmt: skip


GOOD = {"prompt": "x", "model": "bundled"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a picture that can be read"),
        (b"<svg onload=alert(1)>", "is not a picture that can be read"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "is not a picture that can be read"),
        (png()[:40], "is not a picture that can be read"),
        (png(), "holds no settings"),
        (png(settings="{"), "cannot be read"),
        (png(settings="[" * 100_000), "cannot be read"),
        (png(settings="[]"), "cannot be read"),
        (png(settings="{}"), "cannot be read"),
        (png(settings=json.dumps(GOOD | {"model": ["/etc/passwd"]})), "cannot be read"),
        (png(settings=json.dumps(GOOD | {"negative_prompt": "x" * 400_000})), "cannot be read"),
        (png(settings="x" * 80_000_000), "is not a picture that can be read"),
        (png(settings=json.dumps({"model": "bundled"})), "are not valid"),
        (png(settings=json.dumps(GOOD | {"steps": 10**400})), "are not valid"),
        (png(settings=json.dumps(GOOD | {"steps": "20"})), "are not valid"),
        (png(settings=json.dumps(GOOD | {"guidance_scale": math.nan})), "are not valid"),
        (png(settings=json.dumps(GOOD | {"prompt": "\ud800"})), "are not valid"),
        (png(settings=json.dumps(GOOD | {"long_prompt": {"a": 1}})), "are not valid"),
        (png(settings=json.dumps(GOOD | {"weighting": ["a1111"]})), "are not valid"),
        (png(settings=json.dumps(GOOD | {"blend": 0.5})), "a blend of two encoders"),
        (b"\0" * (png_settings.MAX_BYTES + 1), "has 20,000,001 bytes"),
    ],
    ids=range(21),
)
def test_a_png_that_is_none_or_hostile_is_one_sentence(content, words):
    with pytest.raises(ValueError) as caught:
        png_settings.found_in(content)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_png_names_is_not_opened(tmp_path):
    """Unknown keys are left out, and a model is a name to compare."""
    target = tmp_path / "model"
    settings, model = png_settings.settings_of(
        png(settings=json.dumps(GOOD | {"model": str(target), "finelip": "/etc"}))
    )
    assert model == str(target)
    assert not target.exists()
    assert not hasattr(settings, "finelip")
