"""Finished pictures as PNG files, a folder for each visitor: they survive a reload and a restart of the server."""

import hashlib
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image
from png_settings import settings_of, to_png
from settings import Settings
from studio import Picture

from finelip_diffusion.files import writing

MAX_KEPT = 60  # pictures of one visitor, the latest ones
MAX_AGE = 7 * 86_400  # seconds after which a visitor's last picture is deleted
NAME = re.compile(r"\d{20}-(draw|compare)-\d-[a-z]+-seed\d+\.png")


@dataclass(frozen=True)
class Kept:
    """A picture in the album.

    Attributes:
        path: Its file.
        image: The picture.
        settings: How it was drawn.
    """

    path: Path
    image: Image.Image
    settings: Settings

    @property
    def request(self) -> str:
        """What the pictures of one drawing have in common."""
        return self.path.name[:20]

    @property
    def comparison(self) -> Path:
        """Where the labelled comparison lies that it belongs to."""
        return self.path.with_name(f"{self.request}-comparison.png")

    @property
    def kind(self) -> str:
        """`"draw"` or `"compare"`."""
        return self.path.name.split("-")[1]

    @property
    def address(self) -> str:
        """Where the page finds the file, below its own address."""
        return address(self.path)


def address(path: Path) -> str:
    """Where the page finds a file that gradio serves."""
    return "gradio_api/file=" + quote(path.as_posix())


def new_request() -> str:
    """A name for a drawing; later ones sort after earlier ones."""
    return f"{time.time_ns():020}"


class Album:
    """The pictures of all visitors.

    Args:
        folder: Where they lie; gradio has to serve it.
        model: The model's name, which the PNGs hold.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model
        self._looked = 0.0

    def add(self, visitor: str, picture: Picture, request: str, kind: str, number: int) -> Kept:
        """Writes a picture, and deletes what is too old."""
        settings = picture.settings
        path = self._of(visitor) / f"{request}-{kind}-{number}-{settings.long_prompt}-seed{settings.seed}.png"
        self.write(path, to_png(picture, self.model))
        for old in self.pictures(visitor)[MAX_KEPT:]:
            old.unlink(missing_ok=True)
            old.with_name(f"{old.name[:20]}-comparison.png").unlink(missing_ok=True)
        self._forget()
        return Kept(path, picture.image, settings)

    def write(self, path: Path, content: bytes) -> None:
        """Writes a file of an album, atomically."""
        with writing(path) as part:
            part.write_bytes(content)

    def pictures(self, visitor: str) -> list[Path]:
        """Files of a visitor's pictures, newest first."""
        folder = self._of(visitor)
        found = [path for path in folder.glob("*.png") if NAME.fullmatch(path.name)] if folder.is_dir() else []
        order = {path: (path.name[:20], -int(path.name.split("-")[2])) for path in found}
        return sorted(found, key=order.__getitem__, reverse=True)

    def open(self, visitor: str, name: str) -> Kept:
        """A picture of a visitor.

        Raises:
            ValueError: If it is not in the album.
        """
        path = self._of(visitor) / name
        if not NAME.fullmatch(name) or not path.is_file():
            raise ValueError("This picture is no longer in the history: pictures are kept for a week.")
        content = path.read_bytes()
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
        return Kept(path, image, settings_of(content)[0])

    def last(self, visitor: str) -> list[Kept]:
        """The pictures of a visitor's last drawing, in order."""
        names = [path.name for path in self.pictures(visitor)]
        return [self.open(visitor, name) for name in names if name[:20] == names[0][:20]]

    def _of(self, visitor: str) -> Path:
        """A visitor's folder; its name, which addresses hold, does not give the visitor away."""
        return self.folder / hashlib.sha256(visitor.encode("utf-8", "replace")).hexdigest()[:32]

    def _forget(self) -> None:
        """Deletes, at most once an hour, the folders in which nothing was written for `MAX_AGE`."""
        now = time.time()
        if now - self._looked < 3600:
            return
        self._looked = now
        for folder in self.folder.iterdir():
            if now - folder.stat().st_mtime > MAX_AGE:
                shutil.rmtree(folder, ignore_errors=True)
