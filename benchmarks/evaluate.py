"""What scoring costs: files -> features -> statistics -> Frechet distance, ours against torch-fidelity and clean-fid.

All three read the same PNGs of scenes, resize them by the same function and run the very same EfficientNet-Lite0, in
batches of one size, on one thread and without worker processes; what differs is what is around: loading, stacking,
statistics, the distance. They take turns, and the distances must agree. Memory is the peak of a process of its own
that takes the statistics of so many files, with cheap features of about the same number.

    python benchmarks/evaluate.py                                      # three minutes of one core
    python benchmarks/evaluate.py --num_images 64 --repeats 1 --memory_images 200 400
"""

import multiprocessing
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import HfArgumentParser

from finelip_diffusion.evaluation.features import Extractor, extract, load_extractor, statistics_of
from finelip_diffusion.evaluation.intervals import markdown_table
from finelip_diffusion.metrics import frechet_distance
from finelip_diffusion.scenes import render, sample_scene

SPEED_BAR = 1.0  # times each other tool's images per second
DISTANCE_BAR = 1e-3  # relative difference; the others take roots of a nonsymmetric product, singular for few images
MEMORY_BAR = 1.05  # the peak of most images over that of fewest

OURS, TORCH_FIDELITY, CLEAN_FID = "ours", "torch-fidelity", "clean-fid"


@dataclass
class Arguments:
    """The defaults are what docs/metrics.md reports."""

    num_images: int = field(default=100, metadata={"help": "The number of images in each of the two sets."})
    repeats: int = field(default=3, metadata={"help": "The number of times that each tool scores both sets."})
    batch_size: int = field(default=32, metadata={"help": "The number of images per batch."})
    memory_images: list[int] = field(
        default_factory=lambda: [1_000, 20_000],
        metadata={"help": "The numbers of files for which the peak memory is compared."},
    )
    check: bool = field(default=False, metadata={"help": "Whether to exit with an error if a target is missed."})


class Tool(NamedTuple):
    """A tool's own functions: a folder -> what it keeps of the images, and two of these -> the distance."""

    describe: Callable[[Path], Any]
    compare: Callable[[Any, Any], float]


def draw(folder: Path, num_images: int, first: int) -> None:
    folder.mkdir()
    for seed in range(first, first + num_images):
        render(sample_scene(seed)).save(folder / f"{seed:06}.png")


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def make_tools(extractor: Extractor, batch_size: int) -> dict[str, Tool]:
    from cleanfid.fid import fid_from_feats, get_folder_features
    from torch_fidelity.datasets import ImagesPathDataset
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.utils import get_featuresdict_from_dataset

    def encode(pixels: Tensor) -> Tensor:
        """(N, 3, H, W), values from 0 to 255, as both stack them; channels last, as ours has them."""
        return extractor.encode([pixels.round().byte().permute(0, 2, 3, 1).contiguous()])

    class Shared(FeatureExtractorBase):
        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("pooled",)

        def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
            return (encode(pixels),)

    def to_tensor(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(extractor.resize(image))).permute(2, 0, 1)

    def describe_by_torch_fidelity(folder: Path) -> Any:
        dataset = ImagesPathDataset([str(file) for file in files_of(folder)], to_tensor)
        found = get_featuresdict_from_dataset(
            dataset, Shared("shared", ["pooled"]), batch_size, cuda=False, save_cpu_ram=True, verbose=False
        )
        return fid_features_to_statistics(found["pooled"])

    def describe_by_clean_fid(folder: Path) -> Any:
        return get_folder_features(
            str(folder), encode, num_workers=0, batch_size=batch_size, device=torch.device("cpu"), verbose=False,
            custom_fn_resize=lambda pixels: np.array(extractor.resize(Image.fromarray(pixels))),
        )  # fmt: skip

    return {
        OURS: Tool(
            lambda folder: statistics_of(files_of(folder), extractor, batch_size),
            lambda a, b: frechet_distance(a.mean, a.covariance, b.mean, b.covariance),
        ),
        TORCH_FIDELITY: Tool(
            describe_by_torch_fidelity,
            lambda a, b: fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"],
        ),
        CLEAN_FID: Tool(describe_by_clean_fid, fid_from_feats),
    }


def score(tool: Tool, folders: Sequence[Path]) -> tuple[float, float, float]:
    """The distance, and seconds before and of it; those of the process, so that other load does not count."""
    times = [time.process_time()]
    described = [tool.describe(folder) for folder in folders]
    times.append(time.process_time())
    distance = float(tool.compare(*described))
    times.append(time.process_time())
    return distance, times[1] - times[0], times[2] - times[1]


def shares(extractor: Extractor, files: Sequence[Path], batch_size: int) -> tuple[float, float]:
    """Seconds an image of reading and resizing alone, and of the features as a whole."""
    start = time.process_time()
    for _ in extract(files, Extractor("none", "none", 0, extractor.device, extractor.resize, no_features), batch_size):
        pass
    read = time.process_time()
    for _ in extract(files, extractor, batch_size):
        pass
    return (read - start) / len(files), (time.process_time() - read) / len(files)


def no_features(pixels: Tensor) -> Tensor:
    return torch.empty(len(pixels), 0)


def colours(pixels: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(pixels.float(), 20).flatten(1)  # (N, 1200)


def unchanged(image: Image.Image) -> Image.Image:
    return image


def peak_memory(files: Sequence[Path], num_images: int, batch_size: int) -> float:
    """MB that this process has taken at most, after statistics of so many files, the given ones over and over."""
    torch.set_num_threads(1)
    extractor = Extractor("colours", "none", 1200, torch.device("cpu"), unchanged, colours)
    statistics_of(list(islice(cycle(files), num_images)), extractor, batch_size)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure_memory(files: Sequence[Path], counts: Sequence[int], batch_size: int) -> dict[int, float]:
    found = {}
    for count in counts:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            found[count] = fresh.submit(peak_memory, files, count, batch_size).result()
    return found


def median_ratio(theirs: np.ndarray, ours: np.ndarray) -> float:
    return float(np.median(theirs / ours))


def missed_bars(speeds: dict[str, float], differences: dict[str, float], memory: dict[int, float]) -> list[str]:
    """A sentence for each bar that is missed."""
    missed = [
        f"{speed:.2f} times the images per second of {name}, but the bar is {SPEED_BAR:g}."
        for name, speed in speeds.items()
        if not speed >= SPEED_BAR
    ]
    missed += [
        f"the distance differs by {difference:.1e} from that of {name}, but the bar is {DISTANCE_BAR:g}."
        for name, difference in differences.items()
        if not difference <= DISTANCE_BAR
    ]
    growth = memory[max(memory)] / memory[min(memory)]
    if not growth <= MEMORY_BAR:
        missed.append(f"{max(memory)} images take {growth:.2f} times the memory of {min(memory)}, not {MEMORY_BAR:g}.")
    return missed


def main(args: Arguments) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="cleanfid")  # its matrix root: deprecated flag, singular product
    extractor = load_extractor("effnet_fd")
    tools = make_tools(extractor, args.batch_size)
    scores: dict[str, list[tuple[float, float, float]]] = {name: [] for name in tools}
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root, name) for name in ("references", "images")]
        for number, folder in enumerate(folders):
            draw(folder, args.num_images, number * args.num_images)
        extractor([render(sample_scene(0))])  # the first run of a network takes longer
        for turn in range(args.repeats):
            for name in [*tools][turn % 3 :] + [*tools][: turn % 3]:
                scores[name].append(score(tools[name], folders))
        reading, whole = shares(extractor, files_of(folders[0]), args.batch_size)
        memory = measure_memory(files_of(folders[0]), args.memory_images, args.batch_size)

    took = {name: np.array(found)[:, 1:] for name, found in scores.items()}  # (repeats, 2), seconds
    distances = {name: found[0][0] for name, found in scores.items()}
    others = [name for name in tools if name != OURS]
    speeds = {name: median_ratio(took[name].sum(1), took[OURS].sum(1)) for name in others}
    differences = {name: abs(distances[name] - distances[OURS]) / distances[OURS] for name in others}
    print(
        f"n = {args.repeats} x 2 sets of {args.num_images} PNGs, EfficientNet-Lite0, batches of {args.batch_size}; "
        f"seconds of one CPU thread, torch {torch.__version__}\n"
    )
    heads = ["tool", "images/s", "ours is faster by", "with features alone by", "seconds of the distance", "distance"]
    rows = []
    for name, seconds in took.items():
        rate = 2 * args.num_images / np.median(seconds.sum(1))
        features_alone = median_ratio(seconds[:, 0], took[OURS][:, 0])
        speed, took_by_distance = f"{speeds.get(name, 1.0):.2f}", f"{np.median(seconds[:, 1]):.2f}"
        rows.append([name, f"{rate:.3g}", speed, f"{features_alone:.2f}", took_by_distance, f"{distances[name]:.5f}"])
    print(*markdown_table(heads, rows), sep="\n")
    print(f"\nours, an image: {1000 * reading:.2f} ms reading and resizing, {1000 * (whole - reading):.2f} ms network")
    print("peak memory: " + ", ".join(f"{count} images {peak:.0f} MB" for count, peak in memory.items()))
    print(
        f"bars: {SPEED_BAR:g} times each tool, distances equal within {DISTANCE_BAR:g}, memory at most "
        f"{MEMORY_BAR:g} times"
    )
    if args.check and (missed := missed_bars(speeds, differences, memory)):
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
