"""The report of an evaluation: every figure as JSON, the tables in Markdown, and one page of a template."""

import base64
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageOps

from ..data.sources import Unusable, open_image
from ..files import writing
from ..scenes import STOCK_CONTENT_TOKENS
from .intervals import interval, markdown_table, number, shown

BORDER = STOCK_CONTENT_TOKENS + 2  # start and end count: token 77
SHOWN_AS_PIXELS = 160  # pictures up to this side are kept as they are: those of scenes are
LARGEST_PICTURE = 384  # pixels; larger ones are scaled down to this side
FLOOR = "= floor"  # marks a figure that says nothing
SIGNS = {"better": "▲ ", "worse": "▼ ", "open": "", None: ""}
MARKERS = {"o": "●", "s": "■", "D": "◆", "*": "★", "P": "✚", "X": "✖", "p": "⬟", "h": "⬢"}
"""Of the encoders in order, the baseline first: for matplotlib, and as text. The template has a color for each."""
INK, ENCODER_INK = "#010101", "#0e0e"
"""What curves are drawn in, the place of the encoder behind: it stands for the page's colors by day and by night."""

Report = dict[str, Any]


def write_report(report: Report, folder: Path) -> None:
    """Writes `report.json` (everything), `report.md` (the tables) and `report.html` (one page, pictures included).

    Each file is written atomically. The same report and pictures give the same bytes.

    Args:
        report: Plain data; `docs/report.md` in the repository says what it holds.
        folder: Where the files go, and what the paths of pictures start from; made where it is missing.

    Raises:
        ValueError: If a figure is NaN or infinite, or stands in a condition and nothing describes it; if a picture is
            missing or unreadable; if the folder cannot be written.
    """
    _check(report)
    files = {
        "report.json": json.dumps(report, indent=1, ensure_ascii=False) + "\n",
        "report.md": markdown(report),
        "report.html": page(report, folder),
    }
    with ExitStack() as together:
        for name, text in files.items():
            together.enter_context(writing(folder / name)).write_text(text, encoding="utf-8")


def _check(report: Report) -> None:
    """Refuses what would be left out in silence, or shown wrongly."""
    try:
        json.dumps(report, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the report is not JSON ({error}): give plain data, and None where nothing is known."
        ) from error
    figures, conditions = report["figures"], report["conditions"]
    for key, about in figures.items():
        if about["better"] not in ("lower", "higher"):
            raise ValueError(f"figure {key} is better when {about['better']!r}: say 'lower' or 'higher'.")
    if unknown := set(report.get("floors") or ()) - set(figures):
        raise ValueError(f"floors are given for {sorted(unknown)}, but figures are {list(figures)}.")
    for name, condition in conditions.items():
        for kind in ("figures", "curves", "breakdowns"):
            if unknown := set(condition.get(kind) or ()) - set(report.get(kind) or ()):
                raise ValueError(
                    f"condition {name} has {kind} that nothing describes: add {sorted(unknown)} to report[{kind!r}]."
                )
    for item in [*(report.get("examples") or ()), *(report.get("changes") or ())]:
        if unknown := set(item["images"]) - set(conditions):
            raise ValueError(
                f"prompt {item['index']} has images of {sorted(unknown)}, but conditions are {list(conditions)}."
            )


# -------------------------------------------------------------------------------------------------- parts of a report


def _figure(condition: dict, key: str) -> dict[str, Any]:
    """A condition's figure; empty where it was not measured."""
    return (condition.get("figures") or {}).get(key) or {}


def _points(condition: dict, key: str) -> list[dict]:
    """A condition's curve; empty where it has none."""
    return (condition.get("curves") or {}).get(key) or []


def _unets(report: Report) -> list[str]:
    return list(dict.fromkeys(one["unet"] for one in report["conditions"].values()))


def _encoders(report: Report) -> list[str]:
    """Every encoder, the baseline first: the order of colors and markers."""
    return list(dict.fromkeys([report["baseline"], *(one["encoder"] for one in report["conditions"].values())]))


def _baseline_label(report: Report) -> str:
    baseline = report["baseline"]
    return next((one["label"] for one in report["conditions"].values() if one["encoder"] == baseline), baseline)


def _of_folders(report: Report) -> bool:
    """Whether folders of pictures are compared, of whose UNets and noise nothing is known."""
    return _unets(report) == [""]


def _under(unet: str, start: str = "") -> str:
    """`START base UNet`; empty where nothing is known of it."""
    return f"{start}{unet} UNet" if unet else ""


def _baseline(report: Report, unet: str) -> dict:
    """The baseline's condition under a UNet; empty where it was not drawn."""
    conditions = report["conditions"].values()
    return next((one for one in conditions if one["unet"] == unet and one["encoder"] == report["baseline"]), {})


def _best(conditions: Iterable[dict], key: str, better: str) -> dict | None:
    """The condition with the best value of a figure; None where none has a value."""
    measured = [one for one in conditions if _figure(one, key).get("value") is not None]
    choose = max if better == "higher" else min
    return choose(measured, key=lambda one: one["figures"][key]["value"], default=None)


def _standing(difference: dict | None, better: str) -> str | None:
    """What a paired difference shows: "better", "worse", "open" where its interval holds 0, None without interval."""
    if difference is None or difference.get("low") is None or difference.get("high") is None:
        return None
    if difference["low"] <= 0 <= difference["high"]:
        return "open"
    return "better" if (difference["low"] > 0) == (better == "higher") else "worse"


def _ends(figures: Iterable[dict]) -> list[float]:
    """Every value, and every end of an interval."""
    found = [figure.get(name) for figure in figures for name in ("value", "low", "high")]
    return [end for end in found if end is not None]


def _word(report: Report) -> str:
    """What conditions differ in."""
    return "pictures" if _of_folders(report) else "encoder"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _prompts_line(report: Report) -> str:
    prompts = report["prompts"]
    parts = [f"{prompts['n']:,} prompts from {prompts['source']}"]
    if prompts.get("seeds"):
        parts.append("seeds {} to {}".format(*prompts["seeds"]))
    if prompts.get("mean_tokens") is not None:
        parts.append(f"{prompts['mean_tokens']:.0f} tokens on average")
    if prompts.get("beyond_77") is not None:
        parts.append(f"{prompts['beyond_77']:.0%} of them longer than {BORDER} tokens")
    return ", ".join(parts) + "."


def _tables_note(report: Report) -> str:
    alike, of = ("the same prompts", "") if _of_folders(report) else ("the same prompts and noise", " of its UNet")
    under = "" if _of_folders(report) else " under the same UNet"
    text = (
        f"In brackets: 95% intervals. With a sign: paired differences, from {alike}, to {_baseline_label(report)}"
        f"{under}, marked ▲ (better) or ▼ (worse) if the interval excludes 0. In bold: the best{of}. One interval in "
        "twenty excludes 0 by chance, and the best of several is picked after the fact."
    )
    if report.get("floors"):
        text += f" {FLOOR}: the figure cannot be told from a floor below its table, so it says nothing."
    return text


# ------------------------------------------------------------------------------------------------------------ tables


def tables(report: Report) -> list[dict[str, Any]]:
    """The figures as text, a table for each group.

    Returns:
        `group`, `columns` (a figure's description, `n`, and `floors`) and, by UNet, `rows`: pairs of a condition and
        its cells.
    """
    conditions, found = report["conditions"].values(), []
    for group in dict.fromkeys(about["group"] for about in report["figures"].values()):
        columns = {key: about for key, about in report["figures"].items() if about["group"] == group}
        rows = {
            unet: [(one, [_cell(report, one, key) for key in columns]) for one in conditions if one["unet"] == unet]
            for unet in _unets(report)
        }
        found.append(
            {
                "group": group,
                "columns": [
                    about | {"n": _sizes(report, key), "floors": _floors(report, key)}
                    for key, about in columns.items()
                ],
                "rows": rows,
            }
        )
    return found


def _sizes(report: Report, key: str) -> str:
    """How many values stand behind a column."""
    sizes = sorted({_figure(one, key)["n"] for one in report["conditions"].values() if _figure(one, key)})
    return " to ".join(f"{size:,}" for size in dict.fromkeys([*sizes[:1], *sizes[-1:]])) or "–"


def _floors(report: Report, key: str) -> list[dict[str, Any]]:
    """What a distance comes to where it says nothing, and with facts wrong, as text."""
    digits = report["figures"][key]["digits"]
    found = (report.get("floors") or {}).get(key) or {}
    return [
        {
            "label": own["label"],
            "text": shown(own, digits),
            "n": f"{own['n']:,}",
            "floor": not name.startswith("wrong_"),
        }
        for name, own in found.items()
    ]


def _cell(report: Report, condition: dict, key: str) -> dict[str, Any]:
    """One figure of one condition as text.

    Returns:
        `value`, whether it is the `best` under its UNet, `interval`, `difference`, the `standing` of that, `n`, the
        `floor` that it cannot be told from, and `strip`, what a small picture of it shows.
    """
    about, own = report["figures"][key], _figure(condition, key)
    digits, value, difference = about["digits"], own.get("value"), own.get("difference")
    neighbors = (one for one in report["conditions"].values() if one["unet"] == condition["unet"])
    best = _best(neighbors, key, about["better"])
    known = difference is not None and difference["value"] is not None
    return {
        "value": number(value, digits),
        "best": value is not None
        and best is not None
        and number(value, digits) == number(best["figures"][key]["value"], digits),
        "interval": interval(own, digits),
        "difference": shown(difference, digits, True) if known else "",
        "n": f"{own['n']:,}" if own.get("n") is not None else "",
        "floor": own.get("floor"),
        "standing": _standing(difference, about["better"]),
        "strip": _strip(report, condition, key),
    }


def _strip(report: Report, condition: dict, key: str) -> dict[str, float] | None:
    """Where a figure lies in the range of its column, in percent; None where there is no figure, or no range.

    Returns:
        `left` and `width` of the interval, `mark` of the value, and `base` of the baseline's where there is one.
    """
    ends = _ends(_figure(one, key) for one in report["conditions"].values())
    own = _ends([_figure(condition, key)])
    if not own or min(ends) == max(ends):
        return None

    def place(value: float) -> float:
        return round(100 * (value - min(ends)) / (max(ends) - min(ends)), 1)

    strip = {"left": place(min(own)), "width": round(place(max(own)) - place(min(own)), 1), "mark": place(own[0])}
    base = _figure(_baseline(report, condition["unet"]), key).get("value")
    return strip if base is None else strip | {"base": place(base)}


def markdown(report: Report) -> str:
    """The report without its pictures: a table for each figure, curves as tables, and the command."""
    lines = [f"# {report['title']}", "", _prompts_line(report), ""]
    for warning in report.get("warnings") or ():
        lines += [f"> {warning}", ""]
    lines += [_tables_note(report), ""]
    for table in tables(report):
        lines += [f"## {table['group']}", ""]
        for place, column in enumerate(table["columns"]):
            lines += [f"### {_capital(column['label'])} ({column['better']} is better)", ""]
            lines += [f"{_capital(column['note'])}.", ""] if column.get("note") else []
            where = "floor" if _of_folders(report) else "UNet"
            heads = [where, _word(report), "value", f"less {_baseline_label(report)}", "n"]
            rows = [
                [unet, one["label"], _value_text(cells[place]), _difference_text(cells[place]), cells[place]["n"]]
                for unet, rows in table["rows"].items()
                for one, cells in rows
            ]
            rows += [["floor" if each["floor"] else "", each["label"], each["text"], "", each["n"]]
                     for each in column["floors"]]  # fmt: skip
            if _of_folders(report) and not column["floors"]:  # nothing would stand in the first column
                heads, rows = heads[1:], [row[1:] for row in rows]
            lines += [*markdown_table(heads, rows), ""]
    for curve in _curves(report):
        lines += [f"## {_capital(curve['label'])}", ""]
        for unet in dict.fromkeys(one["unet"] for one, _ in curve["rows"]):
            drawn = [(one, cells) for one, cells in curve["rows"] if one["unet"] == unet]
            for first in range(0, len(drawn), 4):
                some = drawn[first : first + 4]
                heads = [f"tokens{_under(unet, ', ')}", *(one["label"] for one, _ in some)]
                rows = [
                    [f"{bounds[0]} to {bounds[1]}", *(cells[place] for _, cells in some)]
                    for place, bounds in enumerate(curve["bins"])
                ]
                lines += [*markdown_table(heads, rows), ""]
    for breakdown in _breakdowns(report):
        lines += [f"## {_capital(breakdown['label'])}", ""]
        for first in range(0, len(breakdown["rows"]), 4):
            some = breakdown["rows"][first : first + 4]
            heads = ["category", *(_full_label(report, one) for one, _ in some)]
            rows = [
                [category, *(cells[place] for _, cells in some)]
                for place, category in enumerate(breakdown["categories"])
            ]
            lines += [*markdown_table(heads, rows), ""]
    if report.get("judges"):
        lines += ["## Judges", "", *markdown_table(["judge", "what it is"], list(report["judges"].items())), ""]
    lines += ["## How to reproduce", "", f"    {report['command']}", ""]
    if report.get("versions"):
        lines += [", ".join(f"{name} {version}" for name, version in report["versions"].items()), ""]
    return "\n".join(lines)


def _value_text(cell: dict[str, Any]) -> str:
    text = f"{'**' * cell['best']}{cell['value']}{'**' * cell['best']} {cell['interval']}".rstrip()
    return f"{text} {FLOOR}" if cell["floor"] else text


def _difference_text(cell: dict[str, Any]) -> str:
    return f"{SIGNS[cell['standing']]}{cell['difference']}" if cell["difference"] else ""


# ------------------------------------------------------------------------------------------------------------ curves


def _curves(report: Report) -> list[dict[str, Any]]:
    """The curves as text; one that no condition has is left out.

    Returns:
        A curve's description and `key`, its `bins` of tokens, and `rows`: pairs of a condition and its values.
    """
    found = []
    for key, about in (report.get("curves") or {}).items():
        drawn = [one for one in report["conditions"].values() if _points(one, key)]
        bins = sorted({(point["from"], point["to"]) for one in drawn for point in _points(one, key)})
        rows = []
        for one in drawn:
            texts = {(point["from"], point["to"]): shown(point) for point in _points(one, key)}
            rows.append((one, [texts.get(place, "–") for place in bins]))
        if rows:
            found.append({**about, "key": key, "bins": bins, "rows": rows})
    return found


def _breakdowns(report: Report) -> list[dict[str, Any]]:
    """Means by category as text: a description, its `categories`, and `rows`, pairs of a condition and its values."""
    found = []
    for key, about in (report.get("breakdowns") or {}).items():
        own = [(one, (one.get("breakdowns") or {}).get(key)) for one in report["conditions"].values()]
        drawn = [(one, values) for one, values in own if values]
        categories = list(dict.fromkeys(category for _, values in drawn for category in values))
        rows = [(one, [shown(values.get(category)) for category in categories]) for one, values in drawn]
        found.append({**about, "categories": categories, "rows": rows})
    return found


def _full_label(report: Report, condition: dict) -> str:
    """A condition's name where conditions of several UNets stand side by side."""
    return condition["label"] if len(_unets(report)) == 1 else f"{condition['label']}{_under(condition['unet'], ', ')}"


def _panel(report: Report, key: str, unet: str) -> dict[str, str]:
    """One curve of every encoder under one UNet: its SVG, and what that shows for those who do not see it."""
    lines, said = [], []
    for one in report["conditions"].values():
        points = [point for point in _points(one, key) if point["value"] is not None]
        if one["unet"] == unet and points:
            lines.append((_encoders(report).index(one["encoder"]) % len(MARKERS), one["label"], points))
            first, last = points[0], points[-1]
            said.append(
                f"{one['label']} has {number(first['value'], 3)} at tokens {first['from']} to {first['to']} "
                f"and {number(last['value'], 3)} at tokens {last['from']} to {last['to']}"
            )
    ends = [0.0, *_ends(point for one in report["conditions"].values() for point in _points(one, key))]
    room = 0.04 * (max(ends) - min(ends)) or 1.0  # one range for all UNets, so that panels compare at a glance
    limits = (min(ends) - room * (min(ends) < 0), max(ends) + room)
    return {
        "unet": unet,
        "said": f"{_capital(report['curves'][key]['label'])}{_under(unet, ', ')}: {'; '.join(said)}.",
        "svg": _svg(lines, limits, f"{key}/{unet}"),
    }


def _svg(lines: list[tuple[int, str, list[dict]]], limits: tuple[float, float], salt: str) -> str:
    """Curves as an element of the page, in the page's colors.

    Args:
        lines: (place of the encoder, label, points with values) of each.
        limits: of the values.
        salt: keeps the names inside apart from those of the page's other curves.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    settings = {"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 10.5, "text.parse_math": False}
    buffer = BytesIO()
    with style.context(["default", settings]):  # whatever the user's matplotlibrc says; undone afterwards
        figure = Figure(figsize=(5.2, 3.7))
        axes = figure.add_axes((0.09, 0.12, 0.56, 0.8))  # the rest is for labels of 20 letters
        last = max((point["to"] for _, _, points in lines for point in points), default=2 * BORDER)
        axes.set(xlim=(0, last), ylim=limits)
        axes.set_xlabel("token of the prompt", color=INK)
        axes.tick_params(colors=INK, length=0)
        axes.grid(axis="y", color=INK, alpha=0.12)
        axes.spines[:].set_visible(False)
        axes.axhline(0, color=INK, lw=0.8, alpha=0.5, zorder=1)
        axes.axvline(BORDER, color=INK, lw=1, ls=(0, (2, 2)), zorder=1)
        axes.annotate(f"token {BORDER}", (BORDER, 1), (3, 3), ("data", "axes fraction"), "offset points", color=INK)
        text = 0.06 * (limits[1] - limits[0])  # height of a line
        heights = _spread([max(points[-1]["value"], limits[0] + text / 2) for _, _, points in lines], text, limits[1])
        for (place, label, points), height in zip(lines, heights, strict=True):
            colour, marker = f"{ENCODER_INK}{place:02d}", list(MARKERS)[place]
            middles = [(point["from"] + point["to"]) / 2 for point in points]
            values = [point["value"] for point in points]
            axes.plot(middles, values, "-" if place else "--", color=colour, marker=marker, ms=6, mew=0.8, zorder=3)
            lows, highs = ([_or_nan(point[end]) for point in points] for end in ("low", "high"))
            axes.fill_between(middles, lows, highs, color=colour, alpha=0.16, lw=0)
            axes.plot([middles[-1], last * 1.03], [values[-1], height], color=colour, lw=0.7, clip_on=False)
            short = label if len(label) <= 20 else f"{label[:19]}…"
            axes.text(last * 1.045, height, short, color=colour, va="center", fontweight="bold")
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :].replace(INK, "var(--ink)")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would hold for the whole page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # every figure names its parts alike
    return re.sub(rf"{ENCODER_INK}(\d\d)", lambda found: f"var(--encoder-{int(found[1])})", svg)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Heights moved apart to `gap` or more, in their order, none above `top`."""
    order, moved = sorted(range(len(heights)), key=lambda place: heights[place]), list(heights)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    for rank, place in enumerate(reversed(order)):
        moved[place] = min(moved[place], top - rank * gap)
    return moved


# -------------------------------------------------------------------------------------------------------------- page


def page(report: Report, folder: Path) -> str:
    """One page of HTML that needs nothing beside itself: styles, curves and pictures are inside.

    Args:
        report: As `write_report` takes it.
        folder: What the paths of pictures start from.

    Raises:
        ValueError: If a picture is missing or unreadable.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    curves = _curves(report)
    for curve in curves:
        unets = dict.fromkeys(one["unet"] for one, _ in curve["rows"])
        curve["panels"] = [_panel(report, curve["key"], unet) for unet in unets]
    encoders = {encoder: place % len(MARKERS) for place, encoder in enumerate(_encoders(report))}
    first = {one["encoder"]: one for one in reversed(report["conditions"].values())}
    return environment.get_template("report.html.jinja").render(
        report=report,
        baseline=_baseline_label(report),
        prompts=_prompts_line(report),
        floor=FLOOR,
        encoders=[first[encoder] for encoder in encoders if encoder in first],
        places=encoders,
        markers=list(MARKERS.values()),
        tables=tables(report),
        tables_note=_tables_note(report),
        signs=SIGNS,
        curves=curves,
        breakdowns=_breakdowns(report),
        word=_word(report),
        folders=_of_folders(report),
        under=_under,
        border=BORDER,
        examples=[_example(report, item, folder) for item in report.get("examples") or ()],
        changes=[_change(report, item, folder) for item in report.get("changes") or ()],
    )


def _drawn(report: Report, images: dict[str, Any]) -> dict[str, list[str]]:
    """By UNet, the conditions that have an image, in the report's order."""
    found: dict[str, list[str]] = {}
    for unet in _unets(report):
        if keys := [key for key, one in report["conditions"].items() if one["unet"] == unet and key in images]:
            found[unet] = keys
    return found


def _example(report: Report, item: dict, folder: Path) -> dict[str, Any]:
    """One prompt under every encoder: its text, parted where the baseline stops reading, and its pictures."""
    prompt, kept = item["prompt"], item.get("kept_characters")
    kept = len(prompt) if kept is None else kept
    pictures = {key: _embedded(_open(folder / path)) for key, path in item["images"].items()}
    reference = item.get("reference")
    return {
        "index": item["index"],
        "kind": {"best": "best case", "worst": "worst case", "first": "in order"}.get(item["kind"], item["kind"]),
        "why": item.get("why"),
        "kept": prompt[:kept],
        "dropped": prompt[kept:],
        "reference": _embedded(_open(folder / reference)) if reference else None,
        "unets": {
            unet: [(report["conditions"][key], pictures[key], (item.get("scores") or {}).get(key)) for key in keys]
            for unet, keys in _drawn(report, item["images"]).items()
        },
    }


def _change(report: Report, item: dict, folder: Path) -> dict[str, Any]:
    """One late change of a prompt: its text, parted at the change, and pictures before, after, and of what differs."""
    triples = {}
    for key, paths in item["images"].items():
        before, after = (_open(folder / path) for path in paths)
        if before.size != after.size:
            raise ValueError(
                f"prompt {item['index']} has pictures of {before.size} and {after.size} under {key}: draw one size."
            )
        red, green, blue = ImageChops.difference(before, after).split()
        largest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
        difference = ImageOps.colorize(largest, "#10141f", "#ffd27a")
        named = {"before": before, "after": after, "difference": difference}
        triples[key] = {name: _embedded(image) for name, image in named.items()}
    prompt, (start, end) = item["prompt"], item["span"]
    return {
        **{name: item[name] for name in ("index", "before", "after")},
        "parts": (prompt[:start], prompt[start:end], prompt[end:]),
        "unets": {
            unet: [(report["conditions"][key], triples[key], (item.get("where") or {}).get(key)) for key in keys]
            for unet, keys in _drawn(report, item["images"]).items()
        },
    }


def _open(file: Path) -> Image.Image:
    try:
        return open_image(str(file))
    except Unusable as error:
        raise ValueError(f"{file}: {error}; draw it again, or leave it out of the report.") from error


def _embedded(image: Image.Image) -> dict[str, Any]:
    """A picture as a data address: small ones as they are, larger ones scaled down."""
    small, buffer = max(image.size) <= SHOWN_AS_PIXELS, BytesIO()
    if small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=82, optimize=True)
    address = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"address": address, "small": small, "width": image.width, "height": image.height}
