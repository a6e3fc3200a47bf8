"""Encoders, pipelines and reports on the hub, each with a model card."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData

from .positions import STOCK_POSITIONS

CARD = "README.md"
_SKIPPED = ("checkpoint-", ".", "logs")  # what training leaves in a folder beside its result


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with finelip-diffusion",
    create_pr: bool = False,
    api: Any = None,
) -> str:
    """Uploads a folder in one commit, with a model card: the folder's own `README.md`, or one that is written for it.

    Args:
        folder: A long encoder (`text_encoder/` and `tokenizer/`), a pipeline (`model_index.json`), or a report
            (`report.json`), which becomes a data set.
        repo_id: Where it goes: `owner/name`. The repository is made if it does not exist.
        base_model: Hub id of the model that it was made from, for the card.
        private: Whether a new repository is private.
        token: Of an account that may write there; None is the one that is logged in.
        revision: Branch; None is the default one.
        commit_message: Of the commit.
        create_pr: Whether to open a pull request instead.
        api: What uploads, with `create_repo` and `create_commit` of `huggingface_hub.HfApi`; None is that.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: If the folder holds none of the three.
        huggingface_hub.errors.HfHubHTTPError: If the hub refuses.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    api = api or HfApi(token=token)
    repo_type = "dataset" if kind == "report" else "model"
    repo_id = api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True).repo_id
    files = [CommitOperationAdd(str(path.relative_to(folder)), path) for path in _files(folder)]
    if not (folder / CARD).is_file():
        card = str(model_card(folder, repo_id, base_model))
        files.append(CommitOperationAdd(CARD, card.encode()))
    commit = api.create_commit(
        repo_id,
        files,
        commit_message=commit_message,
        repo_type=repo_type,
        revision=revision,
        create_pr=create_pr,
    )
    return str(commit.pr_url or commit.commit_url)


def kind_of(folder: str | Path) -> str:
    """`"pipeline"`, `"encoder"` or `"report"`.

    Raises:
        ValueError: If the folder is none of them.
    """
    folder = Path(folder)
    for name, kind in (
        ("model_index.json", "pipeline"),
        ("text_encoder/config.json", "encoder"),
        ("report.json", "report"),
    ):
        if (folder / name).is_file():
            return kind
    raise ValueError(
        f"{folder} holds no model_index.json, text_encoder/config.json or report.json: give the folder of a pipeline, "
        "a long encoder, or a report."
    )


def model_card(folder: str | Path, repo_id: str, base_model: str | None = None) -> ModelCard:
    """What the card of a folder says: what it is, how it is loaded, and what is not known.

    Args:
        folder: As for `push_to_hub`.
        repo_id: Where it is going to be.
        base_model: Hub id of the model that it was made from.

    Raises:
        ValueError: If the folder is neither an encoder, nor a pipeline, nor a report.
    """
    folder, kind = Path(folder), kind_of(folder)
    name = repo_id.rsplit("/", 1)[-1]
    if kind == "report":
        about = ModelCardData(tags=["finelip-diffusion", "evaluation"])
        body = "A report of finelip-diffusion: `report.json` has every figure with its interval."
        return ModelCard(f"---\n{about.to_yaml()}\n---\n\n# {name}\n\n{body}\n")
    config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    positions = config.get("max_position_embeddings", STOCK_POSITIONS)
    rotary = config.get("rotary") is not None
    plain = (
        "Plain diffusers loads it after `import finelip_diffusion.rotary`."
        if rotary
        else "Plain diffusers loads it, too."
    )
    about = ModelCardData(
        library_name="diffusers" if kind == "pipeline" else "transformers",
        pipeline_tag="text-to-image" if kind == "pipeline" else None,
        base_model=base_model,
        tags=["finelip-diffusion", "long-clip", "stable-diffusion"],
    )
    if kind == "pipeline":
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        ours = "FineLIPStableDiffusionXLPipeline" if "XL" in index["_class_name"] else "FineLIPStableDiffusionPipeline"
        what = f"A {index['_class_name']} whose text encoder reads {positions} tokens. {plain}"
        code = f'from finelip_diffusion import {ours}\n\npipe = {ours}.from_pretrained("{repo_id}")'
    else:
        what = (
            f"A CLIP text encoder of {positions} positions, {config['hidden_size']} wide, with its tokenizer: "
            f"{'rotary positions, which finelip-diffusion reads' if rotary else 'stock classes of transformers'}, a "
            "drop-in for pipelines of diffusers that read through the same CLIP."
        )
        code = (
            "from finelip_diffusion import FineLIPStableDiffusionPipeline\n\n"
            f'pipe = FineLIPStableDiffusionPipeline.from_pretrained("BASE MODEL", finelip="{repo_id}")'
        )
    return ModelCard(
        f"---\n{about.to_yaml()}\n---\n\n# {name}\n\n{what}\n\n```python\n{code}\n```\n\n"
        "How it was made, on what data, and under which license is not recorded in the files: please add it here.\n"
    )


def _files(folder: Path) -> Iterator[Path]:
    """What is uploaded: everything but hidden files, checkpoints and logs of training."""
    for path in sorted(folder.rglob("*")):
        first = path.relative_to(folder).parts[0]
        if path.is_file() and not first.startswith(_SKIPPED) and not path.name.startswith("."):
            yield path
