"""Long prompts to start from: captions of the bundled world, and prompts for a model of the real one."""

from finelip_diffusion.scenes import describe, sample_scene

SCENES = {
    f"{count} shapes": str(describe(sample_scene(seed, "test", (count, count)), seed))
    for count, seed in ((4, 11), (5, 12), (6, 13), (7, 14), (8, 15), (9, 16))
}
"""Held-out scenes, from four objects to nine."""

PICTURES = {
    "Harbour at dawn": (
        "A wide photograph of a small fishing harbour just before sunrise, taken from the end of the stone "
        "pier. In the foreground lies a coil of orange rope on wet granite, with a tin mug beside it. Three "
        "wooden boats are moored in a row: the nearest is painted deep green with a white stripe, the middle "
        "one is faded red, the farthest is bare wood. Behind them a row of narrow houses climbs a hill, one "
        "window lit in yellow. The sky is pale violet above and peach at the horizon, a single gull crosses "
        "it from left to right, and thin mist lies on the water. The light is soft, the colours are muted, "
        "and everything is in focus."
    ),
    "Clockmaker's desk": (
        "An oil painting of a clockmaker's desk seen from above, in the manner of a Dutch still life. A brass "
        "pocket watch lies open in the middle, its gears spread on a square of dark blue velvet. To the left "
        "stands a candle in a pewter holder, burned down to a third. To the right are four screwdrivers of "
        "growing size, and a magnifying glass that shows one enlarged cogwheel. At the top edge a letter with "
        "a broken red seal is half hidden under a folded pair of spectacles. The wood of the desk is "
        "scratched walnut. The light comes from the candle alone, and the corners fall into deep brown "
        "shadow."
    ),
    "Night market": (
        "A rainy night market in a narrow street, photographed at eye level with a 35 mm lens. On the left an "
        "old woman in a purple raincoat sells dumplings from a steaming bamboo basket. On the right a boy on "
        "a blue bicycle waits under a transparent umbrella. Paper lanterns hang across the street, red ones "
        "near, white ones far away, and all of them are mirrored in the wet asphalt. In the middle of the "
        "crowd a white dog looks straight into the camera. A neon sign in the shape of a fish glows green "
        "above the last stall. Steam and rain soften everything that is more than ten steps away."
    ),
    "Greenhouse": (
        "A watercolour of an abandoned Victorian greenhouse, overgrown from inside. The iron frame is painted "
        "white and rusts at the joints, and every third pane of glass is missing. A fig tree has pushed "
        "through the roof in the centre, and on its lowest branch sits a barn owl. A cast-iron bench with a "
        "forgotten straw hat stands to the left of the trunk. To the right a dry fountain is filled with "
        "ferns. The floor is a chessboard of black and cream tiles, cracked by roots. Late sun falls in from "
        "the left, so that the shadows of the frame draw a grid over everything, and the paper shows through "
        "at the edges."
    ),
    "Mountain station": (
        "A detailed illustration of a small railway station high in the mountains in winter, drawn with ink "
        "and gouache. A short train of two carriages, dark red below and cream above, stands at the only "
        "platform. The station is built of grey stone, has green shutters, and a round clock that shows ten "
        "past four. A porter with a long moustache sweeps snow from the steps, while two children pull a "
        "sledge with a yellow suitcase on it. Behind the roof a glacier shines pink in the last light. Smoke "
        "rises straight up from the chimney, and one star stands above the highest peak."
    ),
    "Robot's kitchen": (
        "A cheerful 3D render of a kitchen that belongs to a small round robot. The robot is mint green, "
        "stands on a wooden stool and stirs a copper pot with its left arm, while the right one holds a "
        "cookbook. The shelf above carries seven jars, each with a label in another colour, and the third has "
        "fallen over and spills blue beans. A window over the sink shows a purple planet with rings. On the "
        "tiled floor a ginger cat watches a toy mouse. The lamp is a glass sphere and throws warm light, the "
        "edges of all things are rounded, and a calendar on the wall shows the month of May."
    ),
}
"""Prompts of 120 to 150 tokens, most of which a 77-token encoder never reads."""
