"""Tar shards: which there are, every example once, whoever reads them, and where they are broken."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
from captioned_files import colour, image_bytes, write_shard

from finelip_diffusion.data.datasets import (
    TarDataset,
    open_dataset,
)
from finelip_diffusion.data.sources import expand_shards


@pytest.fixture
def shards(tmp_path) -> list[str]:
    """Four shards of six examples; a broken image, a missing caption and an empty one among them."""
    for shard in range(4):
        examples: dict[str, dict[str, bytes]] = {}
        for place in range(6):
            number = 6 * shard + place
            parts = {"png": image_bytes(number), "txt": f"Caption {number}.".encode()}
            if number == 3:
                parts["png"] = parts["png"][:40]
            if number == 8:
                parts["txt"] = b" \n"
            if number == 9:
                del parts["txt"]
            if number == 14:
                parts = {"jpg": image_bytes(number, "JPEG"), "json": b'{"captions": ["Caption 14.", "Caption 14."]}'}
            if number == 20:
                parts["txt.old"] = b"belongs to the same example"
            examples[f"{number:06d}"] = parts
        write_shard(tmp_path / f"data-{shard:03d}.tar", examples)
    return [str(tmp_path / f"data-{shard:03d}.tar") for shard in range(4)]


def test_shards_of_globs_and_braces(shards, tmp_path):
    assert expand_shards(f"{tmp_path}/*.tar") == expand_shards(f"{tmp_path}/data-{{000..003}}.tar") == shards
    assert expand_shards(f"{tmp_path}/data-00{{1,3}}.tar") == [shards[1], shards[3]]
    assert expand_shards(f"{tmp_path}/data-{{002..004}}.tar")[-1].endswith("data-004.tar")  # missing: bad data
    assert isinstance(open_dataset(f"{tmp_path}/*.tar"), TarDataset)


def test_an_epoch_of_a_stream_holds_every_example_once(shards):
    dataset = TarDataset(shards, seed=3)
    examples = list(itertools.islice(dataset, 48))
    good = {f"Caption {n}." for n in range(24)} - {f"Caption {n}." for n in (3, 8, 9)}
    for epoch in (examples[:24], examples[24:]):
        counts = Counter(example.caption for example in epoch)
        assert set(counts) == good and sum(counts.values()) == 24
    reasons = {skip.name.rpartition(":")[2]: skip.reason for example in examples for skip in example.skipped}
    assert reasons["000003"].startswith("unreadable image")
    assert (reasons["000008"], reasons["000009"]) == ("empty caption", "no caption: neither txt nor json is there")
    assert [e.caption for e in examples[:24]] != [e.caption for e in examples[24:]]
    assert [e.name for e in itertools.islice(TarDataset(shards, seed=3), 48)] == [e.name for e in examples]
    by_caption = {example.caption: example.image for example in examples}
    assert all(by_caption[f"Caption {n}."].getpixel((0, 0)) == colour(n) for n in (0, 7, 23))


def test_a_stream_is_split_among_readers_and_resumed_anywhere(shards):
    dataset = TarDataset(shards, seed=1)
    seen: set[str] = set()
    for reader in range(2):
        names = [example.name for example in itertools.islice(dataset.examples(reader, 2), 12)]
        assert not seen & set(names)
        seen |= set(names)
    assert len(seen) == 21
    straight = [(e.name, e.draw) for e in itertools.islice(dataset.examples(1, 2), 40)]
    for skip in range(30):
        resumed = [(e.name, e.draw) for e in itertools.islice(dataset.examples(1, 2, skip), 10)]
        assert resumed == straight[skip : skip + 10]


@pytest.mark.parametrize("cut", [0, 100, 512, 600])
def test_broken_shards_are_named(shards, tmp_path, cut):
    (tmp_path / "data-000.tar").write_bytes(b"no tar")
    whole = (tmp_path / "data-001.tar").read_bytes()
    (tmp_path / "data-001.tar").write_bytes(whole[: 4 * 1024 + cut])  # two examples, and more or less of the third
    (tmp_path / "data-002.tar").unlink()
    examples = list(itertools.islice(TarDataset(shards), 60))
    reasons = {Path(skip.name).name: skip.reason.split(":")[0] for example in examples for skip in example.skipped}
    assert reasons["data-000.tar"] == reasons["data-001.tar"] == "broken shard"
    assert reasons["data-002.tar"] == "missing file"
    assert {f"Caption {n}." for n in (6, 7, *range(18, 24))} <= {example.caption for example in examples}
    for shard in shards[1:]:
        write_shard(Path(shard), {})
    with pytest.raises(ValueError, match="cannot be used"):
        next(iter(TarDataset(shards[:1])))
    with pytest.raises(ValueError, match="finds no example"):
        next(iter(TarDataset(shards[1:])))
