"""Where a model lies: a file, a folder, a hub id, a link to a file on the hub."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import file_exists, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

from .checkpoints import SUFFIXES, read_json, shard_names

BUNDLED_MODEL = Path(__file__).parent / "bundled"
"""A small Stable Diffusion of the scenes world; its `finelip/` holds the long encoder."""

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model.fp16.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_LINK = re.compile(r"(?:https://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/(.+)")


def locate(
    source: str | Path, subfolder: str | None, hub: dict[str, Any]
) -> tuple[Path, Path | None, dict[str, Any] | None]:
    """Finds, or downloads, a model.

    Args:
        source: A file, a folder, or a hub id, as `load_text_encoder` takes it.
        subfolder: Where in a folder the model lies; by default the folder itself, or else its `text_encoder`. Not
            looked at for a file.
        hub: `revision`, `token`, `local_files_only`.

    Returns:
        The weights file, the model's folder and its `config.json`; the last two are None for a bare file.

    Raises:
        ValueError: If there is none. One sentence.
    """
    path = Path(source).expanduser()
    if (bare := checkpoint_file(source, hub)) is not None:
        return bare, None, None
    if path.is_dir():
        folder = encoder_folder(path, subfolder)
        file = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    elif _HUB_ID.fullmatch(str(source)) and path.suffix not in SUFFIXES:
        folder, file = _download(str(source), subfolder, hub)
    else:
        raise ValueError(f"{source} does not exist: give a folder, a checkpoint file, or a hub id (owner/name).")
    if file is None:
        raise ValueError(f"{folder} holds no weights: one of {', '.join(_WEIGHT_FILES)} must be there.")
    return file, folder, read_json(folder / "config.json")


def checkpoint_file(source: str | Path, hub: dict[str, Any]) -> Path | None:
    """A file: here, or downloaded if `source` is a link to one on the hub; None for anything else.

    Raises:
        ValueError: If the link leads nowhere.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    link = _HUB_LINK.fullmatch(str(source))
    if link is None:
        return None
    return _hub_file(source, link[1], link[3], {**hub, "revision": link[2]})


def model_index(source: str | Path, hub: dict[str, Any]) -> dict[str, Any]:
    """The `model_index.json` of a pipeline, which says of which kind it is.

    Args:
        source: A folder in diffusers' layout, or a hub id.
        hub: `revision`, `token`, `local_files_only`, `cache_dir`.

    Raises:
        ValueError: If there is none, or the hub cannot be reached. One sentence.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"{source} holds no model_index.json: give the folder of a pipeline in diffusers' layout."
            )
        return read_json(folder / "model_index.json")
    if not _HUB_ID.fullmatch(str(source)):
        raise ValueError(f"{source} does not exist: give the folder of a pipeline, or a hub id (owner/name).")
    return read_json(_hub_file(source, str(source), "model_index.json", hub))


def _hub_file(source: str | Path, repository: str, name: str, hub: dict[str, Any]) -> Path:
    """A file of the hub, from the cache or downloaded.

    Where the network is missing, the hub's library tries five times and then says that the file does not exist: this
    asks once, and says so.
    """
    try:
        return Path(hf_hub_download(repository, name, **{**hub, "local_files_only": True}))
    except LocalEntryNotFoundError as error:
        reason: Exception = error
    if not hub.get("local_files_only"):
        try:
            if file_exists(repository, name, revision=hub.get("revision"), token=hub.get("token")):
                return Path(hf_hub_download(repository, name, **hub))
        except GatedRepoError as error:
            raise ValueError(" ".join(str(error).split())) from error
        except Exception as error:  # httpx's, httpx2's or the hub library's own: whichever it is, there is no file
            reason = error
        else:
            raise ValueError(f"{source} is not on the hub, or has no {name} there: check the name.")
    raise ValueError(
        f"{source} cannot be reached and is not cached ({type(reason).__name__}): check the name and the network, or "
        f"download it and give its path."
    ) from reason


def configuration_folder(source: str | Path, hub: dict[str, Any]) -> Path:
    """A folder with the configurations and tokenizers of a model: `source` itself, or downloaded as a hub id.

    Raises:
        ValueError: If there is none.
    """
    if (folder := Path(source).expanduser()).is_dir():
        return folder
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.txt"], **hub))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(
            f"{source} is not a folder here, and as a hub id it cannot be reached or is not cached "
            f"({type(error).__name__}): check the name and the network, or download it and give the folder."
        ) from error


def encoder_folder(root: Path, subfolder: str | None) -> Path:
    """The folder with a model's `config.json`: `root / subfolder`, or by default `root` or its `text_encoder`.

    Raises:
        ValueError: If there is none.
    """
    candidates = [root / subfolder] if subfolder else [root, root / "text_encoder"]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"{root} holds no CLIP text model: config.json is neither in {' nor in '.join(map(str, candidates))}; "
        f"give the folder of a model or pipeline, or the path of a checkpoint file."
    )


def _download(repository: str, subfolder: str | None, hub: dict[str, Any]) -> tuple[Path, Path | None]:
    """Fetches configuration and tokenizer, then the first weights file that the repository has."""
    root = configuration_folder(repository, hub)
    folder = encoder_folder(root, subfolder)
    inside = folder.relative_to(root)
    for name in _WEIGHT_FILES:
        try:
            file = Path(hf_hub_download(repository, (inside / name).as_posix(), **hub))
            for shard in shard_names(file) if file.suffix == ".json" else ():
                hf_hub_download(repository, (inside / shard).as_posix(), **hub)
            return folder, file
        except (OSError, HfHubHTTPError):  # not in the repository, or not in the cache
            continue
    return folder, None
