"""Captioned images as published, written by the tests."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def colour(number: int) -> tuple[int, int, int]:
    return (40 * number % 256, 255 - 40 * number % 256, 128)


def image_bytes(number: int, kind: str = "PNG", size: tuple[int, int] = (12, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour(number)).save(file, kind)
    return file.getvalue()


def write_images(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image_bytes(number, "JPEG" if name.endswith("jpg") else "PNG"))


def write_lines(file: Path, rows: list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def write_shard(file: Path, examples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(file, "w") as tar:
        for key, parts in examples.items():
            for extension, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def summary(dataset) -> list[tuple[str, str, tuple[int, int]]]:
    return [(example.caption, example.image_id, example.image.size) for example in dataset]
