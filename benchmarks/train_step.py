"""What a training step costs: FineLIP's, in the order of work of its own code, and ours, on the same batches.

A step is forward, backward and an AdamW update of a CLIP of ViT-B/16's size; random weights cost what trained ones do.
The reference pads captions to 248 tokens, refines and scores them one by one, and updates with AdamW's defaults. Its
towers are those of transformers with `sdpa`, the kernels that the original's nn.MultiheadAttention calls, too. Ours is
`TrainingStep` with the recipe `finelip` on captions trimmed to the batch's longest, and a fused AdamW; attention is
`eager` on a CPU, where it trains faster in bfloat16. The last two rows lock the image tower and look up what it makes
of the images (`--cache_dir` of the training script), as from the second epoch on: they train less, and cost less.
Losses and gradients are compared on one batch and the same weights; then all steps take turns on one model, each turn
on new scenes.

    python benchmarks/train_step.py                           # four and a half minutes of one core, 7 GB
    python benchmarks/train_step.py --device cuda --batch_size 64 --repeats 9
"""

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTokenizer, HfArgumentParser

from finelip_diffusion.data.stored import TensorStore, content_key
from finelip_diffusion.evaluation.intervals import markdown_table
from finelip_diffusion.losses import MARGIN
from finelip_diffusion.model import FineLIPConfig, FineLIPModel
from finelip_diffusion.objective import Objective, TrainingStep
from finelip_diffusion.recipes import read_recipe
from finelip_diffusion.scenes import describe, render, sample_scene
from finelip_diffusion.scores import NEGATIVE_SLOPE
from finelip_diffusion.text_encoder import MAX_LENGTH
from finelip_diffusion.tokenizer import VOCAB_SIZE, clip_tokenizer

RECIPE = Path(__file__).resolve().parents[1] / "train" / "recipes" / "finelip.yaml"
SPEED_BAR, KEPT_SPEED_BAR = 2.0, 3.0  # times the reference's images per second
LOSS_BAR = 1e-4  # relative difference of the losses, in float32

REFERENCE, FLOAT32, BFLOAT16 = "reference, float32", "ours, float32", "ours, bfloat16 autocast"
KEPT_FLOAT32, KEPT_BFLOAT16 = "ours, image tower kept, float32", "ours, image tower kept, bfloat16 autocast"
KEPT = (KEPT_FLOAT32, KEPT_BFLOAT16)
STEPS = (REFERENCE, FLOAT32, BFLOAT16, *KEPT)

Batch = dict[str, Tensor]


@dataclass
class Arguments:
    """The defaults fit a laptop."""

    batch_size: int = field(default=8, metadata={"help": "The number of images per batch, each with its caption."})
    repeats: int = field(default=3, metadata={"help": "The number of batches on which each step is timed."})
    device: str = field(default="cpu", metadata={"help": "The device: cpu or cuda."})
    tiny: bool = field(
        default=False, metadata={"help": "Whether to use towers with 2 narrow layers, as a test of this script."}
    )
    seed: int = field(default=0, metadata={"help": "The random seed for the weights and the scenes."})
    check: Literal["none", "float32", "bfloat16", "kept"] = field(
        default="none",
        metadata={
            "help": "The version of our step that must meet its targets, or the script exits with an error. "
            "kept is float32 with the image tower kept."
        },
    )


def make_step(args: Arguments) -> TrainingStep:
    """Our step with the recipe `finelip`; the reference takes its model."""
    size = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text, vision = (size, size | {"image_size": 32, "patch_size": 8}) if args.tiny else ({}, {"patch_size": 16})
    width = 32 if args.tiny else 512
    tokens = {"vocab_size": VOCAB_SIZE, "bos_token_id": VOCAB_SIZE - 2, "eos_token_id": VOCAB_SIZE - 1}
    config = CLIPConfig(  # what is left out is ViT-B's
        text_config=text | tokens | {"max_position_embeddings": MAX_LENGTH, "projection_dim": width},
        vision_config=vision | {"projection_dim": width},
        projection_dim=width,
    )
    torch.manual_seed(args.seed)
    model = FineLIPModel(FineLIPConfig(config)).train()
    step = TrainingStep(model, Objective(read_recipe(RECIPE), width, model.config.num_refined_tokens))
    return step.to(args.device)


def make_batch(args: Arguments, number: int, tokenizer: CLIPTokenizer, image_size: int) -> Batch:
    """Scenes and their captions, padded to 248 tokens with id 0, as the original pads."""
    first = (args.seed * (args.repeats + 1) + number) * args.batch_size
    scenes = [sample_scene(seed) for seed in range(first, first + args.batch_size)]
    crop = {"height": image_size, "width": image_size}
    processor = CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=crop)
    captions = [str(describe(scene)) for scene in scenes]
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    pixels = processor([render(scene) for scene in scenes], return_tensors="pt").pixel_values
    batch = {
        "pixel_values": pixels,
        "pixel_keys": torch.tensor([content_key(image) for image in pixels]),
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.attention_mask.bool(),
        "image_ids": torch.arange(args.batch_size),
    }
    return {name: tensor.to(args.device) for name, tensor in batch.items()}


def keep_images(step: TrainingStep, batches: list[Batch], folder: Path) -> None:
    """What the first epoch of a locked image tower leaves on disk, opened as the second one opens it."""
    store = TensorStore(folder)
    step.stores = {"image": store}
    step.model.set_attn_implementation("sdpa")
    for batch in batches:
        step._images(batch)
    store.flush()
    step.stores = {"image": TensorStore(folder)}


def lock(step: TrainingStep, locked: bool) -> None:
    """Whether the image tower is trained."""
    for part in (step.model.clip.vision_model, step.model.clip.visual_projection):
        part.requires_grad_(not locked)


def longest(batch: Batch) -> int:
    """Tokens of the batch's longest caption."""
    return int(batch["attention_mask"].sum(1).max())


def reference_loss(model: FineLIPModel, batch: Batch) -> Tensor:
    """FineLIP (arXiv 2504.01916, section 3) in the order of work of its training code."""
    assert model.image_refinement is not None and model.text_refinement is not None
    images = model.encode_image(batch["pixel_values"])[1]  # (B, 1 + P, E)
    texts = model.clip.text_projection(model.clip.text_model(batch["input_ids"]).last_hidden_state)  # (B, 248, E)
    lengths = [int(ids.count_nonzero()) for ids in batch["input_ids"]]
    refined_images = model.image_refinement(images[:, 1:])  # (B, K, E)
    columns = []
    for text, length in zip(texts, lengths, strict=True):
        refined_text = model.text_refinement(text[None, : length - 1])  # (1, K, E)
        caption = F.normalize(torch.cat([refined_text, text[None, length - 1 : length]], dim=1), dim=-1)
        patches = F.normalize(torch.cat([images[:, :1], refined_images], dim=1), dim=-1)  # (B, 1 + K, E)
        repeated = caption.repeat(len(patches), 1, 1)  # (B, K + 1, E)
        similarity = F.leaky_relu(torch.bmm(repeated, patches.transpose(1, 2)), NEGATIVE_SLOPE)  # (B, K + 1, 1 + K)
        columns.append(similarity.max(2).values.mean(1) + similarity.max(1).values.mean(1))  # (B,)
    scores = torch.stack(columns, dim=1)
    right = scores.diagonal()
    same = batch["image_ids"][:, None] == batch["image_ids"]
    of_images = (MARGIN + scores - right[:, None]).clamp(min=0).masked_fill(same, 0)
    of_captions = (MARGIN + scores - right).clamp(min=0).masked_fill(same, 0)
    return of_images.sum() + of_captions.sum()


def loss_of(name: str, step: TrainingStep, batch: Batch) -> Tensor:
    """The loss by one of `STEPS`."""
    device = batch["input_ids"].device.type
    step.model.set_attn_implementation("eager" if name != REFERENCE and device == "cpu" else "sdpa")
    lock(step, name in KEPT)
    if name == REFERENCE:
        return reference_loss(step.model, batch)
    stores, step.stores = step.stores, step.stores if name in KEPT else {}
    length = longest(batch)
    trimmed = batch | {key: batch[key][:, :length] for key in ("input_ids", "attention_mask")}
    with torch.autocast(device, torch.bfloat16, enabled=name in (BFLOAT16, KEPT_BFLOAT16)):
        loss = torch.stack(list(step(trimmed).values())).sum()
    step.stores = stores
    return loss


def gradients_of(name: str, step: TrainingStep, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """The loss by one of `STEPS`, and the gradients by the names of the weights."""
    step.zero_grad()
    loss = loss_of(name, step, batch)
    loss.backward()
    return loss.item(), {key: weight.grad for key, weight in step.named_parameters() if weight.grad is not None}


def compare(step: TrainingStep, batch: Batch) -> dict[str, tuple[float, float, float]]:
    """Each step's loss, its relative difference to the reference's, and the largest difference of any gradient.

    The last is relative to the reference's largest gradient; a locked tower has none.
    """
    expected_loss, expected = gradients_of(REFERENCE, step, batch)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    found = {REFERENCE: (expected_loss, 0.0, 0.0)}
    for name in STEPS[1:]:
        loss, gradients = gradients_of(name, step, batch)
        trained = {key for key in expected if name not in KEPT or ".clip.vis" not in key}
        if gradients.keys() != trained:
            raise ValueError(f"{name} trains other weights, such as {min(gradients.keys() ^ trained)}.")
        difference = max((gradients[key] - expected[key]).abs().max().item() for key in trained)
        found[name] = loss, abs(loss - expected_loss) / expected_loss, difference / largest
    return found


def seconds(name: str, step: TrainingStep, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    """Of one step; on a CPU those of the process itself, so that other load on the machine does not count."""
    clock = time.perf_counter if batch["input_ids"].is_cuda else time.process_time
    start = clock()
    optimizer.zero_grad()
    loss_of(name, step, batch).backward()
    optimizer.step()
    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def missed_bars(name: str, speed: float, loss_difference: float) -> list[str]:
    """A sentence for each bar that a step of ours misses: its speed, or the difference of the losses in float32."""
    missed = []
    bar = KEPT_SPEED_BAR if name in KEPT else SPEED_BAR
    if not speed >= bar:
        missed.append(f"{name}: {speed:.2f} times the reference's images per second, but the bar is {bar:g}.")
    if not loss_difference <= LOSS_BAR:
        in_float32 = KEPT_FLOAT32 if name in KEPT else FLOAT32
        missed.append(f"{in_float32}: the loss differs by {loss_difference:.1e}, but the bar is {LOSS_BAR:g}.")
    return missed


def main(args: Arguments) -> None:
    torch.set_num_threads(1)
    step = make_step(args)
    tokenizer = clip_tokenizer(MAX_LENGTH, pad_token="!")
    size = step.model.config.clip_config.vision_config.image_size
    batches = [make_batch(args, number, tokenizer, size) for number in range(args.repeats + 1)]
    with tempfile.TemporaryDirectory() as folder:
        keep_images(step, batches, Path(folder))
        measure(args, step, batches)


def measure(args: Arguments, step: TrainingStep, batches: list[Batch]) -> None:
    found = compare(step, batches[0])
    lock(step, False)
    optimizers = {
        name: torch.optim.AdamW(step.parameters(), lr=1e-6, fused=fused)
        for name, fused in ((REFERENCE, None), (FLOAT32, True))
    }
    optimizers |= dict.fromkeys((BFLOAT16, *KEPT), optimizers[FLOAT32])  # the same weights, the same states
    for optimizer in optimizers.values():
        optimizer.step()  # takes memory for its states
    took: dict[str, list[float]] = {name: [] for name in STEPS}
    for batch in batches[1:]:
        for name in STEPS:
            took[name].append(seconds(name, step, batch, optimizers[name]))
    speeds = {
        name: statistics.median(theirs / ours for theirs, ours in zip(took[REFERENCE], took[name], strict=True))
        for name in STEPS
    }

    lengths = [longest(batch) for batch in batches[1:]]
    where = torch.cuda.get_device_name() if args.device == "cuda" else "seconds of one CPU thread"
    print(
        f"{args.repeats} batches of {args.batch_size} scenes, captions trimmed to {min(lengths)}..{max(lengths)} "
        f"tokens or padded to {MAX_LENGTH}; forward, backward and update; {where}, torch {torch.__version__}\n"
    )
    heads = ["step", "images/s", "times the reference", "loss", "difference", "largest gradient difference"]
    rows = []
    for name, (loss, difference, gradient) in found.items():
        rate = args.batch_size / statistics.median(took[name])
        errors = [f"{difference:.1e}", f"{gradient:.1e}"]
        rows.append([name, f"{rate:.3g}", f"{speeds[name]:.2f}", f"{loss:.5f}", *errors])
    print(*markdown_table(heads, rows), sep="\n")
    print(
        f"\nbars: {SPEED_BAR:g} times the reference, {KEPT_SPEED_BAR:g} with the image tower kept; losses equal "
        f"within {LOSS_BAR:g} in float32"
    )
    checked = {"none": None, "float32": FLOAT32, "bfloat16": BFLOAT16, "kept": KEPT_FLOAT32}[args.check]
    in_float32 = KEPT_FLOAT32 if checked in KEPT else FLOAT32
    if checked and (missed := missed_bars(checked, speeds[checked], found[in_float32][1])):
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
