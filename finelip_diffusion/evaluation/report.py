"""The report of an evaluation: every figure as JSON, the tables in Markdown, and one page that explains itself."""

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

BORDER = STOCK_CONTENT_TOKENS + 2  # start and end count: token 77
SHOWN_AS_PIXELS = 128  # pictures up to this side are kept as they are
LARGEST_PICTURE = 384  # pixels; larger ones are scaled down to this side
SIGNS = {"better": "▲ ", "worse": "▼ ", "open": "", None: ""}
MARKERS = {"o": "●", "s": "■", "D": "◆", "*": "★", "P": "✚", "X": "✖", "p": "⬟", "h": "⬢"}
"""Of the encoders in order, the baseline first: for matplotlib, and as text. The template has a colour for each."""
INK, ENCODER_INK = "#010101", "#0e0e"
"""What curves are drawn in, the place of the encoder behind: it stands for the page's colours by day and by night."""

Report = dict[str, Any]


def write_report(report: Report, folder: Path) -> None:
    """Writes `report.json` (everything), `report.md` (the tables) and `report.html` (one page, pictures included).

    Each file is written whole or not at all. The same report and pictures give the same bytes.

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
            f"the report is no JSON ({error}): give plain data, and None where nothing is known."
        ) from error
    figures, conditions = report["figures"], report["conditions"]
    for key, about in figures.items():
        if about["better"] not in ("lower", "higher"):
            raise ValueError(f"figure {key} is better when {about['better']!r}: say 'lower' or 'higher'.")
    if _lead(report) not in figures:
        raise ValueError(f"the lead is {_lead(report)!r}, but figures are {list(figures)}: name one of them.")
    for name, condition in conditions.items():
        for kind in ("figures", "curves"):
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


def _lead(report: Report) -> Any:
    """The figure of the headline: by default the first."""
    return report.get("lead") or next(iter(report["figures"]), None)


def _unets(report: Report) -> list[str]:
    return list(dict.fromkeys(one["unet"] for one in report["conditions"].values()))


def _encoders(report: Report) -> list[str]:
    """Every encoder, the baseline first: the order of colours and markers."""
    return list(dict.fromkeys([report["baseline"], *(one["encoder"] for one in report["conditions"].values())]))


def _baseline_label(report: Report) -> str:
    baseline = report["baseline"]
    return next((one["label"] for one in report["conditions"].values() if one["encoder"] == baseline), baseline)


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


# ------------------------------------------------------------------------------------------------------------- words


def _number(value: float | None, digits: int, sign: bool = False) -> str:
    """A figure as text; "–" where there is none."""
    if value is None:
        return "–"
    rounded = round(value, digits) + 0.0  # no minus before zero
    return f"{rounded:{'+' if sign and rounded else ''},.{digits}f}".replace("-", "−")


def _interval(figure: dict | None, digits: int, sign: bool = False) -> str:
    """`[low, high]`; empty where there is none."""
    if figure is None or figure.get("low") is None or figure.get("high") is None:
        return ""
    return f"[{_number(figure['low'], digits, sign)}, {_number(figure['high'], digits, sign)}]"


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


def _verdict_note(report: Report) -> str:
    return (
        "Of each group one figure, for the encoder that does best in it "
        f"beside {_baseline_label(report)}; 95% intervals in brackets."
    )


def _tables_note(report: Report) -> str:
    return (
        "In brackets: 95% intervals. With a sign: paired differences, from the same prompts and noise, to "
        f"{_baseline_label(report)} under the same UNet, marked ▲ (better) or ▼ (worse) if the interval excludes 0. "
        "In bold: the best of its UNet. One interval in twenty excludes 0 by chance, and the best of several is "
        "picked after the fact."
    )


def _compared(own: dict, base: dict, about: dict) -> str:
    """How a figure stands to the baseline's, in words that claim no more than the intervals do."""
    difference, digits = own.get("difference"), about["digits"]
    standing = _standing(difference, about["better"])
    if standing == "open":
        return f"no difference that n = {own['n']:,} could show"
    if difference is not None and standing is not None:
        low, high = sorted(abs(difference[end]) for end in ("low", "high"))
        way = "higher" if difference["low"] > 0 else "lower"
        way += "" if about["better"] == "higher" else f", so {standing},"
        return f"{way} by {_number(abs(difference['value']), digits)} {_interval({'low': low, 'high': high}, digits)}"
    if not _interval(own, digits) or not _interval(base, digits):
        return "without an interval to judge by"
    apart = own["low"] > base["high"] or own["high"] < base["low"]
    return "the two intervals lie apart" if apart else "the two intervals overlap"


def verdict(report: Report) -> dict[str, Any]:
    """The answer in words, made from the figures alone.

    Each group speaks through its first figure, or the report's `lead`; of the encoders beside the baseline, the best.

    Returns:
        `headline`, a sentence on the lead over all UNets, and `unets`: by UNet, pairs of (what it is about, sentence),
        the last on what the encoder that leads there is worse at.
    """
    figures = report["figures"]
    lead = _lead(report)
    speakers = {figures[key]["group"]: key for key in [*reversed(figures), lead]}  # the last one of a group stays
    rivals = [one for one in report["conditions"].values() if one["encoder"] != report["baseline"]]

    def sentence(key: str, best: dict, where: str = "") -> str:
        about = figures[key]
        own, base = best["figures"][key], _figure(_baseline(report, best["unet"]), key)
        text = f"{_capital(about['label'])}: {_number(own['value'], about['digits'])} with {best['label']}{where}"
        if not base:
            return f"{text} {_interval(own, about['digits'])}".rstrip() + "."
        against = f"against {_number(base['value'], about['digits'])} with {_baseline_label(report)}"
        return f"{text}, {against}; {_compared(own, base, about)}."

    unets: dict[str, list[tuple[str, str]]] = {unet: [] for unet in _unets(report)}
    for unet, pairs in unets.items():
        here = [one for one in rivals if one["unet"] == unet]
        for group in dict.fromkeys(about["group"] for about in figures.values()):
            key = speakers[group]
            if best := _best(here, key, figures[key]["better"]):
                pairs.append((group, sentence(key, best)))
        if best := _best(here, lead, figures[lead]["better"]):
            pairs.append(("The price", _price(report, best)))
    headline = "Nothing was compared."
    if best := _best(rivals, lead, figures[lead]["better"]):
        headline = sentence(lead, best, f" on the {best['unet']} UNet" if len(unets) > 1 else "")
    return {"headline": headline, "unets": unets}


def _price(report: Report, condition: dict) -> str:
    """What a condition is worse at than the baseline."""
    name, baseline = condition["label"], _baseline_label(report)
    standings = {
        key: _standing(_figure(condition, key).get("difference"), about["better"])
        for key, about in report["figures"].items()
    }
    judged = [key for key, standing in standings.items() if standing is not None]
    if not judged:
        return f"Nothing here says what {name} loses against {baseline}: no figure has a paired interval."
    worse = [
        f"{about['label']} ({_compared(condition['figures'][key], {}, about)})"
        for key, about in report["figures"].items()
        if standings[key] == "worse"
    ]
    unclear = sum(standing == "open" for standing in standings.values())
    text = f"Of the {len(judged)} figures with a paired interval, {name} is worse than {baseline} in "
    text += f"{len(worse)}: {', '.join(worse)}" if worse else "none"
    return f"{text}; in {unclear} the interval holds 0." if unclear else f"{text}."


# ------------------------------------------------------------------------------------------------------------ tables


def tables(report: Report) -> list[dict[str, Any]]:
    """The figures as text, a table for each group.

    Returns:
        `group`, `columns` (a figure's description, and `n`) and, by UNet, `rows`: pairs of a condition and its cells.
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
                "columns": [about | {"n": _sizes(report, key)} for key, about in columns.items()],
                "rows": rows,
            }
        )
    return found


def _sizes(report: Report, key: str) -> str:
    """How many values stand behind a column."""
    sizes = sorted({_figure(one, key)["n"] for one in report["conditions"].values() if _figure(one, key)})
    return " to ".join(f"{size:,}" for size in dict.fromkeys([*sizes[:1], *sizes[-1:]])) or "–"


def _cell(report: Report, condition: dict, key: str) -> dict[str, Any]:
    """One figure of one condition as text.

    Returns:
        `value`, whether it is the `best` under its UNet, `interval`, `difference`, the `standing` of that, and
        `strip`, what a small picture of it shows.
    """
    about, own = report["figures"][key], _figure(condition, key)
    digits, value, difference = about["digits"], own.get("value"), own.get("difference")
    neighbours = (one for one in report["conditions"].values() if one["unet"] == condition["unet"])
    best = _best(neighbours, key, about["better"])
    shown = ""
    if difference is not None and difference["value"] is not None:
        shown = f"{_number(difference['value'], digits, True)} {_interval(difference, digits, True)}".rstrip()
    return {
        "value": _number(value, digits),
        "best": value is not None
        and best is not None
        and _number(value, digits) == _number(best["figures"][key]["value"], digits),
        "interval": _interval(own, digits),
        "difference": shown,
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
    """The report without its pictures: the verdict, tables, curves as tables, and the command."""
    answer = verdict(report)
    lines = [f"# {report['title']}", "", _prompts_line(report), ""]
    for warning in report.get("warnings") or ():
        lines += [f"> {warning}", ""]
    lines += [f"**{answer['headline']}**", "", _verdict_note(report), ""]
    for unet, pairs in answer["unets"].items():
        lines += [f"On the {unet} UNet:", "", *(f"- {about}. {text}" for about, text in pairs), ""]
    for table in tables(report):
        heads = [f"{one['label']} ({one['better']} is better)" for one in table["columns"]]
        rows = [
            [unet, one["label"], *map(_cell_text, cells)]
            for unet, rows in table["rows"].items()
            for one, cells in rows
        ]
        sizes = ["", "n", *(one["n"] for one in table["columns"])]
        lines += [f"## {table['group']}", "", *_grid(["UNet", "encoder", *heads], [*rows, sizes]), ""]
        if notes := [f"- {_capital(one['label'])}: {one['note']}" for one in table["columns"] if one.get("note")]:
            lines += [*notes, ""]
    lines += [_tables_note(report), ""]
    for curve in _curves(report):
        heads = [f"tokens {first} to {last}" for first, last in curve["bins"]]
        rows = [[one["unet"], one["label"], *cells] for one, cells in curve["rows"]]
        lines += [f"## {_capital(curve['label'])}", "", *_grid(["UNet", "encoder", *heads], rows), ""]
    lines += ["## How to reproduce", "", f"    {report['command']}", ""]
    if report.get("versions"):
        lines += [", ".join(f"{name} {version}" for name, version in report["versions"].items()), ""]
    return "\n".join(lines)


def _cell_text(cell: dict[str, Any]) -> str:
    text = f"{'**' * cell['best']}{cell['value']}{'**' * cell['best']} {cell['interval']}".rstrip()
    return f"{text} ({SIGNS[cell['standing']]}{cell['difference']})" if cell["difference"] else text


def _grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (heads, ["---"] * len(heads), *rows)]
    return [f"| {' | '.join(line)} |" for line in escaped]


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
            texts = {
                (point["from"], point["to"]): f"{_number(point['value'], 3)} {_interval(point, 3)}".rstrip()
                for point in _points(one, key)
            }
            rows.append((one, [texts.get(place, "–") for place in bins]))
        if rows:
            found.append({**about, "key": key, "bins": bins, "rows": rows})
    return found


def _panel(report: Report, key: str, unet: str) -> dict[str, str]:
    """One curve of every encoder under one UNet: its SVG, and what that shows for those who do not see it."""
    lines, said = [], []
    for one in report["conditions"].values():
        points = [point for point in _points(one, key) if point["value"] is not None]
        if one["unet"] == unet and points:
            lines.append((_encoders(report).index(one["encoder"]) % len(MARKERS), one["label"], points))
            first, last = points[0], points[-1]
            said.append(
                f"{one['label']} has {_number(first['value'], 3)} at tokens {first['from']} to {first['to']} "
                f"and {_number(last['value'], 3)} at tokens {last['from']} to {last['to']}"
            )
    ends = [0.0, *_ends(point for one in report["conditions"].values() for point in _points(one, key))]
    room = 0.04 * (max(ends) - min(ends)) or 1.0  # one range for all UNets, so that panels compare at a glance
    limits = (min(ends) - room * (min(ends) < 0), max(ends) + room)
    return {
        "unet": unet,
        "said": f"{_capital(report['curves'][key]['label'])}, {unet} UNet: {'; '.join(said)}.",
        "svg": _svg(lines, limits, f"{key}/{unet}"),
    }


def _svg(lines: list[tuple[int, str, list[dict]]], limits: tuple[float, float], salt: str) -> str:
    """Curves as an element of the page, in the page's colours.

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
        verdict=verdict(report),
        verdict_note=_verdict_note(report),
        encoders=[first[encoder] for encoder in encoders if encoder in first],
        places=encoders,
        markers=list(MARKERS.values()),
        tables=tables(report),
        tables_note=_tables_note(report),
        signs=SIGNS,
        curves=curves,
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
