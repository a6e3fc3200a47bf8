"""Draws the example that the page shows first, on the bundled model, into app/example.

    python app/make_example.py

Run it again when the bundled model, its long encoder or the example's prompt has changed; a test compares the files
with what the model draws.
"""

import logging
import threading

import example
from album import Kept
from comparison_sheet import sheet
from panels import COMPARED
from png_settings import to_png
from scene_reader import Reader
from settings import Settings
from studio import Picture, Studio

from finelip_diffusion import FineLIPStableDiffusionPipeline
from finelip_diffusion.files import writing


def main() -> None:
    """Draws, writes, and says what was found."""
    logging.getLogger("finelip_diffusion").setLevel(logging.ERROR)  # the example is about what is dropped
    studio, reader = Studio(FineLIPStableDiffusionPipeline.from_pretrained, scenes=True), Reader()
    requests = [Settings(example.PROMPT, guidance_scale=3.0, long_prompt=name) for name in COMPARED]
    kept = {}
    for event in studio.draw(requests, threading.Event()):
        if isinstance(event, Picture):
            name = event.settings.long_prompt
            kept[name] = Kept(example.FOLDER / f"{name}.png", event.image, event.settings)
            with writing(kept[name].path) as path:
                path.write_bytes(to_png(event, "bundled"))
    notes = {name: [line for line, _ in reader.score(item.settings.text, item.image)] for name, item in kept.items()}
    with writing(example.SHEET) as path:
        path.write_bytes(sheet(kept, notes, kept["stretch"].settings, "bundled"))
    for name, lines in notes.items():
        print(f"{name}: {', '.join(lines)}")


if __name__ == "__main__":
    main()
