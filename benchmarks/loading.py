"""What loading costs in memory at full size: a long encoder beside the stock ones, and without them.

Stable Diffusion 1.5 and SDXL with text encoders of their published sizes, random weights in half precision, and tiny
UNets that read their widths, written to a folder and loaded in a new process for each row. The peak is that of the
process over what it held before (VmHWM), pages of the files that are read included; what stays are the bytes of the
text encoders' weights.

    python benchmarks/loading.py                      # four minutes of one core, 6 GB of memory and of disk
    python benchmarks/loading.py --tiny True          # a test of this script
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, HfArgumentParser

from finelip_diffusion.text_encoder import save_text_encoder
from finelip_diffusion.tokenizer import VOCAB_SIZE, clip_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from full_size import TEXT, TEXT_2, TINY

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "sd": {"both": {}, "long alone": {"stock_text_encoder": None}},
    "xl": {"both": {}, "long alone": {"stock_text_encoder": None, "stock_text_encoder_2": None}},
}


@dataclass
class Arguments:
    """The defaults are the sizes of the published models."""

    tiny: bool = field(
        default=False,
        metadata={"help": "Whether to use narrow text encoders with 2 layers, as a test of this script."},
    )
    folder: Path | None = field(
        default=None, metadata={"help": "The folder to load from. Only for the process that measures one row."}
    )
    row: str | None = field(default=None, metadata={"help": "The row that this process loads."})


def text_encoder(size: dict[str, Any], tiny: bool, positions: int, projection: bool = False) -> Any:
    """Of random weights in half precision."""
    tokens = {"vocab_size": VOCAB_SIZE, "bos_token_id": VOCAB_SIZE - 2, "eos_token_id": VOCAB_SIZE - 1}
    config = CLIPTextConfig(**size | (TINY if tiny else {}), **tokens, max_position_embeddings=positions)
    torch.set_default_dtype(torch.float16)
    module = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    torch.set_default_dtype(torch.float32)
    return module.eval()


def write(folder: Path, tiny: bool) -> None:
    """The two pipelines and the long encoder."""
    first, second = text_encoder(TEXT, tiny, 77), text_encoder(TEXT_2, tiny, 77, projection=True)
    save_text_encoder(text_encoder(TEXT, tiny, 248), clip_tokenizer(248), folder / "long")
    small = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    vae, scheduler = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8), DDIMScheduler()
    widths = [encoder.config.hidden_size for encoder in (first, second)]
    parts = {"vae": vae, "scheduler": scheduler, "text_encoder": first, "tokenizer": clip_tokenizer(77)}
    unet = UNet(**small, **blocks, cross_attention_dim=widths[0], attention_head_dim=4)
    StableDiffusionPipeline(
        **parts, unet=unet, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(folder / "sd")
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = UNet(
        **small, **blocks, **added, cross_attention_dim=sum(widths), attention_head_dim=4,
        projection_class_embeddings_input_dim=6 * 8 + second.config.projection_dim,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        **parts, unet=unet, text_encoder_2=second, tokenizer_2=clip_tokenizer(77, pad_token="!"), add_watermarker=False
    ).save_pretrained(folder / "xl")


def status(name: str) -> float:
    """A line of /proc/self/status in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def load(folder: Path, row: str) -> None:
    """Loads one row and prints what it cost, as JSON."""
    from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline

    kind, _, option = row.partition("/")
    classes: dict[str, Any] = {"sd": FineLIPStableDiffusionPipeline, "xl": FineLIPStableDiffusionXLPipeline}
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    pipe = classes[kind].from_pretrained(
        folder / kind, folder / "long", torch_dtype=torch.float16, **OPTIONS[kind][option]
    )
    stays = sum(
        tensor.nbytes
        for name, part in pipe.components.items()
        if "text_encoder" in name and part is not None
        for tensor in part.state_dict().values()
    )
    print(json.dumps({"peak": status("VmHWM") - before, "stays": stays / 2**20}))


def main(args: Arguments) -> None:
    if args.row is not None and args.folder is not None:
        load(args.folder, args.row)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.tiny)
        print(f"{'':<16} {'peak, MB':>10} {'stays, MB':>10}")
        for row in [f"{kind}/{option}" for kind, options in OPTIONS.items() for option in options]:
            command = [sys.executable, __file__, "--folder", folder, "--row", row]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{row:<16} {found['peak']:>10,.0f} {found['stays']:>10,.0f}", flush=True)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
