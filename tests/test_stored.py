"""What frozen towers make, kept on disk: read back, shared by processes, and the same training."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scripts
import torch
import yaml
from test_objective import make_batches, make_step, total
from torch import Tensor

from finelip_diffusion.data import stored
from finelip_diffusion.data.stored import TensorStore, content_key, fingerprint

ROOT = Path(__file__).resolve().parents[1]


def record(number: int, rows: int = 3) -> dict[str, Tensor]:
    """Numbers that half precision holds."""
    return {"tokens": torch.arange(4.0 * rows).view(rows, 4) + number, "embeds": torch.full((1, 2), float(number))}


def filled(folder: Path, keys: range, rank: int = 0) -> TensorStore:
    store = TensorStore(folder, rank)
    for key in keys:
        store.add(key, record(key, rows=1 + key % 3))
    return store


def assert_holds(store: TensorStore, keys: range) -> None:
    for key in keys:
        expected = record(key, rows=1 + key % 3)
        assert store[key].keys() == expected.keys()
        for name, rows in expected.items():
            assert torch.equal(store[key][name].float(), rows)


def test_records_are_read_back_before_and_after_they_are_written(tmp_path: Path) -> None:
    store = filled(tmp_path, range(5))
    assert_holds(store, range(5))
    assert not list(tmp_path.iterdir())
    store.flush()
    assert_holds(store, range(5))
    assert len(TensorStore(tmp_path)) == 5
    assert_holds(TensorStore(tmp_path), range(5))


def test_shards_are_written_when_they_are_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "SHARD_BYTES", 40)
    filled(tmp_path, range(7))
    known = TensorStore(tmp_path)  # of a run that was killed: the last records were not written
    assert len(known) == 6 and len(list(tmp_path.iterdir())) > 1
    assert_holds(known, range(len(known)))


def test_processes_see_each_others_shards(tmp_path: Path) -> None:
    one, two = filled(tmp_path, range(3), rank=0), filled(tmp_path, range(3, 7), rank=1)
    one.flush()
    two.flush()
    assert 3 not in one
    calls = []
    found = stored.recall(one, [4, 1], lambda rows: calls.append(rows) or [], torch.device("cpu"))
    assert not calls and torch.equal(found["embeds"][0], torch.full((1, 2), 4.0))
    assert len(list(tmp_path.iterdir())) == 2


def test_only_what_is_missing_is_computed_and_once(tmp_path: Path) -> None:
    store, asked = filled(tmp_path, range(2)), []

    def compute(rows: list[int]) -> list[dict[str, Tensor]]:
        asked.append(rows)
        return [{"tokens": torch.full((1, 4), 1 / 3), "embeds": torch.zeros(1, 2)} for _ in rows]

    first = stored.recall(store, [9, 1, 9, 8], compute, torch.device("cpu"))
    again = stored.recall(store, [9, 1, 9, 8], compute, torch.device("cpu"))
    assert [sorted(rows) for rows in asked] == [[2, 3]]
    assert all(torch.equal(*pair) for name in first for pair in zip(first[name], again[name], strict=True))
    assert first["tokens"][0][0, 0] == torch.tensor(1 / 3).half().float()


def test_what_cannot_be_kept_is_said(tmp_path: Path) -> None:
    store = filled(tmp_path, range(1))
    with pytest.raises(ValueError, match="tokens does not fit half precision"):
        store.add(5, {"tokens": torch.full((1, 4), 1e6), "embeds": torch.zeros(1, 2)})
    store.flush()
    (shard,) = tmp_path.iterdir()
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged: delete it"):
        TensorStore(tmp_path)


def test_keys_and_fingerprints_depend_on_content() -> None:
    ones = torch.ones(2, 3)
    assert content_key(ones) == content_key(torch.ones(3, 2).T) != content_key(torch.ones(3, 2))
    assert content_key(ones) != content_key(ones * 2) and 0 <= content_key(ones) < 2**63
    weights = {"a": ones, "b": ones * 2}
    assert fingerprint(weights, "no") == fingerprint(dict(reversed(weights.items())), "no")
    assert len({fingerprint(weights, "no"), fingerprint(weights, "bf16"), fingerprint({"a": ones}, "no")}) == 3


def keyed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    batch = batch | {"pixel_keys": torch.tensor([content_key(image) for image in batch["pixel_values"]])}
    if "kept_ids" in batch:
        prompts = zip(batch["kept_ids"], batch["kept_mask"], strict=True)
        batch["kept_keys"] = torch.tensor([content_key(ids[mask]) for ids, mask in prompts])
    return batch


@pytest.fixture(scope="module")
def batch_for() -> Any:
    return make_batches()


@pytest.mark.parametrize(
    ("name", "expected"), [("finelip", {"image"}), ("infonce", {"image"}), ("finelip_preserve", {"image", "teacher"}),
                           ("hycd", {"image", "teacher", "teacher_image"})],
)  # fmt: skip
def test_training_is_the_same_and_towers_are_asked_once(
    name: str, expected: set, batch_for: Any, tmp_path: Path
) -> None:
    step, batch = make_step(name, dtype=torch.float32), keyed(batch_for(name, torch.float32))
    step.model.clip.vision_model.requires_grad_(False)
    step.model.clip.visual_projection.requires_grad_(False)
    plain = step(batch)
    total(plain).backward()
    gradients = {key: weight.grad.clone() for key, weight in step.named_parameters() if weight.grad is not None}
    towers = step.frozen_towers()
    assert towers.keys() == expected

    step.stores = {key: TensorStore(tmp_path / key) for key in towers}
    first = step(batch)
    for store in step.stores.values():
        store.flush()
    step.stores = {key: TensorStore(tmp_path / key) for key in towers}
    step.zero_grad()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a tower was asked again")

    for tower in (step.model.clip.vision_model, *(teacher for teacher in step._teacher if teacher is not None)):
        for module in tower.modules():
            module.register_forward_pre_hook(refuse)
    again = step(batch)
    total(again).backward()
    for term, value in plain.items():
        assert torch.equal(first[term], again[term])
        torch.testing.assert_close(again[term], value, rtol=2e-3, atol=1e-4)  # half precision: 11 bits
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for key, weight in step.named_parameters():
        if weight.grad is not None:
            assert (weight.grad - gradients[key]).abs().max() <= 0.02 * scale, key


def test_a_trained_tower_is_not_kept() -> None:
    assert make_step("finelip").frozen_towers() == {}


def test_the_script_keeps_what_it_computed(tmp_path: Path) -> None:
    recipe = {"local_loss": "finelip", "preserve": "affinity", "refine": ["image", "text"], "image_tower": "frozen"}
    (tmp_path / "locked.yaml").write_text(yaml.safe_dump({"description": "A locked image tower."} | recipe))
    flags: dict[str, object] = {
        "recipe": tmp_path / "locked.yaml", "num_scenes": 16, "train_batch_size": 8, "max_train_steps": 4,
        "learning_rate": 1e-3, "lr_warmup_steps": 1, "report_to": "none", "num_validation_examples": 8,
        "checkpointing_steps": 2, "cache_dir": tmp_path / "cache", "output_dir": tmp_path / "run",
    }  # fmt: skip
    done = scripts.run(ROOT / "train" / "finetune_encoder.py", *(f"--{key}={value}" for key, value in flags.items()))
    assert done.returncode == 0, done.stderr[-2000:]
    folders = {folder.name.rpartition("-")[0]: folder for folder in (tmp_path / "cache").iterdir()}
    assert folders.keys() == {"image", "teacher", "teacher_image"}
    for name in ("image", "teacher_image"):  # the second epoch computed nothing, or there would be a shard of it
        assert len(TensorStore(folders[name])) == 16 and len(list(folders[name].iterdir())) == 1
    assert 16 <= len(TensorStore(folders["teacher"])) <= 32  # scenes may be told in other words


def test_a_cache_for_nothing_is_refused(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "train" / "finetune_encoder.py"))
    with pytest.raises(ValueError, match="trains the image tower and has no teacher: leave it out"):
        script["open_stores"](make_step("finelip"), SimpleNamespace(cache_dir=tmp_path), None)
    assert script["open_stores"](make_step("finelip"), SimpleNamespace(cache_dir=None), None) == {}
