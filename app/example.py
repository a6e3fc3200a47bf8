"""The comparison that the page shows first; `make_example.py` draws it ahead, on the bundled model."""

import base64
from pathlib import Path

import results
from album import Kept
from example_prompts import SCENES
from panels import COMPARED, STRATEGIES
from PIL import Image
from png_settings import settings_of
from scene_reader import Reader

FOLDER = Path(__file__).with_name("example")
SHEET = FOLDER / "comparison.png"
PROMPT = SCENES["8 shapes"]


def pictures() -> dict[str, Kept]:
    """The pictures drawn ahead, by strategy."""
    found = {}
    for name in COMPARED:
        path = FOLDER / f"{name}.png"
        with Image.open(path) as image:
            image.load()
        found[name] = Kept(path, image, settings_of(path.read_bytes())[0])
    return found


def shown(reader: Reader) -> str:
    """The example as the page shows it; its files are part of the page."""
    kept = pictures()
    settings = kept["stretch"].settings
    frames = [
        results.finished(STRATEGIES[name], picture, reader, _data_uri(picture.path)) for name, picture in kept.items()
    ]
    line = (
        '<span class="own"><b class="badge">Example</b> Drawn ahead from the prompt in the box, three times from the '
        'same noise. Compare draws yours.</span><span class="other"><b class="badge">Example</b> This was drawn from '
        "another prompt than the one in the box. Compare draws yours.</span>"
    )
    below = results.save_comparison(_data_uri(SHEET), settings.seed)
    below += reader.table(settings.text, {name: picture.image for name, picture in kept.items()})
    return results.frames(frames, line, below, settings.prompt)


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
