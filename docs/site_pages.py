"""What the site has beside docs/: README, changelog, the model card, and a page for each module of the package.

A hook of mkdocs (https://www.mkdocs.org/user-guide/configuration/#hooks).
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "finelip_diffusion"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "finelip_diffusion/bundled/README.md": "model-card.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def modules() -> list[str]:
    """Dotted names of the package's modules, within the package; one that holds a docstring alone is left out."""
    names = []
    for path in sorted(PACKAGE.glob("**/*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if len(path.read_text(encoding="utf-8").splitlines()) > 1:
            names.append(name)
    return names


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the modules' pages into the navigation."""
    assert config.nav is not None
    config.nav.append(
        {"Reference": [{name or "finelip_diffusion": f"api/{name or 'index'}.md"} for name in modules()]}
    )
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that do not lie in docs/."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for name in modules():
        dotted = ".".join(filter(None, ["finelip_diffusion", name]))
        files.append(File.generated(config, f"api/{name or 'index'}.md", content=f"# {dotted}\n\n::: {dotted}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links of the site; what the site lacks becomes plain text."""
    target = page.file.src_uri
    sources = {there: here for here, there in PAGES.items()}
    folder = PurePosixPath(sources.get(target, f"docs/{target}")).parent

    def link(match: re.Match[str]) -> str:
        image, text, path, anchor = match[1], match[2], match[3], match[4] or ""
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        file = os.path.normpath(folder / path)
        if not (ROOT / file).exists():
            return match[0]  # mkdocs says what is wrong
        there = PAGES.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)
        if there is None or files.get_file_from_path(there) is None:
            return f"{text} (`{file}`)" if text not in (file, PurePosixPath(file).name, f"`{file}`") else f"`{file}`"
        return f"{image}[{text}]({os.path.relpath(there, PurePosixPath(target).parent)}{anchor})"

    return LINK.sub(link, markdown)
