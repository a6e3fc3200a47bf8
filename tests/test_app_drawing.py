"""The page's studio: drawing step by step, stopping, a line of requests, and who drew what."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import example_prompts
import numpy as np
import panels
import png_settings
import pytest
import settings as page_settings
import studio
import torch
from actions import Actions

from finelip_diffusion import FineLIPStableDiffusionXLPipeline
from finelip_diffusion.prompts import LONG_PROMPTS, sentence_spans
from finelip_diffusion.scenes import IMAGE_SIZE

NAME = "a model <b>of scenes</b>"

PROMPT = example_prompts.SCENES["8 shapes"]


def draw(room: studio.Studio, **options) -> list:
    settings = page_settings.Settings(**{"prompt": PROMPT, "steps": 3, "guidance_scale": 3.0, **options})
    return list(room.draw([settings], threading.Event()))


def test_the_page_draws_the_pixels_of_the_pipeline(room, bundled_pipe):
    events = draw(room, seed=5, num_images=2, negative_prompt="blurry")
    pictures = [event for event in events if isinstance(event, studio.Picture)]
    for seed, picture in zip((5, 6), pictures, strict=True):
        generator = torch.Generator().manual_seed(seed)
        plain = bundled_pipe(
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
def test_stopping_ends_the_work_after_the_step_under_way(room, bundled_pipe, how):
    before, calls = bundled_pipe.unet.forward, []
    bundled_pipe.unet.forward = lambda *args, **kwargs: calls.append(1) or before(*args, **kwargs)
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
        bundled_pipe.unet.forward = before
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
def test_any_text_is_drawn_and_shown_as_text(room, bundled_pipe, prompt, long_prompt):
    picture = draw(room, prompt=prompt, long_prompt=long_prompt, steps=1)[-1]
    settings, _ = png_settings.settings_of(png_settings.to_png(picture, NAME))
    assert settings == replace(picture.settings, width=IMAGE_SIZE, height=IMAGE_SIZE)
    stock, long = (
        bundled_pipe.describe_prompt(picture.settings.prompt, how).readings[0] for how in ("truncate", "stretch")
    )
    assert "<script>" not in panels.meter(stock, long, prompt) + panels.sentences(picture)


def test_weights_are_drawn_read_and_listened_to(room, bundled_pipe):
    """Everything that shows the prompt shows it without brackets; the pixels are the pipeline's."""
    prompt = PROMPT.replace(". ", ". (", 1).replace(". ", ":1.4). ", 2).replace(":1.4). ", ". ", 1)
    picture = draw(room, prompt=prompt, weighting="a1111", steps=2)[-1]
    assert (prompt.count("("), picture.text) == (1, PROMPT)
    assert picture.report.readings[0].weights
    expected = bundled_pipe(
        prompt,
        weighting="a1111",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert picture.image.tobytes() == expected.tobytes() != draw(room, prompt=PROMPT, steps=2)[-1].image.tobytes()
    stock, long = (bundled_pipe.describe_prompt(prompt, how, "a1111").readings[0] for how in ("truncate", "stretch"))
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
    assert picture.maps.of(picture.report, 19_000, 19_900).shape == (IMAGE_SIZE, IMAGE_SIZE)


def test_the_model_s_one_size_is_kept(room):
    with pytest.raises(ValueError, match=f"draws at {IMAGE_SIZE} x {IMAGE_SIZE} pixels alone"):
        draw(room, width=512)


def test_visits_and_maps_are_forgotten_oldest_first(room, monkeypatch):
    monkeypatch.setattr(studio, "MAX_VISITS", 3)
    monkeypatch.setattr(studio, "MAX_HEARD", 2)
    first = room.visit("0")
    for name in ("0", "1", "2", "0", "3"):
        room.visit(name)
    assert list(room._visits) == ["2", "0", "3"]
    assert room.visit("0") is first
    picture = draw(room, steps=1)[-1]
    for name in ("a", "b", "c"):
        room.remember(name, picture)
    assert (room.recall("a"), room.recall("c"), room.recall(["c"])) == (None, picture, None)


def test_a_window_that_closes_between_the_click_and_the_drawing_draws_nothing(room):
    actions = Actions(room, None, None, page_settings.as_record(page_settings.Settings("x")))
    window = SimpleNamespace(session_hash="closed")
    actions.begin(window)
    actions.leave(window)
    values = page_settings.as_record(page_settings.Settings(PROMPT, steps=3)).values()
    told, *_ = list(actions.draw(window, None, False, *values))
    assert "Stopped." in told[0]
    assert room._pipe is None


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


def test_time_is_counted_for_drawing_not_for_waiting(room):
    with room._drawing:
        began = time.perf_counter()
        drawing = room.draw([page_settings.Settings(PROMPT, steps=1, guidance_scale=3.0)], threading.Event())
        waiting = ThreadPoolExecutor(1).submit(list, drawing)
        time.sleep(1)
    assert waiting.result()[-1].seconds <= time.perf_counter() - began - 1
