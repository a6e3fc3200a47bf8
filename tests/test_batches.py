"""The order of examples over steps, processes and workers, and the tensors of a batch, decoded again."""

import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from finelip_diffusion.data.batches import BUCKET_WINDOW, Collator, StepSampler, make_loader
from finelip_diffusion.data.datasets import Example, ScenesDataset, TarDataset, open_dataset
from finelip_diffusion.data.sources import Skip
from finelip_diffusion.scenes import IMAGE_SIZE, render, sample_scene


@pytest.fixture(scope="session")
def image_processor() -> CLIPImageProcessor:
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def take(sampler: StepSampler, number: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(sampler, number))


def padding(lengths: np.ndarray, batches: list[list[tuple[int, int]]]) -> int:
    return sum(max(lengths[i] for i, _ in batch) * len(batch) - sum(lengths[i] for i, _ in batch) for batch in batches)


def equal(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[k], other[k]) if torch.is_tensor(one[k]) else one[k] == other[k] for k in one)


# ------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("bucket", [False, True])
def test_an_epoch_is_a_permutation_and_the_next_another(group_size, bucket):
    lengths = np.random.default_rng(0).integers(10, 240, 103) if bucket else None
    sampler = StepSampler(103, 8, seed=5, group_size=group_size, lengths=lengths)
    assert sampler.steps_per_epoch == 12
    batches = take(sampler, 24)
    for epoch in (batches[:12], batches[12:]):
        indices = [index for batch in epoch for index, _ in batch]
        assert len(set(indices)) == len(indices) == 96
        for batch in epoch:
            for first in range(0, 8, group_size):
                group = [index for index, _ in batch[first : first + group_size]]
                assert group == list(range(group[0], group[0] + group_size)) and group[0] % group_size == 0
    assert batches[:12] != batches[12:]
    draws = [draw for batch in batches for _, draw in batch]
    assert len(set(draws)) == len(draws)  # the second epoch draws anew
    assert take(StepSampler(103, 8, 6, group_size=group_size, lengths=lengths), 12) != batches[:12]


@pytest.mark.parametrize("bucket", [False, True])
def test_processes_share_the_joint_batch_of_one(bucket):
    lengths = list(range(100)) if bucket else None
    joint = take(StepSampler(100, 24, 1, group_size=4, lengths=lengths), 9)
    ranks = [take(StepSampler(100, 8, 1, rank, 3, group_size=4, lengths=lengths), 9) for rank in range(3)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == joint


def test_a_resumed_sampler_goes_on_at_any_step():
    straight = take(StepSampler(50, 7, 2, lengths=range(50)), 30)
    for first in range(25):
        assert take(StepSampler(50, 7, 2, first_step=first, lengths=range(50)), 5) == straight[first : first + 5]


def test_bucketing_keeps_the_examples_of_an_epoch_and_lowers_padding():
    lengths = np.random.default_rng(0).integers(10, 240, 3000)
    plain, bucketed = StepSampler(3000, 16, 3), StepSampler(3000, 16, 3, lengths=lengths)
    one, other = take(plain, 187), take(bucketed, 187)
    assert {pair for batch in one for pair in batch} == {pair for batch in other for pair in batch}
    assert padding(lengths, other) < 0.1 * padding(lengths, one)
    longest = [max(lengths[i] for i, _ in batch) for batch in other]
    # short and long batches alternate: half of the windows' batches would stand in order otherwise
    assert BUCKET_WINDOW < 187 and np.abs(np.diff(longest)).mean() > 40


def test_too_little_data_and_cut_groups_are_refused():
    with pytest.raises(ValueError, match="15 examples do not fill a batch of 16 .8 in each of 2 processes."):
        StepSampler(15, 8, world_size=2)
    with pytest.raises(ValueError, match="a batch of 12 cuts groups of 8"):
        StepSampler(100, 12, group_size=8)


# ----------------------------------------------------------------------------------------------------------- loaders


def write_shards(folder: Path, number: int = 4) -> list[str]:
    for shard in range(number):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for place in range(7):
                image = io.BytesIO()
                Image.new("RGB", (8, 8), (7 * shard + place, 0, 0)).save(image, "PNG")
                data = image.getvalue()[: 30 if place == 2 else None]  # one in seven is broken
                for extension, part in (("png", data), ("txt", f"Caption {shard} {place}.".encode())):
                    member = tarfile.TarInfo(f"{place}.{extension}")
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))
    return [str(folder / f"{shard}.tar") for shard in range(number)]


def load(dataset, number: int, collator: Collator, batch_size: int = 8, **options) -> list[dict]:
    return list(itertools.islice(make_loader(dataset, collator, batch_size, **options), number))


def test_workers_change_nothing(tokenizer, image_processor):
    collator = Collator(tokenizer, image_processor, "debias", kept_prompts="short")
    dataset = ScenesDataset(num_scenes=64)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    alone = load(dataset, 10, collator, bucket_by_length=True)
    workers = load(dataset, 6, collator, bucket_by_length=True, num_workers=2, first_step=4)  # into the next epoch
    assert all(map(equal, alone[4:], workers))
    assert torch.equal(torch.get_rng_state(), state)


def test_processes_see_the_joint_batch_of_one(tokenizer, image_processor):
    collator, dataset = Collator(tokenizer, image_processor, "sub_captions"), ScenesDataset(num_scenes=48)
    joint = load(dataset, 2, collator, 16)
    ranks = [load(dataset, 2, collator, 8, rank=rank, world_size=2) for rank in range(2)]
    for step in range(2):
        for name in ("pixel_values", "image_ids", "sub_spans"):
            assert torch.equal(torch.cat([rank[step][name] for rank in ranks]), joint[step][name])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_is_resumed_at_any_step(tmp_path, tokenizer, image_processor, num_workers):
    dataset = TarDataset(write_shards(tmp_path), seed=2)
    collator = Collator(tokenizer, image_processor)
    options = {"num_workers": num_workers, "rank": 1, "world_size": 2}
    straight = load(dataset, 12, collator, 3, **options)
    assert sum(len(batch.pop("skipped")) for batch in straight) > 0
    for first in (1, 4) if num_workers else range(9):
        resumed = load(dataset, 3, collator, 3, first_step=first, **options)
        for batch in resumed:
            batch.pop("skipped")  # those in front of its first example may belong to the batch before
        assert all(map(equal, straight[first:], resumed))


def test_a_stream_needs_a_shard_for_each_reader(tmp_path, tokenizer, image_processor):
    dataset = TarDataset(write_shards(tmp_path, 3))
    with pytest.raises(ValueError, match="a stream cannot be read from the shortest captions to the longest"):
        make_loader(dataset, Collator(tokenizer, image_processor), 2, rising_steps=3)
    with pytest.raises(ValueError, match="3 shards are too few for 2 processes with 2 readers each"):
        make_loader(dataset, Collator(tokenizer, image_processor), 2, world_size=2, num_workers=2)


# ------------------------------------------------------------------------------------------------------------ tensors


def words(tokenizer, ids: torch.Tensor) -> str:
    """Tokens as text without white space: a decoded full stop stands apart."""
    return tokenizer.decode(ids).replace(" ", "")


def examples(*captions: str, draw: int = 0) -> list[Example]:
    image = render(sample_scene(0))
    return [Example(image, text, f"image {n}", f"test:{n}", draw=draw + n) for n, text in enumerate(captions)]


LONG = " ".join(f"There is a small red circle in row {n}." for n in range(40))
SHORT = "A cat sleeps. A dog runs. Both are red."


def test_batches_are_as_long_as_their_longest_caption(tokenizer, image_processor):
    batch = Collator(tokenizer, image_processor)(examples(SHORT, "A cat sleeps."))
    expected = tokenizer([SHORT, "A cat sleeps."], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected.input_ids)
    assert torch.equal(batch["attention_mask"], expected.attention_mask.bool())
    assert batch["cut"] == 0 and batch["skipped"] == []
    assert batch["image_ids"].dtype == torch.int64 and len(set(batch["image_ids"].tolist())) == 2
    whole = (torch.from_numpy(np.array(render(sample_scene(0)))).permute(2, 0, 1) / 255 - 0.5) / 0.5
    assert torch.allclose(batch["pixel_values"][1], whole, atol=1e-6)  # float32 rounding


def test_long_captions_are_cut_in_front_of_their_end_and_counted(tokenizer, image_processor):
    for max_length in (77, 248):
        batch = Collator(tokenizer, image_processor, max_length=max_length)(examples(LONG, SHORT))
        expected = tokenizer([LONG, SHORT], padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        assert torch.equal(batch["input_ids"], expected.input_ids)
        assert torch.equal(batch["attention_mask"], expected.attention_mask.bool())
        assert batch["cut"] == 1
        assert batch["input_ids"][0, -1] == tokenizer.eos_token_id


def test_sub_captions_and_their_spans_are_the_same_tokens(tokenizer, image_processor):
    collator = Collator(tokenizer, image_processor, "sub_captions", num_sub_captions=6, max_length=100)
    batch = collator(examples(LONG, SHORT, "One sentence."))
    assert batch["sub_ids"].shape[:2] == batch["sub_spans"].shape[:2] == (3, 6)
    fitting = 0
    texts = [LONG, SHORT, "One sentence."]
    for row, number in itertools.product(range(3), range(6)):
        content = batch["sub_ids"][row, number][batch["sub_mask"][row, number]][1:-1]
        first, stop = batch["sub_spans"][row, number].tolist()
        text = words(tokenizer, content)
        assert text in texts[row].lower().replace(" ", "") and text.endswith(".")
        assert 1 <= text.count(".") <= 3
        if (first, stop) != (0, 0):
            fitting += 1
            assert first >= 1 and batch["attention_mask"][row, stop]  # the end token stands behind it at the latest
            assert torch.equal(batch["input_ids"][row, first:stop], content)
    assert 12 < fitting < 18  # the long caption reaches beyond the window


def test_short_captions_and_their_padding_in_front(tokenizer, image_processor):
    batch = Collator(tokenizer, image_processor, "first_sentence")(examples(SHORT, LONG))
    rows = [ids[mask] for ids, mask in zip(batch["short_ids"], batch["short_mask"], strict=True)]
    assert [tokenizer.decode(row[1:-1]) for row in rows] == ["a cat sleeps", "there is a small red circle in row 0"]

    collator = Collator(tokenizer, image_processor, "debias", max_length=60)
    shifts = []
    for draw in range(0, 60, 2):
        batch = collator(examples(SHORT, LONG, draw=draw))
        assert batch["short_ids"].shape[1] <= 60
        for ids, mask, text in zip(batch["short_ids"], batch["short_mask"], (SHORT, LONG), strict=True):
            row = ids[mask].tolist()
            assert row[0] == tokenizer.bos_token_id
            assert row.index(tokenizer.eos_token_id) == len(row) - 1  # nothing in front ends the caption
            content = list(itertools.dropwhile(lambda token: token == 0, row[1:-1]))
            shifts.append(len(row) - 2 - len(content))
            if text == SHORT:
                drawn = words(tokenizer, content).split(".")[:-1]
                assert drawn and set(drawn) <= {"adogruns", "botharered"}
    assert min(shifts) == 0 and max(shifts) > 40


def test_kept_prompts_fit_the_stock_encoder(tokenizer, image_processor):
    batch = Collator(tokenizer, image_processor, kept_prompts="short")(examples(LONG, SHORT, LONG))
    assert batch["kept_ids"].shape[1] <= 77
    for ids, mask, text in zip(batch["kept_ids"], batch["kept_mask"], (LONG, SHORT, LONG), strict=True):
        assert words(tokenizer, ids[mask][1:-1]) in text.lower().replace(" ", "")
    batch = Collator(tokenizer, image_processor, kept_prompts="random")(examples(*[SHORT] * 30))
    content = batch["kept_ids"][batch["kept_mask"]].tolist()
    assert batch["kept_ids"].shape[1] <= 77
    assert content.count(tokenizer.eos_token_id) == content.count(tokenizer.bos_token_id) == 30
    assert len(set(content)) > 500


def test_a_batch_reports_what_was_skipped(tokenizer, image_processor):
    (one, two) = examples(SHORT, LONG)
    skips = (Skip("a:1", "gone"), Skip("a:2", "empty"))
    one = Example(one.image, one.caption, "same", one.name, skips[:1])
    two = Example(two.image.resize((200, 31)), two.caption, "same", two.name, skips[1:])
    batch = Collator(tokenizer, image_processor)([one, two])
    assert batch["skipped"] == list(skips)
    assert batch["image_ids"][0] == batch["image_ids"][1]
    assert batch["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_unknown_captions_and_prompts_are_refused(tokenizer, image_processor):
    with pytest.raises(ValueError, match="captions='some' is not one of"):
        Collator(tokenizer, image_processor, "some")
    with pytest.raises(ValueError, match="kept_prompts='long' is neither"):
        Collator(tokenizer, image_processor, kept_prompts="long")


def test_scenes_open_and_load(tokenizer, image_processor):
    dataset = open_dataset("scenes", num_scenes=16, seed=4)
    (batch,) = load(dataset, 1, Collator(tokenizer, image_processor), 16)
    assert (
        batch["pixel_values"].shape == (16, 3, IMAGE_SIZE, IMAGE_SIZE) and batch["pixel_values"].dtype == torch.float32
    )
    assert batch["cut"] == 0
