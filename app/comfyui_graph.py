"""What a graph of ComfyUI says of a picture: from the node that samples, up its links."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

Graph = Mapping[str, Mapping[str, Any]]

TEXT_KEYS = ("text", "text_g", "text_l", "prompt", "string", "value", "text_a", "text_b", "string_a", "string_b")
NUMBER_KEYS = ("value", "int", "float", "number", "Number", "seed", "noise_seed")
NOT_TEXT = ("clip", "model", "vae", "image", "latent_image", "samples", "control_net", "clip_vision_output", "mask")
UNREAD = {
    "sampler_name": "sampler", "scheduler": "scheduler", "ckpt_name": "model", "unet_name": "model",
    "lora_name": "LoRA", "vae_name": "VAE", "control_net_name": "ControlNet", "stop_at_clip_layer": "clip skip",
}  # fmt: skip


def read(text: str) -> tuple[dict[str, Any], list[str]]:
    """Settings out of a graph in the form in which ComfyUI runs it, which every picture of it holds.

    Args:
        text: A JSON object: by id, nodes with `class_type` and `inputs`; a link is a list of an id and an output.

    Returns:
        What could be read, and in words what could not.

    Raises:
        ValueError: If it is not a graph, or nothing in it samples.
    """
    graph: Graph = {str(key): node for key, node in json.loads(text).items() if isinstance(node.get("inputs"), dict)}
    sampler = _sampler(graph)
    guider = _linked(graph, sampler, "guider") or sampler
    values: dict[str, Any] = {}
    unread: list[str] = []
    for name, key in (("prompt", "positive"), ("negative_prompt", "negative")):
        link = guider["inputs"].get(key, guider["inputs"].get("conditioning") if key == "positive" else None)
        texts, strange = _texts(graph, link)
        if texts:
            values[name] = "\n".join(texts)
        if len(texts) > 1:
            unread.append(f"how {len(texts)} texts make the {name.replace('_', ' ')}")
        unread += [f"the text of {kind}" for kind in strange]
    sources = {
        "seed": (sampler, _linked(graph, sampler, "noise")),
        "steps": (sampler, _linked(graph, sampler, "sigmas")),
        "guidance_scale": (sampler, guider),
    }
    keys = {"seed": ("seed", "noise_seed"), "steps": ("steps",), "guidance_scale": ("cfg",)}
    for name, nodes in sources.items():
        found = [_number(graph, node, key) for node in nodes if node for key in keys[name]]
        if numbers := [number for number in found if number is not None]:
            values[name] = numbers[0]
    latent = next(_upstream(graph, sampler["inputs"].get("latent_image"), {"width", "height"}), None)
    if latent:
        size = {side: _number(graph, latent, side) for side in ("width", "height")}
        values |= {side: number for side, number in size.items() if number is not None}
    for node in graph.values():
        for key, words in UNREAD.items():
            if isinstance(value := node["inputs"].get(key), str | int):
                unread.append(f"{words} {value}")
    if (strength := sampler["inputs"].get("denoise", 1)) != 1:
        unread.append(f"denoising strength {strength}")
    return values, unread


def _sampler(graph: Graph) -> Mapping[str, Any]:
    """The node that samples; of several the one that starts from nothing, else the first."""
    samplers = [
        node for node in graph.values()
        if {"positive", "negative", "latent_image"} <= node["inputs"].keys()
        or {"guider", "latent_image"} <= node["inputs"].keys()
    ]  # fmt: skip
    if not samplers:
        raise ValueError("nothing samples")
    for node in samplers:
        first = graph.get(_id(node["inputs"]["latent_image"]))
        if first and "Empty" in str(first.get("class_type")):
            return node
    return samplers[0]


def _id(link: Any) -> str:
    return str(link[0]) if isinstance(link, list) and len(link) == 2 else ""


def _linked(graph: Graph, node: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    return graph.get(_id(node["inputs"].get(key)))


def _upstream(graph: Graph, link: Any, keys: set[str]) -> Iterator[Mapping[str, Any]]:
    """Nodes up a link that have all of some inputs, the nearest first."""
    seen: set[str] = set()
    line = [_id(link)]
    while line:
        if (name := line.pop(0)) in seen or name not in graph:
            continue
        seen.add(name)
        if keys <= graph[name]["inputs"].keys():
            yield graph[name]
        line += [_id(value) for value in graph[name]["inputs"].values()]


def _number(graph: Graph, node: Mapping[str, Any], key: str) -> float | None:
    """A number of a node, followed to the node that gives it."""
    value, seen = node["inputs"].get(key), set()
    while isinstance(value, list):
        name = _id(value)
        if name in seen or name not in graph:
            return None
        seen.add(name)
        inputs = graph[name]["inputs"]
        value = next((inputs[key] for key in (key, *NUMBER_KEYS) if key in inputs), None)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _texts(graph: Graph, link: Any) -> tuple[list[str], list[str]]:
    """The texts up a link to a conditioning, in order, and the kinds of nodes that give one in a way of their own."""
    texts: list[str] = []
    strange: list[str] = []
    seen: set[tuple[str, int]] = set()
    line = [link]
    while line:
        link = line.pop(0)
        name = _id(link)
        slot = link[1] if name and isinstance(link[1], int) else 0
        if (name, slot) in seen or name not in graph:
            continue
        seen.add((name, slot))
        kind, inputs = str(graph[name].get("class_type")), graph[name]["inputs"]
        if kind == "ConditioningZeroOut":
            continue
        if {"positive", "negative"} <= inputs.keys():  # such as a ControlNet's: two outputs in this order
            line.insert(0, inputs["negative" if slot == 1 else "positive"])
            continue
        own = [inputs[key] for key in TEXT_KEYS if isinstance(inputs.get(key), str) and inputs[key].strip()]
        texts += [text for text in dict.fromkeys(map(str.strip, own)) if text not in texts]
        links = [value for key, value in inputs.items() if isinstance(value, list) and key not in NOT_TEXT]
        if not own and not links and not any(key in inputs for key in TEXT_KEYS):
            strange.append(kind)
        line = links + line
    return texts, strange
