"""The page's API: the same drawing without a browser; each method is one call, with its parameters' names."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
from actions import FORGOTTEN, heard_in, readable
from album import Album, new_request
from panels import COMPARED
from settings import Settings, checked_text
from studio import Picture, Studio


class Api:
    """What gradio's clients call.

    Args:
        studio: Draws.
        album: Keeps what is drawn.
    """

    def __init__(self, studio: Studio, album: Album) -> None:
        self.studio, self.album = studio, album

    def describe(self, prompt: str, long_prompt: str = "stretch", weighting: str = "plain") -> dict:
        """What a text encoder reads of a prompt: tokens, windows, and the text that is dropped."""
        with readable():
            report = self.studio.describe(checked_text(prompt, "prompt"), long_prompt, weighting)
        return {
            "tokens": report.tokens,
            "long_prompt": report.long_prompt,
            "windows": list(report.windows),
            "dropped": report.dropped,
            "report": str(report),
        }

    def draw(
        self,
        request: gr.Request,
        prompt: str,
        negative_prompt: str = "",
        steps: int = 20,
        guidance_scale: float = 3.0,
        seed: int = 0,
        num_images: int = 1,
        long_prompt: str = "stretch",
        weighting: str = "plain",
        width: int | None = None,
        height: int | None = None,
    ) -> list:
        """Draws a prompt: PNG files with the prompt and all settings inside, one for each seed from `seed` on."""
        with readable():
            settings = Settings(
                prompt, negative_prompt, steps, guidance_scale, seed, num_images, long_prompt, weighting, width, height
            )
            return self._drawn(request, "draw", [settings])

    def compare(
        self,
        request: gr.Request,
        prompt: str,
        negative_prompt: str = "",
        steps: int = 20,
        guidance_scale: float = 3.0,
        seed: int = 0,
    ) -> dict:
        """Draws a prompt from the same noise under `truncate`, `chunk` and `stretch`: a PNG file for each."""
        with readable():
            settings = Settings(prompt, negative_prompt, steps, guidance_scale, seed)
            files = self._drawn(request, "compare", [replace(settings, long_prompt=name) for name in COMPARED])
            return dict(zip(COMPARED, files, strict=True))

    def listen(self, request: gr.Request, sentence: int, picture: int = 0) -> dict:
        """Where the UNet looked for a sentence (from 0) of the picture (from 0) that this client drew last."""
        with readable():
            drawn = self.studio.visit(request.session_hash).drawn
            if not 0 <= picture < len(drawn):
                raise ValueError(f"There is no picture {picture}: this client's last drawing has {len(drawn)}.")
            if (remembered := self.studio.recall(drawn[picture])) is None:
                raise ValueError(FORGOTTEN)
            heat, text = heard_in(remembered, sentence)
            return {"sentence": text, "attention": heat.round(6).tolist()}

    def _drawn(self, request: gr.Request, kind: str, requests: Sequence[Settings]) -> list[dict[str, Any]]:
        """Files of the pictures, as gradio's clients take them."""
        session = request.session_hash or ""
        stop, name = self.studio.join(session), new_request()
        kept: list[Any] = []
        for event in self.studio.draw(requests, stop):
            if isinstance(event, Picture):
                kept.append(self.album.add(session, event, name, kind, len(kept)).path)
                self.studio.remember(kept[-1].name, event)
        self.studio.visit(session).drawn = tuple(path.name for path in kept)
        return [{"path": str(path), "meta": {"_type": "gradio.FileData"}} for path in kept]
