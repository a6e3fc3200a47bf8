"""The command line: `finelip generate`, `describe`, `convert`, `merge`, `score`."""

import argparse
import logging
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .scenes import advice

DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("diffusers", "onetrainer", "openai", "comfyui", "kohya")
LONG_PROMPTS = ("stretch", "truncate", "chunk", "segment", "auto")
WEIGHTINGS = ("plain", "a1111", "compel")
STEPS = 20
GUIDANCE_SCALE = 7.5
BUNDLED_GUIDANCE_SCALE = 3.0  # it is a small model without much to guide: at 7.5 it draws wrong colors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit status: 0, or 1 after one line on stderr that says what is wrong (2 for a malformed command).
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(format="finelip: %(message)s", level=logging.WARNING)
    logging.getLogger("finelip_diffusion").setLevel(logging.INFO if args.run in (convert, merge) else logging.WARNING)
    try:
        args.run(args)
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"finelip {args.command}: error: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"finelip {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def generate(args: argparse.Namespace) -> None:
    """Draws images of one prompt, one seed after the other, and says what was read of the prompt.

    Args:
        args: The flags of `finelip generate`.

    Raises:
        ValueError: If the prompt is empty or no text, or an argument does not fit the model.
        OSError: If a file or the model is missing, a file exists already, or the folder cannot be written.
    """
    prompt = _prompt(args)
    seeds = range(args.seed, args.seed + args.num_images)
    paths = [args.out / f"image-{seed}.png" for seed in seeds]
    existing = [str(path) for path in paths if path.exists()]
    if existing and not args.overwrite:
        raise FileExistsError(f"{', '.join(existing)} would be overwritten: choose another --out, or say --overwrite.")
    _check_writable(args.out)
    if args.model is None and (sentence := advice(prompt)):
        print(f"finelip generate: note: {sentence}", file=sys.stderr, flush=True)

    import torch

    pipe = _pipeline(args)
    guidance_scale = args.guidance_scale
    if guidance_scale is None:
        guidance_scale = BUNDLED_GUIDANCE_SCALE if args.model is None else GUIDANCE_SCALE
    height, width = _size(pipe, args.height, args.width)
    print(pipe.describe_prompt(prompt), flush=True)
    for number, (seed, path) in enumerate(zip(seeds, paths, strict=True), start=1):
        pipe.set_progress_bar_config(desc=f"image {number} of {args.num_images}")
        image = pipe(
            prompt,
            negative_prompt=args.negative_prompt,
            num_inference_steps=args.steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            generator=torch.Generator().manual_seed(seed),  # on the CPU: the same noise on every device
        ).images[0]
        settings = {
            "model": args.model or "bundled",
            "finelip": args.finelip,
            "long_prompt": pipe.long_prompt,
            "weighting": pipe.weighting,
            "blend": pipe.blend,
            "seed": seed,
            "steps": args.steps,
            "guidance_scale": guidance_scale,
            "height": image.height,
            "width": image.width,
            "dtype": args.dtype,
            "version": __version__,
        }
        _write_image(image, path, {"prompt": prompt, "negative_prompt": args.negative_prompt or "", **settings})
        print(path, flush=True)


def describe(args: argparse.Namespace) -> None:
    """Says what a pipeline reads of a prompt, and what it drops.

    Args:
        args: The flags of `finelip describe`.

    Raises:
        ValueError: If the prompt is empty or no text.
        OSError: If a file or the model is missing.
    """
    print(_pipeline(args).describe_prompt(_prompt(args)))


def convert(args: argparse.Namespace) -> None:
    """Turns any CLIP text weights into a folder that transformers and diffusers load, or a file for other programs.

    Args:
        args: The flags of `finelip convert`.

    Raises:
        ValueError: If the source is not a CLIP, its weights are not as they must be, or the target exists.
        OSError: If the target cannot be written.
    """
    import torch

    from .text_encoder import interpolate, load_text_encoder, save_checkpoint, save_text_encoder

    projection = args.projection
    if projection is None and args.layout == "openai":
        projection = True  # that layout always has one
    text_encoder, tokenizer = load_text_encoder(
        args.source,
        subfolder=args.subfolder,
        config=args.config,
        max_length=args.max_length,
        keep=args.keep,
        ratio=args.ratio,
        pad_token=args.pad_token,
        projection=projection,
        dtype=args.dtype and getattr(torch, args.dtype),
    )
    if args.interpolate is not None:
        length, projection = text_encoder.config.max_position_embeddings, hasattr(text_encoder, "text_projection")
        stock, _ = load_text_encoder(args.interpolate, max_length=length, keep=args.keep, projection=projection)
        interpolate(stock, text_encoder, args.share)
    if args.layout in ("diffusers", "onetrainer"):
        place = args.subfolder if args.subfolder == "text_encoder_2" else "text_encoder"
        save_text_encoder(text_encoder, tokenizer, args.out, subfolder=place, overwrite=args.overwrite)
    else:
        save_checkpoint(text_encoder, tokenizer, args.out, layout=args.layout, overwrite=args.overwrite)
    config = text_encoder.config
    print(
        f"{args.out}: {type(text_encoder).__name__}, {config.max_position_embeddings} positions, "
        f"{config.hidden_size} wide, {config.num_hidden_layers} layers, "
        f"{str(text_encoder.dtype).removeprefix('torch.')}, padding {tokenizer.pad_token!r}"
    )


def merge(args: argparse.Namespace) -> None:
    """Writes a whole model with a long text encoder in the place of its own.

    Args:
        args: The flags of `finelip merge`.

    Raises:
        ValueError: If the base is not a whole model, the encoder does not fit into it, or the target exists.
        OSError: If the base is missing.
    """
    import torch

    from . import merging
    from .text_encoder import load_text_encoder

    if not args.base.exists():
        raise FileNotFoundError(f"{args.base} does not exist: give a checkpoint file or a folder of a whole model.")
    options = {
        "config": args.config,
        "max_length": args.max_length,
        "pad_token": args.pad_token,
        "dtype": args.dtype and getattr(torch, args.dtype),
    }
    text_encoder, tokenizer = load_text_encoder(args.source, projection=args.projection, **options)
    needed = merging.fitting_slot(args.base, text_encoder, args.subfolder).projection
    if args.projection is None and needed and not hasattr(text_encoder, "text_projection"):
        text_encoder, tokenizer = load_text_encoder(args.source, projection=True, **options)
    slot = merging.merge(args.base, text_encoder, tokenizer, args.out, place=args.subfolder, overwrite=args.overwrite)
    print(
        f"{args.out}: {args.base.name} with {args.source} as its {slot.place}, "
        f"{text_encoder.config.max_position_embeddings} positions, {str(text_encoder.dtype).removeprefix('torch.')}"
    )


def score(args: argparse.Namespace) -> None:
    """Scores folders of pictures, whatever drew them.

    Args:
        args: The flags of `finelip score`.

    Raises:
        ValueError: If a folder holds no pictures, prompts are missing, or a judge cannot be loaded.
        OSError: If the report cannot be written.
    """
    if args.reference is None and args.features:
        raise ValueError("--features are for distances: give --reference, a folder of pictures to compare with.")
    with tempfile.TemporaryDirectory(prefix="finelip-score-") as stage:
        _score(args, args.out or Path(stage))


def _score(args: argparse.Namespace, out: Path) -> None:
    import torch
    from tqdm.auto import tqdm

    from .evaluation.adherence import load_judge
    from .evaluation.features import load_extractor
    from .evaluation.images import located, named
    from .evaluation.preferences import load_preference
    from .evaluation.report import markdown, write_report
    from .evaluation.scoring import gather, score_folders
    from .evaluation.vision import load_vision_judge

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = [folder.resolve().name for folder in args.images]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in args.images]
    folders = dict(zip(names, args.images, strict=True))
    pictures = gather(folders, args.prompts, args.images_per_prompt, args.dpg_quirks, out / "cut")
    told = any(prompt.text for prompt in pictures.prompts["long"])
    if not told and args.reference is None:
        raise ValueError("the pictures bring no prompts: give --prompts, or --reference to compare them with.")
    if not told and (args.judges or args.vqa or args.preferences):
        raise ValueError("the pictures bring no prompts to judge them by: give --prompts.")
    clips = list(args.judges)
    if told and not (clips or args.vqa or args.preferences):
        clips = ["clip=openai/clip-vit-large-patch14"]
    features = args.features or (["effnet_fd"] if args.reference is not None else [])
    eyes: dict[str, Any] = {}
    for item in features:
        name, equals, weights = item.partition("=")
        eyes[name] = load_extractor(name, weights=located(weights) if equals else None, device=device)
    for name, source in map(named, clips):
        eyes[name] = load_judge(name, source, device)
    judges: dict[str, Any] = {}
    for name, source in map(named, args.vqa):
        source, _, revision = (source, "", "") if Path(source).exists() else source.partition("@")
        name = name.partition("@")[0]
        judges[name] = load_vision_judge(name, source, device, revision=revision or None)
    for item in args.preferences:
        name, equals, source = item.partition("=")
        judges[name] = load_preference(f"{name}={located(source)}" if equals else name, device)
    if len(eyes) + len(judges) < len(features) + len(clips) + len(args.vqa) + len(args.preferences):
        raise ValueError("two judges or features have one name: call one of them NAME=SOURCE.")
    report = score_folders(
        pictures, folders, args.reference, eyes, judges, out / "answers",
        resamples=args.num_resamples, quirks=args.dpg_quirks,
        progress=lambda items, name: tqdm(items, name, disable=None, mininterval=2),
    )  # fmt: skip
    report |= {
        "title": f"Scores of {', '.join(names)}",
        "command": " ".join(["finelip", *sys.argv[1:]]),
        "versions": {"finelip-diffusion": __version__, "torch": torch.__version__},
    }
    if args.out is not None:
        write_report(report, args.out)
    print(markdown(report))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="finelip", description="Long prompts for Stable Diffusion.")
    parser.add_argument("--version", action="version", version=f"finelip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    read = _Parser(add_help=False)
    prompt = read.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="The prompt.")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", type=Path, help="The path of a UTF-8 text file with the prompt."
    )
    read.add_argument(
        "--model", help="The folder or hub id of a Stable Diffusion model. The default is the bundled model."
    )
    read.add_argument(
        "--finelip", metavar="SOURCE", help="The long text encoder: a folder, a hub id or a checkpoint file."
    )
    read.add_argument(
        "--long-prompt",
        choices=LONG_PROMPTS,
        help="The strategy for reading the prompt. The default is stretch with a trained long encoder, "
        "and chunk without one.",
    )
    read.add_argument(
        "--weighting",
        choices=WEIGHTINGS,
        default="plain",
        help="The syntax for the weights of words. The default is plain, which has no weights.",
    )
    read.add_argument(
        "--blend",
        metavar="SHARE",
        type=float,
        default=1.0,
        help="The share of the long encoder in a blend with the stock encoder. The default is 1.",
    )
    read.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="The data type of the weights. The default is float32."
    )
    read.add_argument(
        "--device",
        help="The device, such as cpu, cuda or mps. The default is cuda if it is available, and cpu otherwise.",
    )

    command = commands.add_parser("generate", parents=[read], help="Draw images of a prompt.")
    command.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="The folder where the images are written as image-SEED.png.",
    )
    command.add_argument("--negative-prompt", metavar="TEXT", help="The negative prompt.")
    command.add_argument(
        "--seed", type=_integer(0, 2**63 - 1), default=0, help="The seed of the first image. The default is 0."
    )
    command.add_argument(
        "--num-images",
        type=_integer(1),
        default=1,
        help="The number of images. Each further image has the next seed. The default is 1.",
    )
    command.add_argument(
        "--steps", type=_integer(1), default=STEPS, help="The number of denoising steps. The default is 20."
    )
    command.add_argument(
        "--guidance-scale",
        type=_scale,
        help="The guidance scale. The default is 3 for the bundled model and 7.5 for others.",
    )
    command.add_argument(
        "--height",
        type=_integer(8, multiple=8),
        help="The height of the images in pixels. The default is the model's own.",
    )
    command.add_argument(
        "--width",
        type=_integer(8, multiple=8),
        help="The width of the images in pixels. The default is the model's own.",
    )
    command.add_argument("--overwrite", action="store_true", help="Whether to replace existing images.")
    command.set_defaults(run=generate)

    command = commands.add_parser("describe", parents=[read], help="Show which parts of a prompt are read.")
    command.set_defaults(run=describe)

    command = commands.add_parser("convert", help="Convert CLIP text weights to a long text encoder.")
    command.add_argument(
        "source", metavar="SOURCE", help="The encoder or model to convert: a folder, a hub id or a checkpoint file."
    )
    command.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="The folder where text_encoder/ and tokenizer/ are written, or the path of a .safetensors file.",
    )
    command.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="diffusers",
        help="The layout of the result: diffusers or onetrainer for a folder that diffusers, "
        "transformers and OneTrainer read, openai for a file for the code of OpenAI, Long-CLIP and "
        "FineLIP, comfyui for a file for ComfyUI, or kohya for a file for kohya's scripts. The "
        "default is diffusers.",
    )
    command.add_argument(
        "--subfolder", metavar="NAME", help="The name of the encoder in a model, such as text_encoder_2."
    )
    command.add_argument(
        "--config",
        metavar="SOURCE",
        help="The folder or hub id with the config and the tokenizer for a checkpoint file.",
    )
    command.add_argument(
        "--max-length",
        type=_integer(3),
        default=248,
        help="The number of positions of the encoder. The default is 248.",
    )
    command.add_argument(
        "--keep",
        type=_integer(0),
        default=20,
        help="The number of first positions that stay as they are. The default is 20.",
    )
    command.add_argument(
        "--ratio",
        type=_integer(1),
        help="The number of new positions for each old one. The default is the number that is needed.",
    )
    command.add_argument(
        "--pad-token",
        metavar="TOKEN",
        help="The padding token: 'eos', or a token such as '!'. The default is the source's own.",
    )
    command.add_argument(
        "--projection",
        action=argparse.BooleanOptionalAction,
        help="Whether to keep the text projection. The default depends on the source and the layout.",
    )
    command.add_argument(
        "--dtype", choices=DTYPES, help="The data type of the weights. The default is the source's own."
    )
    command.add_argument(
        "--interpolate",
        metavar="STOCK",
        help="The encoder from which SOURCE was trained. The result has weights between the two (WiSE-FT).",
    )
    command.add_argument(
        "--share",
        type=float,
        default=0.5,
        help="The share of SOURCE in these weights, from 0 to 1. The default is 0.5.",
    )
    command.add_argument("--overwrite", action="store_true", help="Whether to replace existing files.")
    command.set_defaults(run=convert)

    command = commands.add_parser("merge", help="Put a long text encoder into a whole model.")
    command.add_argument(
        "base", metavar="BASE", type=Path, help="The whole model: a checkpoint file or a diffusers folder."
    )
    command.add_argument(
        "source", metavar="ENCODER", help="The long text encoder: a folder, a hub id or a checkpoint file."
    )
    command.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="The path of the new model: a .safetensors file, or a folder if BASE is a folder.",
    )
    command.add_argument(
        "--subfolder", metavar="NAME", help="The name of the encoder to replace. The default is the one that fits."
    )
    command.add_argument(
        "--config",
        metavar="SOURCE",
        help="The folder or hub id with the config and the tokenizer for a checkpoint file.",
    )
    command.add_argument(
        "--max-length",
        type=_integer(3),
        default=248,
        help="The number of positions of the encoder. The default is 248.",
    )
    command.add_argument(
        "--pad-token",
        metavar="TOKEN",
        help="The padding token: 'eos', or a token such as '!'. The default is the encoder's own.",
    )
    command.add_argument(
        "--projection",
        action=argparse.BooleanOptionalAction,
        help="Whether to include the encoder's text projection. The default is to include it if BASE has one.",
    )
    command.add_argument(
        "--dtype", choices=DTYPES, help="The data type of the new encoder's weights. The default is its own."
    )
    command.add_argument("--overwrite", action="store_true", help="Whether to replace existing files.")
    command.set_defaults(run=merge)

    command = commands.add_parser("score", help="Score folders of images from any source.")
    command.add_argument(
        "images",
        metavar="IMAGES",
        type=Path,
        nargs="+",
        help="The folders of images to score. The first is the one that the others are compared with.",
    )
    command.add_argument(
        "--prompts",
        metavar="FILE",
        help="The prompts: a .txt file with one prompt per line, a .json, .jsonl or .csv file, or dpg:, "
        "dsg:, tiif:, detailmaster:, longbench:, geneval2: or compbench: followed by the folder of "
        "that prompt set. The default is the prompts that come with the images.",
    )
    command.add_argument(
        "--reference", metavar="IMAGES", type=Path, help="The folder of reference images to compare with."
    )
    command.add_argument(
        "--features",
        metavar="NAME",
        nargs="+",
        default=[],
        help="The image features for the distances. The default is effnet_fd. Only with --reference.",
    )
    command.add_argument(
        "--judges",
        metavar="CLIP",
        nargs="+",
        default=[],
        help="The CLIPs that score the images. The default is openai/clip-vit-large-patch14, unless "
        "--vqa or --preferences is given.",
    )
    command.add_argument(
        "--vqa",
        metavar="MODEL",
        nargs="+",
        default=[],
        help="The vision-language models of transformers that answer questions about the images.",
    )
    command.add_argument(
        "--preferences",
        metavar="NAME",
        nargs="+",
        default=[],
        help="The models of human preference: hps_v2, pick_score, image_reward.",
    )
    command.add_argument(
        "--images-per-prompt",
        type=_integer(1),
        default=1,
        help="The number of images per prompt of a prompt set, such as 4 for DPG-Bench. The default is 1.",
    )
    command.add_argument(
        "--dpg-quirks",
        action="store_true",
        help="Whether to count as DPG-Bench's own script does. Only for DPG-Bench.",
    )
    command.add_argument(
        "--num-resamples",
        type=_integer(2),
        default=100,
        help="The number of bootstrap resamples for the distances. The default is 100.",
    )
    command.add_argument(
        "--device",
        help="The device, such as cpu, cuda or mps. The default is cuda if it is available, and cpu otherwise.",
    )
    command.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="The folder where report.html, report.md and report.json are written. The default only "
        "prints the tables.",
    )
    command.set_defaults(run=score)
    return parser


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _integer(least: int, greatest: int | None = None, multiple: int = 1):
    """Parser of a whole number within bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least or (greatest is not None and value > greatest) or value % multiple:
            bounds = f"at least {least}" if greatest is None else f"{least} to {greatest}"
            raise argparse.ArgumentTypeError(
                f"{value} must be {bounds}" + (f" and divisible by {multiple}" if multiple > 1 else "")
            )
        return value

    return parse


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text} must be finite and at least 0")
    return value


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt_file is None:
        prompt, where = args.prompt, "--prompt"
    else:
        where = str(args.prompt_file)
        try:
            prompt = args.prompt_file.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise ValueError(f"{where} does not exist: give --prompt-file the path of a UTF-8 text file.") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds bytes that are no UTF-8 text.") from None
    if not prompt.strip():
        raise ValueError(f"{where} is empty: write what the image shall show.")
    return prompt.strip()


def _check_writable(folder: Path) -> None:
    """Finds out before the work, not after it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def load_pipeline(
    model: str | None = None,
    finelip: str | None = None,
    *,
    long_prompt: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    **options: Any,
):
    """Loads the pipeline of a model's kind, on its device.

    Args:
        model: Folder or hub id of a Stable Diffusion or an SDXL; None is the bundled model.
        finelip: A long text encoder: folder, hub id or checkpoint file.
        long_prompt: How prompts are read; None is the best that the loaded parts can do.
        dtype: Name of the weights' type.
        device: Name of a device; None is a GPU of CUDA where there is one.
        **options: For `from_pretrained`, such as `weighting` and `blend`.

    Returns:
        The pipeline.

    Raises:
        ValueError: If the model is missing or of another kind, or the encoder is missing or does not fit it.
    """
    import diffusers
    import torch
    import transformers

    from . import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline
    from .locations import model_index

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    classes: dict[str, Any] = {
        "StableDiffusionPipeline": FineLIPStableDiffusionPipeline,
        "StableDiffusionXLPipeline": FineLIPStableDiffusionXLPipeline,
    }
    kind = "StableDiffusionPipeline"
    if model is not None:
        kind = model_index(model, {}).get("_class_name", "model of no kind")
    if kind not in classes:
        raise ValueError(f"{model} is a {kind}: give a model of {' or '.join(classes)}.")
    options |= {"finelip": finelip, "long_prompt": long_prompt, "dtype": getattr(torch, dtype)}
    pipe = classes[kind].from_pretrained(model, **options)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _pipeline(args: argparse.Namespace):
    names = ("long_prompt", "weighting", "blend", "dtype", "device")
    return load_pipeline(args.model, args.finelip, **{name: getattr(args, name) for name in names})


def _size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, the model's where one is not given: diffusers ignores one without the other."""
    side = pipe.unet.config.sample_size
    sides = [side, side] if isinstance(side, int) else side
    return height or sides[0] * pipe.vae_scale_factor, width or sides[1] * pipe.vae_scale_factor


def _write_image(image: Any, path: Path, metadata: dict[str, Any]) -> None:
    """Writes a PNG with its settings as text, atomically."""
    from .files import png_text, writing

    prompts = {key: metadata[key] for key in ("prompt", "negative_prompt")}
    with writing(path) as part:
        image.save(part, pnginfo=png_text(**prompts, settings=metadata))


if __name__ == "__main__":
    sys.exit(main())
