"""The bundled world: scenes of colored shapes on a 3x3 grid, their captions, and a reader of images.

`world` has scenes, their pictures and the reader, `words` what things are called, `facts` what a caption states and
what an image shows of it, `wordings` captions in the ways of `families`, with `noise`, `changes` one at a time,
`parsing` what any text states.
"""

from .changes import CHANGES
from .facts import (
    STOCK_CONTENT_TOKENS,
    Caption,
    Fact,
    Finding,
    advice,
    as_record,
    fact_tokens,
    findings,
    stock_border,
)
from .parsing import find_facts
from .wordings import FAMILIES, arranged, describe, sample_for, telling
from .words import PLACES, SIZE_WORDS
from .world import (
    ATTRIBUTES,
    BACKGROUNDS,
    CELL_SIZE,
    COLOURS,
    IMAGE_SIZE,
    PALETTE,
    SHAPES,
    SIZES,
    Object,
    Scene,
    alterations,
    cell_pictures,
    read,
    render,
    repainted,
    sample_scene,
    vary,
)

__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "CELL_SIZE",
    "CHANGES",
    "COLOURS",
    "FAMILIES",
    "IMAGE_SIZE",
    "PALETTE",
    "PLACES",
    "SHAPES",
    "SIZES",
    "SIZE_WORDS",
    "STOCK_CONTENT_TOKENS",
    "Caption",
    "Fact",
    "Finding",
    "Object",
    "Scene",
    "advice",
    "alterations",
    "arranged",
    "as_record",
    "cell_pictures",
    "describe",
    "fact_tokens",
    "find_facts",
    "findings",
    "read",
    "render",
    "repainted",
    "sample_for",
    "sample_scene",
    "stock_border",
    "telling",
    "vary",
]
