"""The report: three files that say the same, a page that stands alone, marks that claim no more than figures do."""

import base64
import copy
import json
import re
import resource
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from finelip_diffusion.evaluation.report import FLOOR, LARGEST_PICTURE, MARKERS, markdown, tables, write_report
from finelip_diffusion.scenes import render, sample_scene, vary

PROMPT = "A <script>alert('x')</script> & a <b>red</b> star, " + "far" * 90 + ", then a blue cross at the end."
KEPT = 60
VOID = {"meta", "img", "br", "link", "input", "hr"}


def figure(value: float | None, base: float | None = None, half: float = 0.02, n: int = 200) -> dict[str, Any]:
    """A value with an interval around it, and the paired difference to a baseline's."""
    own = {"value": value, "low": None, "high": None, "n": n, "difference": None}
    if value is not None:
        own |= {"low": value - half, "high": value + half}
    if value is not None and base is not None:
        own["difference"] = {"value": value - base, "low": value - base - half, "high": value - base + half}
    return own


def curve(*values: float | None) -> list[dict]:
    bins = [(0, 40), (40, 76), (76, 120), (120, 249)]
    return [
        {"from": first, "to": last, "value": value, "n": 9}
        | {"low": None if value is None else value - 0.05, "high": None if value is None else value + 0.05}
        for (first, last), value in zip(bins, values, strict=True)
    ]


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    """Two UNets, three encoders, pictures of scenes."""
    behind = {"truncate": 0.01, "chunk": 0.53, "long": 0.64}
    conditions, images = {}, {}
    for unet, gain in (("base", 0.0), ("adapted", 0.1)):
        for place, (encoder, found) in enumerate(behind.items()):
            base = None if encoder == "truncate" else 0.01
            key = f"{unet}/{encoder}"
            conditions[key] = {
                "unet": unet,
                "encoder": encoder,
                "label": f"{encoder} $encoder$",
                "about": f"what {encoder} does",
                "figures": {
                    "distance": figure(40 - 10 * found, None if base is None else 39.9, 1.5),
                    "found_after": figure(found + gain * place, base),
                    "short": figure(0.96 - 0.005 * place, None if base is None else 0.96),
                },
                "curves": {"found": curve(0.97, 0.95, found, None if encoder == "chunk" else found / 2)},
            }
            images[key] = f"images/{key}.png"
            (tmp_path / images[key]).parent.mkdir(parents=True, exist_ok=True)
            render(vary(sample_scene(0), "move", place)).save(tmp_path / images[key])
    render(sample_scene(9)).save(tmp_path / "reference.png")
    about = {"group": "Adherence", "better": "higher", "digits": 3, "note": None}
    return {
        "title": "Long <prompts>",
        "command": "python train/evaluate_fid.py --config a.yaml",
        "settings": {"steps": 20, "finelip": None},
        "versions": {"torch": "2.9"},
        "prompts": {"source": "scenes", "n": 2000, "seeds": [0, 1999], "mean_tokens": 101.2, "beyond_77": 0.98},
        "floors": {
            "distance": {
                "autoencoder": figure(38.0, half=1.0) | {"label": "the references' own reconstructions"},
                "wrong_1": figure(12.0, half=0.5) | {"label": "pictures with 1 fact wrong"},
            }
        },
        "figures": {
            "distance": {"label": "Frechet distance", "group": "Likeness", "better": "lower", "digits": 1},
            "found_after": about | {"label": "found after token 77"},
            "short": about | {"label": "found | short", "group": "Short prompts"},
        },
        "baseline": "truncate",
        "conditions": conditions,
        "curves": {"found": {"label": "found, by where the fact ends", "unit": "share of facts", "note": "n"}},
        "warnings": ["n = 200 is below 2,048"],
        "examples": [
            {"index": 17, "kind": "best", "why": "long finds 9 of 9", "prompt": PROMPT, "kept_characters": KEPT,
             "reference": "reference.png", "images": images, "scores": {"base/long": "9 of 9"}},
        ],
        "changes": [
            {"index": 3, "before": "blue cross", "after": "red cross", "prompt": PROMPT,
             "span": [PROMPT.index("blue"), PROMPT.index(" at the end")],
             "images": {"base/long": [images["base/truncate"], images["base/long"]]}, "where": {"base/long": "0.93"}},
        ],
    }  # fmt: skip


class Page(HTMLParser):
    """A parsed page: its elements as (tag, attributes, text inside), and a check that they nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.elements[index][2].append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        """What stands inside every such element."""
        return [
            "".join(inside)
            for name, found, inside in self.elements
            if name == tag and all(found.get(key) == value for key, value in attributes.items())
        ]

    def values(self, name: str) -> list[str]:
        """Every value of an attribute."""
        return [value for _, found, _ in self.elements if (value := found.get(name)) is not None]


def written(report: dict, folder: Path) -> tuple[dict, str, Page]:
    write_report(report, folder)
    texts = [(folder / f"report.{ending}").read_text(encoding="utf-8") for ending in ("json", "md", "html")]
    return json.loads(texts[0]), texts[1], Page(texts[2])


# -------------------------------------------------------------------------------------------------------------- files


def test_every_figure_is_in_all_three_files(report: dict, tmp_path: Path) -> None:
    kept, text, page = written(report, tmp_path)
    assert kept == report
    cells = [cell for table in tables(report) for rows in table["rows"].values() for _, row in rows for cell in row]
    assert len(cells) == 3 * len(report["conditions"])
    inside = ["".join(row) for row in page.texts("td")]
    for cell in cells:
        assert any(cell["value"] in found and cell["difference"] in found for found in inside)
        assert f"{cell['value']}" in text and cell["difference"] in text
    assert "| **0.840** [0.820, 0.860] | ▲ +0.830 [+0.810, +0.850] | 200 |" in text
    assert (
        "### Found | short (higher is better)" in text
        and "n = 200 is below 2,048" in text
        and report["command"] in text
    )
    assert page.texts("h1") == [report["title"]]
    assert page.texts("code") == [report["command"]]
    assert page.texts("h3")[-1] == "Versions"
    assert "n = 200 is below 2,048" in page.texts("aside")[0]
    assert not list(tmp_path.glob("*.part"))


def test_the_same_report_gives_the_same_bytes(report: dict, tmp_path: Path) -> None:
    """However the user has set matplotlib, whose settings stay as they are."""
    files = [tmp_path / f"report.{ending}" for ending in ("json", "md", "html")]
    write_report(report, tmp_path)
    first = [file.read_bytes() for file in files]
    with matplotlib.rc_context({"svg.hashsalt": "mine", "font.size": 30, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        write_report(copy.deepcopy(report), tmp_path)
        assert dict(matplotlib.rcParams) == before
    assert [file.read_bytes() for file in files] == first


def test_what_is_missing_is_left_out(report: dict, tmp_path: Path) -> None:
    for key in ("curves", "examples", "changes", "warnings", "settings", "versions", "floors"):
        del report[key]
    for condition in report["conditions"].values():
        del condition["curves"], condition["about"]
        condition["figures"]["short"] = None
    report["conditions"]["base/long"]["figures"] = {"distance": figure(None)}
    _, text, page = written(report, tmp_path)
    assert text.count("| base | long $encoder$ | – |") == 3
    assert page.texts("h2") == ["Figures", "How to reproduce"]
    assert not {"aside", "svg", "img", "del", "figure"} & {tag for tag, _, _ in page.elements}
    assert "–" in {cell.strip() for cell in page.texts("td")}


def test_a_report_without_its_baseline_compares_nothing(report: dict, tmp_path: Path) -> None:
    report["conditions"] = {key: one for key, one in report["conditions"].items() if one["encoder"] == "long"}
    report["conditions"]["base/long"]["figures"]["found_after"]["difference"] = None
    report["examples"] = report["changes"] = []
    _, text, _ = written(report, tmp_path)
    assert "| base | long $encoder$ | **0.640** [0.620, 0.660] |  | 200 |" in text


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("conditions", "base/long", "figures", "short", "value"), float("nan"), "is not JSON"),
        (("conditions", "base/long", "figures", "speed"), figure(1.0), r"base/long has figures .*\['speed'\]"),
        (("conditions", "base/long", "curves", "other"), curve(0, 0, 0, 0), r"base/long has curves .*\['other'\]"),
        (("figures", "short", "better"), "more", "figure short is better when 'more'"),
        (("floors", "speed"), {}, r"floors are given for \['speed'\]"),
        (("examples", 0, "images", "base/other"), "a.png", r"prompt 17 has images of \['base/other'\]"),
        (("examples", 0, "reference"), "none.png", r"none\.png: missing file"),
        (("changes", 0, "images", "base/long"), ["reference.png", "large.png"], "prompt 3 has pictures of"),
    ],
)
def test_what_would_be_shown_wrongly_is_refused(
    report: dict, tmp_path: Path, place: tuple, value: Any, message: str
) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "large.png")
    inner = report
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(ValueError, match=message) as caught:
        write_report(report, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("report.*"))


def test_a_folder_that_cannot_be_written_is_one_sentence(report: dict, tmp_path: Path) -> None:
    report["examples"] = report["changes"] = []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"report.json cannot be written \(File exists\): free some space"):
        write_report(report, tmp_path / "file")


def test_a_full_disk_leaves_the_report_before(report: dict, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    report["title"] = "Another"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limit[1]))  # stands for the disk
    try:
        with pytest.raises(ValueError, match=r"report.html cannot be written \(File too large\)"):
            write_report(report, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "report.json").read_bytes() == before


# -------------------------------------------------------------------------------------------------------------- marks


def test_signs_stand_only_where_an_interval_excludes_zero(report: dict) -> None:
    marked = {}
    for table in tables(report):
        for unet, rows in table["rows"].items():
            for condition, cells in rows:
                for column, cell in zip(table["columns"], cells, strict=True):
                    marked[column["label"], unet, condition["encoder"]] = cell["standing"]
    assert marked["Frechet distance", "base", "long"] == "better"
    assert marked["found | short", "base", "chunk"] == "open"
    assert marked["found | short", "base", "truncate"] is None
    found = re.findall(r"\| ([▲▼]?) ?[+−][\d.]+ \[([+−\d.]+), ([+−\d.]+)\] \|", markdown(report))
    assert len(found) > 8
    for sign, low, high in found:
        ends = [float(end.replace("−", "-")) for end in (low, high)]
        assert bool(sign) == (ends[0] * ends[1] > 0)


def test_floors_stand_below_their_table_and_mark_what_says_nothing(report: dict, tmp_path: Path) -> None:
    report["conditions"]["base/truncate"]["figures"]["distance"]["floor"] = "autoencoder"
    _, text, page = written(report, tmp_path)
    assert f"| base | truncate $encoder$ | 39.9 [38.4, 41.4] {FLOOR} |" in text
    assert "| floor | the references' own reconstructions | 38.0 [37.0, 39.0] |  | 200 |" in text
    assert "|  | pictures with 1 fact wrong | 12.0 [11.5, 12.5] |  | 200 |" in text
    assert text.count(FLOOR) == 2  # the mark and its explanation
    cells = [cell for cell in page.texts("td") if FLOOR in cell]
    assert len(cells) == 1 and "39.9" in cells[0]
    assert any(
        "floor, the references' own reconstructions: 38.0" in note for note in page.texts("p", **{"class": "note"})
    )


def test_tables_in_markdown_have_five_columns_at_most(report: dict) -> None:
    rows = [line for line in markdown(report).splitlines() if line.startswith("|")]
    assert rows and max(line.replace("\\|", "").count("|") for line in rows) <= 6


def test_the_best_of_each_unet_is_bold(report: dict) -> None:
    (table,) = [table for table in tables(report) if table["group"] == "Likeness"]
    best = {unet: [one["encoder"] for one, (cell,) in rows if cell["best"]] for unet, rows in table["rows"].items()}
    assert best == {"base": ["long"], "adapted": ["long"]}


# --------------------------------------------------------------------------------------------------------------- page


def test_prompts_are_text_and_the_struck_part_is_what_is_dropped(report: dict, tmp_path: Path) -> None:
    _, _, page = written(report, tmp_path)
    assert "script" not in {tag for tag, _, _ in page.elements}
    struck = page.texts("del", title="never read by truncate $encoder$")
    assert struck == [PROMPT[KEPT:]]
    example, change = page.texts("p", **{"class": "prompt"})
    assert example == change == PROMPT
    assert page.texts("mark") == ["blue cross"]


def test_nothing_comes_from_outside(report: dict, tmp_path: Path) -> None:
    _, _, page = written(report, tmp_path)
    for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
        assert all(value.startswith(("#", "data:image/")) for value in page.values(name))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _, _ in page.elements}
    styles = " ".join([*page.texts("style"), *page.values("style"), *page.values("clip-path")])
    assert "@import" not in styles
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)'\"]*)", styles))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.values("href")} <= set(ids)


def test_every_picture_is_embedded_and_said(report: dict, tmp_path: Path) -> None:
    """Small ones pixel by pixel: under each UNet the reference and three encoders, and a triple of the change."""
    _, _, page = written(report, tmp_path)
    images = [attributes for tag, attributes, _ in page.elements if tag == "img"]
    assert len(images) == 2 * 4 + 3
    assert all(attributes["alt"] for attributes in images)
    first = Image.open(BytesIO(base64.b64decode(images[1]["src"].split(",")[1])))
    assert np.array_equal(np.asarray(first), np.asarray(render(vary(sample_scene(0), "move", 0))))
    before, after, difference = (
        np.asarray(Image.open(BytesIO(base64.b64decode(one["src"].split(",")[1]))).convert("RGB")).astype(int)
        for one in images[-3:]
    )
    changed = abs(before - after).max(-1)
    brightness = difference.sum(-1)
    assert changed.any() and (changed == 0).any()
    assert len(np.unique(brightness[changed == 0])) == 1
    assert brightness[changed == changed.max()].min() > brightness[changed == 0].max()
    assert all(text.startswith("Found, by where the fact ends, ") for text in page.values("aria-label")[-2:])


def test_large_pictures_are_scaled_down(report: dict, tmp_path: Path) -> None:
    Image.effect_noise((1000, 500), 60).save(tmp_path / "reference.png")
    _, _, page = written(report, tmp_path)
    (source, *_) = page.values("src")
    image = Image.open(BytesIO(base64.b64decode(source.split(",")[1])))
    assert source.startswith("data:image/jpeg") and image.size == (LARGEST_PICTURE, LARGEST_PICTURE // 2)


def test_an_encoder_has_one_colour_everywhere(report: dict, tmp_path: Path) -> None:
    """Tables, curves and captions name the same variable, and the style has one for each by day and by night."""
    write_report(report, tmp_path)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    for place, (encoder, sign) in enumerate(zip(("truncate", "chunk", "long"), MARKERS.values(), strict=False)):
        chips = page.texts("span", **{"class": "chip", "style": f"color: var(--encoder-{place})"})
        assert len(chips) > 4 and set(chips) == {f"{sign}\xa0{encoder} $encoder$"}
        labels = [one for one in re.findall(r"<text[^>]*>", source) if f"var(--encoder-{place})" in one]
        assert len(labels) == 2
    assert [source.count(f"--encoder-{place}: #") for place in range(len(MARKERS))] == [2] * len(MARKERS)
    assert "#0e0e" not in source and "#010101" not in source


def test_the_page_fits_a_phone_and_asks_for_nothing(report: dict, tmp_path: Path, browser: Any) -> None:
    """In a real browser, 375 pixels wide: only tables scroll sideways, in their own boxes."""
    write_report(report, tmp_path)
    view = browser.new_page(viewport={"width": 375, "height": 800})
    asked: list[str] = []
    view.on("request", lambda request: asked.append(request.url))
    view.goto((tmp_path / "report.html").as_uri())
    assert view.evaluate("document.documentElement.scrollWidth") == 375
    assert view.evaluate("[...document.querySelectorAll('.box')].some(box => box.scrollWidth > box.clientWidth)")
    assert view.locator("svg").count() == 2 and view.locator("svg").first.bounding_box()["width"] > 280
    assert view.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
