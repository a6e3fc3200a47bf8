"""The page without a browser: settings, drawing step by step, PNGs that remember, its API, and what it survives."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import album
import comparison_sheet
import example
import example_prompts
import numpy as np
import panels
import png_settings
import pytest
import scene_reader
import settings as page_settings
import studio
import torch
from actions import readable
from gradio import Error, analytics
from gradio_client import Client
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import app
from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline
from finelip_diffusion.cli import load_pipeline, main
from finelip_diffusion.prompts import LONG_PROMPTS, sentence_spans
from finelip_diffusion.scenes import find_facts, render, sample_scene

ROOT = Path(__file__).resolve().parents[1]
PROMPT = example_prompts.SCENES["8 shapes"]
NAME = "a model <b>of scenes</b>"


@pytest.fixture(scope="module")
def pipe() -> FineLIPStableDiffusionPipeline:
    pipe = FineLIPStableDiffusionPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def room(pipe) -> studio.Studio:
    return studio.Studio(lambda: pipe, scenes=True)


@pytest.fixture(scope="module")
def page(pipe):
    demo = app.build_demo(pipe, name=NAME)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.look())
    yield url
    demo.close()


def connect(url: str) -> Client:
    return Client(url, verbose=False, ssl_verify=False)  # loading certificates would take most of the time


@pytest.fixture(scope="module")
def client(page):
    return connect(page)


def draw(room: studio.Studio, **options) -> list:
    settings = page_settings.Settings(**{"prompt": PROMPT, "steps": 3, "guidance_scale": 3.0, **options})
    return list(room.draw([settings], threading.Event()))


# ---------------------------------------------------------------------------------------------------------- settings


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


# ----------------------------------------------------------------------------------------------------------- drawing


def test_the_page_draws_the_pixels_of_the_pipeline(room, pipe):
    events = draw(room, seed=5, num_images=2, negative_prompt="blurry")
    pictures = [event for event in events if isinstance(event, studio.Picture)]
    for seed, picture in zip((5, 6), pictures, strict=True):
        generator = torch.Generator().manual_seed(seed)
        plain = pipe(
            PROMPT, negative_prompt="blurry", num_inference_steps=3, guidance_scale=3.0, generator=generator
        ).images[0]
        assert np.array_equal(np.asarray(picture.image), np.asarray(plain))
        assert (picture.settings.seed, picture.settings.num_images) == (seed, 1)


def test_every_step_is_told_and_previews_grow_towards_the_picture(room, monkeypatch):
    monkeypatch.setattr(studio, "PREVIEW_SHARE", math.inf)  # a preview of every step, however long it takes
    events = draw(room, steps=12)
    picture = np.asarray(events[-1].image, dtype=float)
    assert [event.number for event in events[:-1]] == list(range(1, 13))
    previews = [np.asarray(event.preview, dtype=float) for event in events[:-1]]
    distances = [np.abs(preview - picture).mean() for preview in previews]
    assert distances[-1] < distances[0] / 2


@pytest.mark.parametrize("how", ["stop", "close"])
def test_stopping_ends_the_work_after_the_step_under_way(room, pipe, how):
    before, calls = pipe.unet.forward, []
    pipe.unet.forward = lambda *args, **kwargs: calls.append(1) or before(*args, **kwargs)
    try:
        stop = threading.Event()
        drawing = room.draw([page_settings.Settings(PROMPT, steps=150, guidance_scale=3.0)], stop)
        next(drawing)
        if how == "close":
            drawing.close()
        else:
            stop.set()
            with pytest.raises(studio.Stopped):
                list(drawing)
        with room._drawing:  # what was under way has ended when the next one may begin
            done = len(calls)
        assert done < 75
    finally:
        pipe.unet.forward = before
    assert isinstance(draw(room)[-1], studio.Picture)


@pytest.mark.parametrize("long_prompt", LONG_PROMPTS)
@pytest.mark.parametrize(
    "prompt",
    [
        "x",
        "猫が木の下で寝ている。" * 20,
        "שלום עולם، مرحبا بالعالم. " * 30,
        "👩‍👩‍👧‍👦🏳️‍🌈 " * 60,
        "<script>alert(1)</script> & \0 \x07 \u202e reversed",
    ],
    ids=["one letter", "Japanese", "right to left", "emoji", "hostile"],
)
def test_any_text_is_drawn_and_shown_as_text(room, pipe, prompt, long_prompt):
    picture = draw(room, prompt=prompt, long_prompt=long_prompt, steps=1)[-1]
    settings, _ = png_settings.settings_of(png_settings.to_png(picture, NAME))
    assert settings == replace(picture.settings, width=96, height=96)
    stock, long = (pipe.describe_prompt(picture.settings.prompt, how).readings[0] for how in ("truncate", "stretch"))
    assert "<script>" not in panels.meter(stock, long, prompt) + panels.sentences(picture)


def test_weights_are_drawn_read_and_listened_to(room, pipe):
    """Everything that shows the prompt shows it without brackets; the pixels are the pipeline's."""
    prompt = PROMPT.replace(". ", ". (", 1).replace(". ", ":1.4). ", 2).replace(":1.4). ", ". ", 1)
    picture = draw(room, prompt=prompt, weighting="a1111", steps=2)[-1]
    assert (prompt.count("("), picture.text) == (1, PROMPT)
    assert picture.report.readings[0].weights
    expected = pipe(
        prompt,
        weighting="a1111",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert picture.image.tobytes() == expected.tobytes() != draw(room, prompt=PROMPT, steps=2)[-1].image.tobytes()
    stock, long = (pipe.describe_prompt(prompt, how, "a1111").readings[0] for how in ("truncate", "stretch"))
    for html in (panels.meter(stock, long, prompt), panels.sentences(picture)):
        assert "1.4" not in html
    ((place, kind),) = panels.cuts(stock, long, prompt)
    assert (kind, prompt[place:].replace("(", "").replace(":1.4)", "")) == ("unread", stock.dropped)
    settings, _ = png_settings.settings_of(png_settings.to_png(picture, NAME))
    assert settings.weighting == "a1111"


@pytest.fixture(scope="module")
def xl_pipe(_stock_xl, finelip_folder):
    return FineLIPStableDiffusionXLPipeline(
        **_stock_xl.components, finelip=finelip_folder / "text_encoder", add_watermarker=False
    )


@pytest.mark.parametrize("long_prompt", LONG_PROMPTS)
def test_an_sdxl_is_drawn_and_listened_to_in_all_windows(xl_pipe, long_prompt):
    room = studio.Studio(lambda: xl_pipe, scenes=False)
    prompt = PROMPT + " " + example_prompts.SCENES["9 shapes"]  # two windows of 248
    *steps, picture = draw(room, prompt=prompt, long_prompt=long_prompt, steps=2, width=72, height=64, seed=3)
    plain = xl_pipe(
        prompt, long_prompt=long_prompt, num_inference_steps=2, guidance_scale=3.0, width=72, height=64,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(picture.image), np.asarray(plain))
    assert [step.preview.size for step in steps] == [(72, 64)] * 2
    html = panels.sentences(picture)
    spans = sentence_spans(prompt)
    unread = long_prompt == "truncate"
    assert ("(never read)" in html) == unread
    for start, stop in spans[:3] if unread else spans:
        heat = picture.maps.of(picture.report, start, stop)
        assert heat.shape == (64, 72)
        assert heat.min() < heat.max()
    assert panels.overlay(picture.image, heat).size == (576, 512)
    if unread:
        with pytest.raises(ValueError, match="no encoder reads"):
            picture.maps.of(picture.report, *spans[-1])


def test_20000_characters_are_drawn(room):
    picture = draw(room, prompt=("a red star in the very centre. " * 700)[:20_000], steps=1)[-1]
    assert len(picture.report.windows) > 10
    assert picture.maps.of(picture.report, 19_000, 19_900).shape == (96, 96)


def test_the_model_s_one_size_is_kept(room):
    with pytest.raises(ValueError, match="draws at 96 x 96 pixels alone"):
        draw(room, width=512)


def test_visits_and_maps_are_forgotten_oldest_first(room, monkeypatch):
    monkeypatch.setattr(studio, "MAX_VISITS", 3)
    monkeypatch.setattr(studio, "MAX_HEARD", 2)
    first = room.visit("0")
    for name in ("0", "1", "2", "0", "3"):
        room.visit(name)
    assert list(room._visits) == ["2", "0", "3"]
    assert room.visit("0") is first
    room.leave("0")
    assert first.stop.is_set()
    assert room.visit("0") is not first
    picture = draw(room, steps=1)[-1]
    for name in ("a", "b", "c"):
        room.remember(name, picture)
    assert (room.recall("a"), room.recall("c"), room.recall(["c"])) == (None, picture, None)


def test_the_line_is_first_come_first_served_and_says_how_many_come_first(room):
    order, told, jobs = [], {}, []

    def wait(name: str) -> None:
        for event in room.draw([page_settings.Settings(PROMPT, steps=1, guidance_scale=3.0)], threading.Event()):
            if isinstance(event, studio.Waiting):
                told.setdefault(name, []).append(event.before)
        order.append(name)

    with room._drawing:  # somebody draws
        for name in "abc":
            jobs.append(threading.Thread(target=wait, args=name))
            jobs[-1].start()
            while len(room.line._tickets) < len(jobs):
                time.sleep(0.01)
        while len(told) < 2:
            time.sleep(0.01)
    for job in jobs:
        job.join()
    assert (order, told) == (["a", "b", "c"], {"b": [1], "c": [2, 1]})
    assert not room.line._tickets


def test_whoever_stops_while_waiting_leaves_the_line_at_once(room):
    stop = threading.Event()
    with room._drawing:
        first = room.draw([page_settings.Settings(PROMPT, steps=1)], threading.Event())
        waits = ThreadPoolExecutor(1).submit(next, first)
        while not room.line._tickets:
            time.sleep(0.01)
        second = room.draw([page_settings.Settings(PROMPT)], stop)
        assert next(second).before == 1
        stop.set()
        with pytest.raises(studio.Stopped):
            next(second)
    assert isinstance(waits.result(), studio.Step)
    first.close()
    assert not room.line._tickets


def test_a_window_that_is_gone_stands_in_nobody_s_way():
    """Even where nothing ever asks its drawing for the next step again."""
    line, gone = studio.Line(1), threading.Event()
    line.enter(gone)
    line.enter(threading.Event())
    with pytest.raises(ValueError, match="The line is full: 1 requests wait already"):
        line.enter(threading.Event())
    gone.set()
    assert line.before(line.enter(threading.Event())) == 1


# ------------------------------------------------------------------------------------------------------------- album


def test_an_album_keeps_a_visitor_s_pictures_apart_and_in_order(room, tmp_path, monkeypatch):
    monkeypatch.setattr(album, "MAX_KEPT", 3)
    book = album.Album(tmp_path, NAME)
    picture = draw(room, steps=1)[-1]
    names = [book.add("one", picture, album.new_request(), "draw", 0).path.name for _ in range(4)]
    request = album.new_request()
    for number in range(2):
        book.add("two", picture, request, "compare", number)
    again = album.Album(tmp_path, NAME)  # another server
    assert [path.name for path in again.pictures("one")] == names[:0:-1]  # the oldest of four is gone
    assert [kept.path.name.split("-")[2] for kept in again.last("two")] == ["0", "1"]
    kept = again.open("one", names[-1])
    assert kept.image.tobytes() == picture.image.tobytes()
    assert kept.settings == replace(picture.settings, width=96, height=96)
    for stranger in ("two", "../one", ""):
        with pytest.raises(ValueError, match="no longer in the history"):
            again.open(stranger, names[-1])
    with pytest.raises(ValueError, match="no longer in the history"):
        again.open("one", f"../{again.pictures('two')[0].parent.name}/{again.pictures('two')[0].name}")
    assert again.pictures("nobody") == again.last("nobody") == []


def test_an_album_forgets_visitors_after_a_week(room, tmp_path):
    book, picture = album.Album(tmp_path, NAME), draw(room, steps=1)[-1]
    old = book.add("old", picture, album.new_request(), "draw", 0).path
    os.utime(old.parent, (time.time() - album.MAX_AGE - 60,) * 2)
    album.Album(tmp_path, NAME).add("new", picture, album.new_request(), "draw", 0)
    assert not old.exists()
    assert book.pictures("new")


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
    assert settings.width == settings.height == 96
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


# ------------------------------------------------------------------------------------------------------------ panels


def test_the_box_is_marked_where_an_encoder_stops(pipe):
    def readings(prompt):
        return [pipe.describe_prompt(prompt, how).readings[0] for how in ("truncate", "stretch")]

    stock, long = readings(PROMPT)
    ((place, kind),) = panels.cuts(stock, long, PROMPT)
    assert (kind, PROMPT[place:]) == ("unread", stock.dropped)
    html = panels.meter(stock, long, PROMPT)
    assert "185</b> of 77: 108 unread" in html
    assert "Stable Diffusion stops after “<bdi>… from the other shapes.</bdi>”" in html
    double = PROMPT * 2
    stock, long = readings(double)
    places = panels.cuts(stock, long, double)
    assert [kind for _, kind in places] == ["unread", "further"]
    assert places[1][0] == long.offsets[len(long.windows[0])][0]
    # Characters that a browser counts twice, and white space that nobody reads.
    smiling = " \n" + "😀" * 5 + PROMPT
    stock, long = readings(smiling.strip())
    ((place, _),) = panels.cuts(stock, long, smiling)
    assert smiling.encode("utf-16-le")[2 * place :].decode("utf-16-le") == stock.dropped
    for short in ("a red star", ""):
        stock, long = readings(short)
        assert panels.cuts(stock, long, short) == []
        assert "Every encoder reads all" in panels.meter(stock, long, short)


def test_the_reader_counts_what_it_finds_and_looks_at_the_background():
    judge = scene_reader.Reader()
    scene = sample_scene(15, "test", (8, 8))
    poor = type(scene)("mint", (*scene.objects[:3], replace(scene.objects[3], cell=free_cell(scene))))
    perfect = [("8 of 8 objects found", "yes"), (f"background {scene.background}", "yes")]
    assert judge.score(PROMPT, render(scene)) == perfect
    lines = [("3 of 8 objects found", ""), ("1 not asked for", "no")]
    assert judge.score(PROMPT, render(poor)) == [*lines, (f"background mint, not {scene.background}", "no")]
    html = judge.table(PROMPT, {"truncate": render(poor), "stretch": render(scene)})
    assert html.count("✗ <span>nothing") == 5
    assert html.count("✓") == 3 + 9
    assert html.count('class="open"') == 9  # the one that is not drawn yet
    assert "There is no table" in judge.table("A cat on a sofa.", {})
    assert judge.score("A cat.", render(scene)) == [(scene_reader.in_words(scene), "")]


def free_cell(scene) -> int:
    return next(cell for cell in range(9) if cell not in {item.cell for item in scene.objects})


def test_what_the_model_cannot_draw_is_said_before_it_is_drawn():
    judge = scene_reader.Reader()
    assert 'class="warning"' in judge.advice("A cat on a sofa.")
    for prompt in ("", PROMPT):
        assert "This small model draws" in judge.advice(prompt)


def test_the_example_is_what_the_model_draws(room):
    """Whoever changes the bundled model draws it again: python app/make_example.py."""
    kept = example.pictures()
    for name, picture in kept.items():
        expected = page_settings.Settings(example.PROMPT, guidance_scale=3.0, long_prompt=name, width=96, height=96)
        assert picture.settings == expected
    *_, drawn = room.draw([replace(kept["stretch"].settings)], threading.Event())
    difference = np.abs(np.asarray(drawn.image, float) - np.asarray(kept["stretch"].image, float))
    assert difference.mean() < 1  # of 255: other versions of torch add in another order
    settings, _ = png_settings.settings_of(example.SHEET.read_bytes())
    assert settings == kept["stretch"].settings
    html = example.shown(scene_reader.Reader())
    assert "Example" in html
    assert html.count("objects found") == 3


def test_a_comparison_is_one_labelled_picture(room, tmp_path):
    book, request = album.Album(tmp_path, NAME), album.new_request()
    kept = {}
    for number, name in enumerate(panels.COMPARED):
        kept[name] = book.add("one", draw(room, steps=1, long_prompt=name)[-1], request, "compare", number)
    plain = Image.open(BytesIO(comparison_sheet.sheet(kept, {}, kept["stretch"].settings, NAME)))
    content = comparison_sheet.sheet(kept, {name: ["a line"] for name in kept}, kept["stretch"].settings, NAME)
    noted = Image.open(BytesIO(content))
    assert (noted.width, noted.height) == (plain.width, plain.height + 26)
    left, top = comparison_sheet.MARGIN, comparison_sheet.MARGIN + 36
    side = comparison_sheet.SIDE
    for number, picture in enumerate(kept.values()):
        x = left + number * (side + left)
        inside = noted.crop((x, top, x + side, top + side)).resize(picture.image.size, Image.Resampling.NEAREST)
        assert inside.tobytes() == picture.image.tobytes()
    assert png_settings.settings_of(content)[0].prompt == PROMPT
    strange = replace(kept["stretch"].settings, prompt="猫" * 50)  # no letter of it is in the font
    without = Image.open(BytesIO(comparison_sheet.sheet(kept, {}, strange, NAME)))
    assert without.height < plain.height


@pytest.mark.parametrize("texts", [example_prompts.SCENES, example_prompts.PICTURES], ids=["scenes", "pictures"])
def test_there_are_six_examples_and_all_are_long(texts, tokenizer):
    assert len(texts) >= 6
    counts = [len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in texts.values()]
    assert all(count > 75 for count in counts), counts
    if texts is example_prompts.SCENES:
        objects = [len(find_facts(text).facts) for text in texts.values()]
        assert objects == [4, 5, 6, 7, 8, 9]


def test_an_overlay_keeps_its_colours_at_the_peak(pipe):
    image = Image.new("RGB", (96, 96), (20, 200, 20))
    heat = np.zeros((96, 96), np.float32)
    heat[:20, :20] = 1
    shown = np.asarray(panels.overlay(image, heat)).astype(int)
    assert shown.shape[0] >= 512
    assert np.ptp(shown[60, 30]) > 60  # in color
    assert np.ptp(shown[-10, -10]) == 0  # gray
    assert "in the top left corner" in panels.heard(heat, "x")


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("the value is 3\nbut must be 4"), "the value is 3 but must be 4"),
        (RuntimeError("CUDA out of memory"), "The GPU has not enough memory"),
        (MemoryError(), "There is not enough memory"),
        (KeyError("secret"), "That did not work (KeyError); the server's log says more."),
    ],
)
def test_whatever_goes_wrong_is_one_sentence(error, words):
    with pytest.raises(Error) as caught, readable():
        raise error
    assert caught.value.message.startswith(words)


# --------------------------------------------------------------------------------------------------------------- API


def test_the_api_draws_compares_and_listens(client, pipe):
    report = client.predict(prompt=PROMPT, long_prompt="truncate", api_name="/describe")
    assert report["tokens"] == 183
    assert report["dropped"] == pipe.describe_prompt(PROMPT, "truncate").dropped
    files = client.predict(prompt=PROMPT, steps=2, seed=3, num_images=2, api_name="/draw")
    assert [png_settings.settings_of(Path(file).read_bytes())[0].seed for file in files] == [3, 4]
    files = client.predict(prompt=PROMPT, steps=2, api_name="/compare")
    assert list(files) == ["truncate", "chunk", "stretch"]
    assert all(Image.open(file).size == (96, 96) for file in files.values())
    heard = client.predict(sentence=2, picture=2, api_name="/listen")
    assert heard["sentence"] in PROMPT
    assert np.asarray(heard["attention"]).shape == (96, 96)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"prompt": " ", "api_name": "/draw"}, "The prompt is empty"),
        ({"prompt": "x", "steps": 0, "api_name": "/draw"}, "Steps cannot be 0"),
        ({"prompt": "x", "seed": -4, "api_name": "/compare"}, "Seed cannot be -4"),
        ({"prompt": "x", "width": 512, "api_name": "/draw"}, "96 x 96 pixels alone"),
        ({"prompt": "x", "long_prompt": "../../etc", "api_name": "/describe"}, "long_prompt='../../etc' is unknown"),
        ({"sentence": 0, "picture": 99, "api_name": "/listen"}, "There is no picture 99"),
    ],
    ids=str,
)
def test_the_api_refuses_in_one_sentence(client, call, words):
    with pytest.raises(Exception) as caught:
        client.predict(**call)
    assert words in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_the_api_has_four_names_and_no_way_around_the_queue(client):
    names = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(names) == {"/describe", "/draw", "/compare", "/listen"}
    parameters = [parameter["parameter_name"] for parameter in names["/draw"]["parameters"]]
    assert parameters == ["prompt", *list(page_settings.as_record(page_settings.Settings("x")))[1:]]


def test_no_file_of_the_server_is_served_or_taken_in(page, client, capfd):
    """Neither by its address, nor as the file that somebody claims to have dropped."""
    (drop,) = [event["id"] for event in client.config["dependencies"] if "upload" in str(event["targets"])]
    for path in (ROOT / "README.md", ROOT / "app" / "app.py", "/etc/passwd"):
        with pytest.raises(HTTPError, match="403"):
            urlopen(f"{page}gradio_api/file={path}")
        data = [{"path": str(path), "meta": {"_type": "gradio.FileData"}}]
        asked = json.dumps({"data": data, "fn_index": drop, "session_hash": "anybody"}).encode()
        with pytest.raises(HTTPError, match="500"):
            urlopen(Request(f"{page}gradio_api/run/predict", asked, {"Content-Type": "application/json"}))
        assert "not uploaded by a user" in capfd.readouterr().err


def test_two_clients_hear_their_own_pictures(page, client):
    client.predict(prompt="A red star. " + PROMPT, steps=1, api_name="/draw")
    other = connect(page)
    with pytest.raises(Exception, match="this client's last drawing has 0"):
        other.predict(sentence=0, api_name="/listen")
    assert client.predict(sentence=0, api_name="/listen")["sentence"] == "A red star."


def test_many_clients_at_once_lose_nothing(page):
    """As the script does that measured 20 clients and 1,800 requests for docs/app.md."""
    spec = importlib.util.spec_from_file_location("page_load", ROOT / "benchmarks" / "page_load.py")
    page_load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page_load)
    clients = [connect(page) for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(lambda seed: page_load.ask(clients[seed % 20], seed), range(20)))
    assert not page_load.ask(Other(clients[0]), 7)


class Other:
    """A client whose pictures are those of the next seed."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def predict(self, *, seed: int, **call):
        return self.client.predict(seed=seed + 1, **call)


def test_a_full_queue_says_so(pipe):
    demo = app.build_demo(pipe, max_queue=1)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.look())
    try:
        client = connect(url)
        jobs = [client.submit(prompt=PROMPT, steps=10, api_name="/draw") for _ in range(6)]
        words = [str(error) for error in (job.exception() for job in jobs) if error is not None]
        assert 0 < len(words) < 6
        assert all("The line is full: 1 requests wait already" in word for word in words)
    finally:
        demo.close()


# ------------------------------------------------------------------------------------------------------------ script


def test_time_is_counted_for_drawing_not_for_waiting(room):
    with room._drawing:
        began = time.perf_counter()
        drawing = room.draw([page_settings.Settings(PROMPT, steps=1, guidance_scale=3.0)], threading.Event())
        waiting = ThreadPoolExecutor(1).submit(list, drawing)
        time.sleep(1)
    assert waiting.result()[-1].seconds <= time.perf_counter() - began - 1


def test_building_a_page_loads_nothing_and_tells_nobody():
    demo = app.build_demo(lambda: 1 / 0)
    assert not demo.analytics_enabled
    assert not analytics.analytics_enabled()


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """The Space in a folder of its own."""
    subprocess.run(["make", "space"], cwd=ROOT, check=True, capture_output=True)
    return shutil.move(ROOT / "build" / "space", tmp_path_factory.mktemp("space") / "space")


def test_a_space_is_complete(space):
    front = (space / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in front
    assert "app_file: app.py" in front
    project = (ROOT / "pyproject.toml").read_text()
    declared = project.split("\ndependencies = [")[1].split("]")[0].replace('"', "").replace(",", "").split()
    declared += [part.strip().strip('"') for part in project.split("\napp = [")[1].split("]")[0].split(",")]
    declared = [part for part in declared if not part.startswith("gradio")]  # a Space has it
    assert (space / "requirements.txt").read_text().split() == declared


def check_a_model_of_folders(url: str, model: Path) -> None:
    """Counting, drawing at a size of one's own, and listening to the last sentence."""
    client = connect(url)
    report = client.predict(prompt=PROMPT, api_name="/describe")
    assert (report["tokens"], report["dropped"]) == (183, "")
    (file,) = client.predict(prompt=PROMPT, steps=1, width=64, height=72, api_name="/draw")
    settings, name = png_settings.settings_of(Path(file).read_bytes())
    assert (settings.width, settings.height, name) == (64, 72, str(model))
    last = len(sentence_spans(PROMPT)) - 1
    assert np.shape(client.predict(sentence=last, api_name="/listen")["attention"]) == (72, 64)


def test_an_sdxl_of_the_command_line_as_a_user_starts_it(space, stable_diffusion_xl_folder, finelip_folder):
    """In the Space, whose package is the one beside the page."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "GRADIO_SERVER_PORT")}
    command = [sys.executable, "-u", "app.py", "--model", str(stable_diffusion_xl_folder)]
    command += ["--finelip", str(finelip_folder / "text_encoder")]
    with subprocess.Popen(command, cwd=space, env=environment, text=True, stdout=subprocess.PIPE) as server:
        try:
            url = next(match[0] for line in server.stdout if (match := re.search(r"http://\S+", line)))
            check_a_model_of_folders(url, stable_diffusion_xl_folder)
        finally:
            server.terminate()


def test_a_stable_diffusion_of_folders(stable_diffusion_folder, finelip_folder):
    demo = app.build_demo(
        lambda: load_pipeline(str(stable_diffusion_folder), str(finelip_folder)),
        name=str(stable_diffusion_folder),
        scenes=False,
    )
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.look())
    try:
        check_a_model_of_folders(url, stable_diffusion_folder)
    finally:
        demo.close()


def test_the_example_of_the_documentation_runs(page, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "app.md").read_text(encoding="utf-8")
    code = text.split("from gradio_client import Client", 1)[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(
        "from gradio_client import Client" + code.replace("http://127.0.0.1:7860", page).replace("steps=20", "steps=1")
    )
