"""Finished pictures: an album for each visitor, and three pictures as one."""

import os
import time
from dataclasses import replace
from io import BytesIO

import album
import comparison_sheet
import panels
import png_settings
import pytest
from PIL import Image
from test_app_drawing import NAME, PROMPT, draw

from finelip_diffusion.scenes import IMAGE_SIZE


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
    assert kept.settings == replace(picture.settings, width=IMAGE_SIZE, height=IMAGE_SIZE)
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
    side = IMAGE_SIZE * -(-comparison_sheet.SIDE // IMAGE_SIZE)
    for number, picture in enumerate(kept.values()):
        x = left + number * (side + left)
        inside = noted.crop((x, top, x + side, top + side)).resize(picture.image.size, Image.Resampling.NEAREST)
        assert inside.tobytes() == picture.image.tobytes()
    assert png_settings.settings_of(content)[0].prompt == PROMPT
    strange = replace(kept["stretch"].settings, prompt="猫" * 50)  # no letter of it is in the font
    without = Image.open(BytesIO(comparison_sheet.sheet(kept, {}, strange, NAME)))
    assert without.height < plain.height
