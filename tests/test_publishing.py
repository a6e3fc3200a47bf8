"""Uploading to a local stand-in for the hub, in the hub's own folder layout, and loading again by the hub id."""

import shutil
from hashlib import sha1
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from tiny_models import pixels, tiny_text_encoder

from finelip_diffusion import FineLIPStableDiffusionPipeline, load_text_encoder
from finelip_diffusion.publishing import push_to_hub


class LocalHub:
    """What `HfApi` does with a repository, done to the folder in which downloads are kept."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.calls: list[dict] = []

    def create_repo(self, repo_id, **options):
        self.calls.append({"repo_id": repo_id, **options})
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_commit(self, repo_id, operations, *, commit_message, repo_type, revision=None, create_pr=False):
        commit = sha1(f"{repo_id} {commit_message}".encode()).hexdigest()
        repository = self.folder / f"{repo_type}s--{repo_id.replace('/', '--')}"
        for operation in operations:
            path = repository / "snapshots" / commit / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(operation.path_or_fileobj, bytes):
                path.write_bytes(operation.path_or_fileobj)
            else:
                shutil.copyfile(operation.path_or_fileobj, path)
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / (revision or "main")).write_text(commit)
        self.last = repository / "snapshots" / commit
        return SimpleNamespace(commit_url=f"local/{repo_id}/{commit}", pr_url=None)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return LocalHub(tmp_path / "hub")


def test_a_pipeline_comes_back_whole(hub, _stock, encoder_folder, text_of):
    pipe = FineLIPStableDiffusionPipeline(**_stock.components, finelip=encoder_folder, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    address = pipe.push_to_hub("me/long-sd", private=True, base_model="someone/sd", api=hub)
    assert address.startswith("local/me/long-sd/")
    assert hub.calls == [{"repo_id": "me/long-sd", "private": True, "repo_type": "model", "exist_ok": True}]
    where = {"cache_dir": hub.folder, "local_files_only": True}
    again = FineLIPStableDiffusionPipeline.from_pretrained("me/long-sd", **where)
    plain = DiffusionPipeline.from_pretrained("me/long-sd", **where)
    for each in (again, plain):
        each.set_progress_bar_config(disable=True)
    for how in ("stretch", "chunk"):
        # weights in a mapped file lie at other addresses, and the kernels for them may round the last bit otherwise
        found, expected = (pixels(each, text_of(120), long_prompt=how) for each in (again, pipe))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(pixels(plain, text_of(120)), pixels(pipe, text_of(120)), rtol=0, atol=1e-5)
    card = ModelCard.load(hub.last / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert card.data.base_model == "someone/sd"
    assert 'FineLIPStableDiffusionPipeline.from_pretrained("me/long-sd")' in card.text
    assert "reads 248 tokens" in card.text


def test_an_encoder_comes_back_bit_for_bit(hub, encoder_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(encoder_folder, folder)
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "state.bin").write_bytes(b"much")
    (folder / ".partial").write_bytes(b"half")
    push_to_hub(folder, "long-clip", api=hub)
    assert {path.name for path in hub.last.iterdir()} == {"text_encoder", "tokenizer", "README.md"}
    text_encoder, tokenizer = load_text_encoder("me/long-clip")
    expected = tiny_text_encoder(7, positions=248).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in text_encoder.state_dict().items())
    assert tokenizer.model_max_length == 248
    card = ModelCard.load(hub.last / "README.md")
    assert card.data.library_name == "transformers"
    assert "248 positions, 32 wide" in card.text
    assert 'finelip="me/long-clip"' in card.text


def test_a_report_is_a_data_set_and_keeps_its_own_card(hub, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{}")
    push_to_hub(tmp_path / "report", "me/report", api=hub)
    assert hub.calls[-1]["repo_type"] == "dataset"
    assert "report.json" in (hub.last / "README.md").read_text()
    (tmp_path / "report" / "README.md").write_text("mine")
    push_to_hub(tmp_path / "report", "me/report", commit_message="again", api=hub)
    assert (hub.last / "README.md").read_text() == "mine"


def test_other_folders_are_refused_before_a_repository_is_made(hub, tmp_path):
    with pytest.raises(ValueError, match="holds no model_index.json, text_encoder/config.json or report.json"):
        push_to_hub(tmp_path, "me/nothing", api=hub)
    assert not hub.calls
