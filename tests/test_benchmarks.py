"""The benchmarks at a tiny size: what they compare agrees, and their bars can be missed."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import scripts

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script as a module of its own for each test."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def run_script(name: str, *flags: str, bare: bool = False) -> str:
    done = scripts.run(BENCHMARKS / f"{name}.py", *flags, bare=bare)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def table_of(output: str) -> dict[str, list[float]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if "|" in line][2:]
    return {name: [float(value) for value in values] for name, *values in cells}


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Without a bar for its speed."""
    module = load_script("train_step", monkeypatch)
    module.SPEED_BAR = 0.0
    return module


def tiny(train_step: ModuleType, **flags: object):
    return train_step.Arguments(batch_size=4, repeats=1, tiny=True, check="float32", **flags)


def test_the_steps_agree_and_the_table_says_so() -> None:
    rows = table_of(run_script("train_step", "--tiny", "--batch_size", "4", "--repeats", "1"))
    rate, speed, loss, difference, gradient = rows["ours, float32"]
    assert rate > 0 and speed > 0
    assert loss == pytest.approx(rows["reference, float32"][2], rel=1e-4)
    assert difference <= 1e-6  # a sum of 24 hinges, each rounded to float32
    assert gradient <= 1e-5  # rounding, through two towers of two layers
    assert rows["ours, bfloat16 autocast"][4] > 1e-4  # so differences are seen
    rate, speed, loss, difference, gradient = rows["ours, image tower kept, float32"]
    assert rate > 0 and speed > 0
    assert difference <= 2e-3 and gradient <= 2e-2  # image tokens are kept in half precision


def test_every_bar_can_be_met_and_missed(train_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step.main(tiny(train_step))
    monkeypatch.setattr(train_step, "SPEED_BAR", math.inf)
    with pytest.raises(SystemExit, match="times the reference's images per second"):
        train_step.main(tiny(train_step))
    monkeypatch.setattr(train_step, "SPEED_BAR", 0.0)
    assert train_step.missed_bars(train_step.KEPT_FLOAT32, 3.0, 1e-4) == []
    assert len(train_step.missed_bars(train_step.KEPT_BFLOAT16, 2.9, 2e-4)) == 2
    monkeypatch.setattr(train_step, "MARGIN", 0.3)  # of the reference alone
    with pytest.raises(SystemExit, match="the loss differs"):
        train_step.main(tiny(train_step))


@pytest.mark.parametrize("name", ["reference, float32", "ours, float32"])
def test_captions_are_read_to_their_last_word(train_step: ModuleType, name: str) -> None:
    args = tiny(train_step)
    step = train_step.make_step(args)
    batch = train_step.make_batch(args, 0, train_step.clip_tokenizer(248, pad_token="!"), 32)
    row = batch["attention_mask"].sum(1).argmax()
    before = train_step.loss_of(name, step, batch).item()
    batch["input_ids"][row, batch["attention_mask"][row].sum() - 2] += 1  # in front of the end token
    assert train_step.loss_of(name, step, batch).item() != pytest.approx(before, rel=1e-6)


def test_the_tools_agree_on_the_distance_and_the_table_says_so() -> None:
    flags = ["--num_images", "4", "--repeats", "1", "--batch_size", "3", "--memory_images", "30", "90"]
    output = run_script("evaluate", *flags, bare=True)  # it measures what processes of its own take
    rows = table_of(output)
    assert list(rows) == ["ours", "torch-fidelity", "clean-fid"]
    for rate, speed, features, seconds, distance in rows.values():
        assert min(rate, speed, features, seconds) > 0
        assert distance == pytest.approx(rows["ours"][-1], rel=1e-3)
    peaks = dict(re.findall(r"(\d+) images (\d+) MB", output))
    assert 0.9 * float(peaks["30"]) < float(peaks["90"]) < 1.1 * float(peaks["30"])


def test_every_bar_of_scoring_can_be_met_and_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    missed_bars = load_script("evaluate", monkeypatch).missed_bars
    assert missed_bars({"a": 1.0}, {"a": 1e-3}, {1_000: 100.0, 20_000: 105.0}) == []
    missed = missed_bars({"a": 0.99, "b": 1.5}, {"a": 1e-4, "b": math.nan}, {1_000: 100.0, 20_000: 106.0})
    assert [sentence.split(",")[0] for sentence in missed] == [
        "0.99 times the images per second of a",
        "the distance differs by nan from that of b",
        "20000 images take 1.06 times the memory of 1000",
    ]


@pytest.fixture(scope="module")
def full_size_output() -> str:
    flags = {"rounds": 1, "encodings": 1, "encodings_xl": 1, "latent_size": 8}
    numbers = [f"--{name}={value}" for name, value in flags.items()]
    return run_script("full_size", "--tiny", *numbers, "--very_long", "300", "600", "900")


def test_full_size_does_the_same_work_on_both_sides(full_size_output: str) -> None:
    for part in ("one step", "SD 1.5, encoding", "SDXL, encoding"):
        table = re.search(rf"{part}.*\n\n((?:\|.*\n)+)", full_size_output)
        assert table is not None, full_size_output
        rows = [line.split("|")[1:-1] for line in table[1].splitlines()[2:]]
        assert [int(row[0]) for row in rows] == [77, 248, 496]
        assert all(float(row[-1]) < 1e-5 for row in rows)  # rounding, where windows make other batches


def test_full_size_counts_what_longer_states_add(full_size_output: str) -> None:
    (ratios,) = re.findall(r"operations of a step.*: (.*) at 77, (.*) at 248, (.*) at 496", full_size_output)
    one, longer, longest = map(float, ratios)
    assert one == 1 < longer < longest
    assert longest - 1 == pytest.approx((496 - 77) / (248 - 77) * (longer - 1), abs=2e-3)  # printed to three digits


def test_full_size_reads_very_long_prompts_in_windows(full_size_output: str) -> None:
    rows = table_of(full_size_output.split("very long")[1].split("\n\n")[1])
    assert [rows[str(tokens)][0] % 248 for tokens in (300, 600, 900)] == [0, 0, 0]
    assert rows["300"][0] < rows["600"][0] < rows["900"][0]
    assert re.search(r"time grows with the power \d", full_size_output)


def test_full_size_is_the_size_of_the_published_models(monkeypatch: pytest.MonkeyPatch) -> None:
    full_size = load_script("full_size", monkeypatch)
    for name in ("text_encoder", "text_encoder_2", "unet"):
        full_size.empty(name, full_size.Arguments())
    monkeypatch.setitem(full_size.UNET, "cross_attention_dim", 1024)  # SD 2.x
    with pytest.raises(ValueError, match="the unet has 865910724 parameters, not the 859520964"):
        full_size.empty("unet", full_size.Arguments())


def test_every_bar_of_full_size_can_be_met_and_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    full_size = load_script("full_size", monkeypatch)

    def costs(same_length: float, longer: float) -> dict:
        seconds = {(length, side): 1.0 for length in full_size.LENGTHS for side in ("stock", "ours")}
        seconds |= {(496, "ours"): same_length, (248, "ours"): longer, (248, "stock"): longer}
        return {name: [full_size.Cost(cpu, 1.0, 1.0)] for name, cpu in seconds.items()}

    assert full_size.missed_bars("step", costs(1.01, 1.06)) == []
    same_length, longer = full_size.missed_bars("step", costs(1.02, 1.07))
    assert "1.020 times the stock pipeline's CPU seconds at 496" in same_length
    assert "1.070 times the CPU seconds of 77 tokens at 248" in longer
    assert full_size.missed_bars("encoding", costs(1.0, 3.0)) == []


def test_image_tuning_sets_an_update_beside_the_bare_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny UNet is a small part of an update, so the bar is missed here, and that is said."""
    flags = ["--tiny", "--batch_size", "2", "--rounds", "1", "--latent_size", "8", "--mixed_precision", "no"]
    done = scripts.run(BENCHMARKS / "image_tuning.py", *flags, "--check")
    assert done.returncode != 0 and "times the bare UNet; the bar is 1.15" in done.stderr.splitlines()[-1]
    time, memory = done.stdout.split("images of 64 pixels")
    rows = table_of(time)
    assert list(rows) == ["77", "248"]
    for alone, whole, ratio in rows.values():
        assert whole > alone > 0 and ratio == pytest.approx(whole / alone, rel=0.05)  # printed to a tenth of a ms
    kept = table_of(memory)
    assert kept["without checkpointing"][0] > kept["with checkpointing"][0] >= 0
    done = scripts.run(BENCHMARKS / "image_tuning.py", *flags, "--terms", "restated_attention", "kept_states")
    assert done.returncode == 0 and list(table_of(done.stdout.split("images of 64 pixels")[0])) == ["77", "248"]
    done = scripts.run(BENCHMARKS / "image_tuning.py", *flags, "--terms", "noise")
    assert done.stderr.splitlines()[-1].startswith("--terms has noise: choose among denoising, restated_predictions")


def test_latents_are_compared_by_both_costs(tmp_path: Path) -> None:
    """A shape, hardly trained; the table comes back from the report without training anything again."""
    flags = {"output_dir": tmp_path, "shapes": "18x2", "autoencoder_steps": 1, "unet_steps": 1, "num_captions": 16,
             "autoencoder_batch_size": 2, "unet_batch_size": 2, "num_pictures": 6, "num_inference_steps": 2,
             "num_resamples": 2}  # fmt: skip
    words = [f"--{name}={value}" for name, value in flags.items()]
    done = scripts.run(BENCHMARKS / "latents.py", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "report.json").read_text())["18x2"]
    assert all(figures[name]["n"] == 6 and figures[name]["value"] > 0 for name in ("autoencoder", "unet", "both"))
    assert 0 <= figures["found"]["value"] <= 1 and figures["found"]["n"] >= 6
    weights = tmp_path / "18x2" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    trained = weights.stat().st_mtime_ns
    again = scripts.run(BENCHMARKS / "latents.py", *words)
    (row,) = (line.strip("| ").split(" | ") for line in again.stdout.splitlines() if line.startswith("| 18x18"))
    assert row[:2] == ["18x18x2", "648"] and row[4].startswith(f"{figures['both']['value']:.1f} [")
    assert weights.stat().st_mtime_ns == trained
    other = scripts.run(BENCHMARKS / "latents.py", *words, "--seed=1")
    assert "was made with" in other.stderr and "give the same settings, or another --output_dir." in other.stderr
    wrong = scripts.run(BENCHMARKS / "latents.py", "--shapes", "10x4")
    assert "--shapes has 10x4: give SIDExCHANNELS, such as 9x16" in wrong.stderr.splitlines()[-1]


def test_half_of_the_text_encoders_stays_without_the_stock_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    loading = load_script("loading", monkeypatch)
    loading.write(tmp_path, tiny=True)
    found = {}
    for row in ("xl/both", "xl/long alone"):
        capsys.readouterr()
        loading.load(tmp_path, row)
        found[row] = json.loads(capsys.readouterr().out)["stays"]
    # the position table of a stock encoder is shorter
    assert found["xl/both"] / 2 < found["xl/long alone"] < 0.51 * found["xl/both"]
