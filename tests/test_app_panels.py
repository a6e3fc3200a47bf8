"""What the page shows: marks and counts, the reader's verdict, the example, overlays, and errors in a sentence."""

import threading
from dataclasses import replace

import example
import example_prompts
import numpy as np
import panels
import png_settings
import pytest
import scene_reader
import settings as page_settings
from actions import readable
from gradio import Error
from PIL import Image
from test_app_drawing import PROMPT

from finelip_diffusion.scenes import IMAGE_SIZE, find_facts, render, sample_scene


def test_the_box_is_marked_where_an_encoder_stops(bundled_pipe):
    def readings(prompt):
        return [bundled_pipe.describe_prompt(prompt, how).readings[0] for how in ("truncate", "stretch")]

    stock, long = readings(PROMPT)
    ((place, kind),) = panels.cuts(stock, long, PROMPT)
    assert (kind, PROMPT[place:]) == ("unread", stock.dropped)
    html = panels.meter(stock, long, PROMPT)
    assert f"{stock.tokens + 2}</b> of 77: {stock.tokens - 75} unread" in html
    read = PROMPT[: -len(stock.dropped)].split()
    assert f"Stable Diffusion stops after “<bdi>… {' '.join(read[-4:])}</bdi>”" in html
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
        expected = page_settings.Settings(
            example.PROMPT, guidance_scale=3.0, long_prompt=name, width=IMAGE_SIZE, height=IMAGE_SIZE
        )
        assert picture.settings == expected
    *_, drawn = room.draw([replace(kept["stretch"].settings)], threading.Event())
    difference = np.abs(np.asarray(drawn.image, float) - np.asarray(kept["stretch"].image, float))
    assert difference.mean() < 1  # of 255: other versions of torch add in another order
    settings, _ = png_settings.settings_of(example.SHEET.read_bytes())
    assert settings == kept["stretch"].settings
    html = example.shown(scene_reader.Reader())
    assert "Example" in html
    assert html.count("objects found") == 3


@pytest.mark.parametrize("texts", [example_prompts.SCENES, example_prompts.PICTURES], ids=["scenes", "pictures"])
def test_there_are_six_examples_and_all_are_long(texts, tokenizer):
    assert len(texts) >= 6
    counts = [len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in texts.values()]
    assert all(count > 75 for count in counts), counts
    if texts is example_prompts.SCENES:
        objects = [len(find_facts(text).facts) for text in texts.values()]
        assert objects == [4, 5, 6, 7, 8, 9]


def test_an_overlay_keeps_its_colors_at_the_peak(bundled_pipe):
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (20, 200, 20))
    heat = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    heat[:20, :20] = 1
    shown = np.asarray(panels.overlay(image, heat)).astype(int)
    assert shown.shape[0] >= 512
    assert np.ptp(shown[60, 30]) > 60  # in color
    assert np.ptp(shown[-10, -10]) == 0  # gray
    assert "in the top left corner" in panels.heard(heat, "x")


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
