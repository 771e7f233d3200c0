"""The parts of the body, in the order in which they are painted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from .shapes import Ellipsoid, Part, Tube, Vector, rotation
from .tumours import Lesion

# Outline of neck and trunk: (z, centre_x, centre_y, half_x, half_y), from the top down.
_TRUNK = (
    (50.0, 0.0, -14.0, 55.0, 58.0),
    (-20.0, 0.0, -12.0, 57.0, 55.0),
    (-70.0, 0.0, -18.0, 60.0, 58.0),
    (-90.0, 0.0, -22.0, 84.0, 64.0),
    (-110.0, 0.0, -25.0, 128.0, 76.0),
    (-130.0, 0.0, -27.0, 162.0, 86.0),
    (-160.0, 0.0, -28.0, 192.0, 96.0),
    (-210.0, 0.0, -28.0, 206.0, 102.0),
    (-265.0, 0.0, -26.0, 172.0, 106.0),
    (-450.0, 0.0, -26.0, 158.0, 104.0),
    (-600.0, 0.0, -26.0, 170.0, 106.0),
    (-950.0, 0.0, -26.0, 170.0, 104.0),
)
# Front of the spine's bodies: (z, y); cervical lordosis, thoracic kyphosis, lumbar lordosis.
_SPINE_Z = (-700.0, -620.0, -520.0, -420.0, -280.0, -200.0, -110.0, -60.0, 0.0, 50.0)
_SPINE_Y = (-75.0, -60.0, -38.0, -46.0, -68.0, -64.0, -44.0, -26.0, -17.0, -20.0)


def build_anatomy(body: dict[str, float], lesions: tuple[Lesion, ...] = ()) -> list[Part]:
    """Parts of the body in painting order: a later part covers an earlier one.

    Args:
        body: Build and uptake by name, of :func:`draw_patient`.
        lesions: Tumours under the skin make it bulge; they are not painted here.
    """
    return [
        *_outline(body, lesions),
        *_trunk_organs(body),
        *_neck_spaces(body),
        *_spine(body),
        *_skull_and_brain(body),
        *_face(body),
        *_airway(),
        *_glands(body),
    ]


def _mirrored(part: Ellipsoid, left_suv: float | None = None) -> tuple[Ellipsoid, Ellipsoid]:
    """An organ on the right and its image on the left, where it may take up another ``left_suv``."""
    x, y, z = part.centre
    turn = None if part.rotation is None else part.rotation * np.outer([-1, 1, 1], [-1, 1, 1])
    return part, Ellipsoid((-x, y, z), part.semi, part.hu, part.suv if left_suv is None else left_suv, turn, part.keep)


def on_dental_arch(angle: float) -> tuple[float, float]:
    """Coordinates x and y of a place on the dental arch; 0 radians is its right end, pi its left."""
    return 36.5 * math.cos(angle), 22 + 55 * math.sin(angle)


def raised_arms() -> Iterator[Part]:
    """Arms beside and above the head: skin, muscle, bone."""
    for side in (-1.0, 1.0):
        for depth, hu, suv in ((0.0, 20.0, 0.5), (7.0, 55.0, 0.8)):
            low, high = 46.0 - depth, 34.0 - depth
            yield Tube((-140, side * 175, -40, low, low), (120, side * 135, -30, high, high), hu, suv)
            yield Tube((120, side * 135, -30, high, high), (400, side * 70, 0, high, high), hu, suv)
        yield Tube((-140, side * 175, -40, 12, 12), (120, side * 135, -30, 11, 11), 700, 1.0)
        yield Tube((120, side * 135, -30, 11, 11), (400, side * 70, 0, 9, 9), 700, 1.0)


def _chain(
    points: tuple[tuple[float, float, float, float, float], ...], hu: float | None, suv: float | None
) -> list[Part]:
    """Tubes through the points, which run from the top down."""
    return [Tube(low, high, hu, suv) for high, low in itertools.pairwise(points)]


def _outline(body: dict[str, float], lesions: tuple[Lesion, ...]) -> Iterator[Part]:
    """Skin, then fat, then muscle, of all regions: each layer is the union of the regions shrunk to its depth."""
    layers = ((0.0, 20.0, 0.5), (2.0, -100.0, 0.3), (2.0 + body["fat_mm"], 55.0, body["muscle"]))
    for depth, hu, suv in layers:
        lean = min(depth, 5.0)  # scalp, face and nape carry less fat than the trunk
        regions: list[tuple[Vector, Vector]] = [
            ((0, -8, 122), (75, 95, 70)),
            ((0, -8, 78), (73, 76, 44)),
            ((-32, 66, 76), (27, 24, 24)),
            ((32, 66, 76), (27, 24, 24)),
            ((0, 38, 48), (62, 56, 72)),
            ((0, 54, -2), (40, 38, 26)),
            ((0, 91, 48), (14, 18, 19)),
        ]
        regions += [(lesion.centre, _grown(lesion.semi, 7.0)) for lesion in lesions]
        for centre, semi in regions:
            yield Ellipsoid(centre, _grown(semi, -lean), hu, suv)
        for x in (-73.0, 73.0):
            yield Ellipsoid((x, -14, 66), _grown((8, 15, 28), -min(depth, 2.0)), hu, suv)
        trunk = tuple(
            (z, x, y, a - (lean if z > -80 else depth), b - (lean if z > -80 else depth)) for z, x, y, a, b in _TRUNK
        )
        yield from _chain(trunk, hu, suv)
        for x in () if body["arms_up"] else (-216.0, 216.0):
            yield Tube((-700, x, -40, 38 - depth, 40 - depth), (-165, x * 0.93, -34, 44 - depth, 52 - depth), hu, suv)


def _grown(semi: Vector, by_mm: float) -> Vector:
    return (max(semi[0] + by_mm, 1.0), max(semi[1] + by_mm, 1.0), max(semi[2] + by_mm, 1.0))


def _trunk_organs(body: dict[str, float]) -> Iterator[Part]:
    """Arms, lungs, heart, liver, kidneys, bladder, shoulder bones: seen in part or only in long scans."""
    if body["arms_up"]:
        yield from raised_arms()
    yield from _mirrored(Ellipsoid((78, -24, -222), (62, 78, 128), -840, 0.5))
    yield Ellipsoid((0, -10, -215), (26, 62, 110), 45, body["blood"])
    yield Ellipsoid((-32, 12, -300), (56, 46, 48), 50, body["heart"])
    yield Ellipsoid((-30, 12, -300), (34, 26, 30), 50, body["blood"])
    yield Ellipsoid((62, -12, -392), (92, 80, 72), 65, 2.3)
    yield Ellipsoid((-100, -50, -385), (36, 42, 52), 55, 2.0)
    yield from _mirrored(Ellipsoid((62, -72, -470), (28, 26, 52), 40, 3.5))
    yield Ellipsoid((0, 8, -645), (38, 32, 30), 8, body["bladder"])
    yield from _mirrored(Ellipsoid((110, -30, -620), (14, 46, 60), 350, 1.4))
    yield Ellipsoid((0, 55, -190), (18, 7, 70), 220, 0.75 * body["marrow"])
    yield from _mirrored(Ellipsoid((78, 16, -108), (66, 7, 6), 550, 1.0, rotation(np.array([0.0, -0.12, -0.35]))))
    yield from _mirrored(Ellipsoid((172, -36, -152), (25, 25, 25), 380, 0.6 * body["marrow"]))
    yield from _mirrored(Ellipsoid((118, -84, -190), (46, 7, 62), 450, 1.0, rotation(np.array([0.0, 0.0, 0.35]))))
    yield from _injected_arm(body)


def _injected_arm(body: dict[str, float]) -> Iterator[Part]:
    """What is left at the injection (on PET alone), and in the vein between it and the shoulder."""
    side, z, hot = body["injection_side"], body["injection_z"], body["injection"]
    if body["arms_up"]:
        site, elbow, shoulder = (side * 105, -20.0, 250.0), (120.0, side * 127, -30.0), (-140.0, side * 170, -40.0)
        ends = [elbow, (site[2], site[0], site[1]), shoulder]
    else:
        site = (side * 216, -22.0, z)
        ends = [(-165.0, side * 198, -24.0), (z, site[0], site[1])]
    if hot > 0:
        yield Ellipsoid(site, (7, 7, 16), None, hot)
    if body["vein"] > 0:
        for low, high in itertools.pairwise(sorted(ends)):
            yield Tube((*low, 3.5, 3.5), (*high, 3.5, 3.5), None, body["vein"])


def _neck_spaces(body: dict[str, float]) -> Iterator[Part]:
    """Fat planes, the muscles of the neck, great vessels, thyroid, oesophagus."""
    fat, blood = 0.35, body["blood"]
    for name, side in (("left", -1.0), ("right", 1.0)):
        yield Tube((-95, side * 36, -12, 15, 17), (22, side * 38, -8, 13, 16), -95, fat)
        yield Tube((-92, side * 50, -40, 17, 13), (-12, side * 45, -36, 8, 12), -95, fat)
        yield Tube((-108, side * 18, 28, 9, 7), (45, side * 51, -18, 7, 13), 58, body[f"sternomastoid_{name}"])
        if body["longus_colli"] > 0:
            yield Tube((-60, side * 9, -24, 6, 4), (30, side * 9, -17, 6, 4), 58, body["longus_colli"])
        yield Tube((-150, side * 19, -6, 4, 4), (50, side * 27, -4, 3.5, 3.5), 45 + body["contrast_hu"], blood)
        yield Tube((-150, side * 27, -4, 7, 6), (50, side * 33, -10, 5, 6), 45 + body["contrast_hu"], blood)
        brown = body[f"brown_fat_{name}"]
        if brown > 0:
            yield Tube((-92, side * 72, -40, 20, 10), (-78, side * 56, -38, 14, 10), None, brown)
            yield Tube((-78, side * 54, -38, 7, 6), (-25, side * 47, -36, 5, 5), None, 0.7 * brown)
            yield from (Ellipsoid((side * 27, -62, z), (5, 6, 5), None, 0.8 * brown) for z in (-120.0, -145.0, -170.0))
        yield Ellipsoid((side * 17, 8, -72), (8, 9, 19), 95 + 0.5 * body["contrast_hu"], body["thyroid"])
    yield Tube((-185, 0, -44, 8, 5), (-66, 0, -7, 9, 4), 40, body["oesophagus"])
    yield Tube((-330, -6, -44, 9, 6), (-185, 0, -44, 8, 5), 40, body["oesophagus"])


def _spine(body: dict[str, float]) -> Iterator[Part]:
    """Vertebrae with arches and spinous processes, discs between them, and the canal with the cord."""
    z, pitch = 42.0, 17.5
    while z > -720:
        y = float(np.interp(z, _SPINE_Z, _SPINE_Y))
        growth = float(np.interp(-z, [0, 90, 450], [0.0, 0.25, 1.0]))
        half, depth = 11 + 13 * growth, 9 + 9 * growth
        yield Ellipsoid((0, y - depth - 9, z), (17 + 6 * growth, 13, pitch * 0.32), 420, 0.8 * body["marrow"])
        yield Ellipsoid((0, y - depth - 30, z - 4), (4, 15, pitch * 0.25), 420, 0.75 * body["marrow"])
        yield Tube((z - pitch / 2, 0, y, half - 1, depth - 1), (z + pitch / 2, 0, y, half - 1, depth - 1), 85, 0.9)
        yield Tube((z - pitch * 0.4, 0, y, half, depth), (z + pitch * 0.4, 0, y, half, depth), 330, body["marrow"])
        z -= pitch
        pitch = float(np.interp(-z, [0, 60, 90, 450], [17.5, 17.5, 21.0, 33.0]))
    for low, high in itertools.pairwise(_SPINE_Z):
        ends = []
        for height in (low, high):
            growth = float(np.interp(-height, [0, 90, 450], [0.0, 0.25, 1.0]))
            ends.append((height, 0.0, float(np.interp(height, _SPINE_Z, _SPINE_Y)) - 9 - 9 * growth - 9, 9.0, 7.5))
        yield Tube(ends[0], ends[1], 25, 1.5)


def _skull_and_brain(body: dict[str, float]) -> Iterator[Part]:
    brain = body["brain"]
    yield Ellipsoid((0, -8, 122), (70, 90, 66), 1000, 0.9)
    yield Ellipsoid((0, -8, 88), (67, 72, 30), 900, 0.9)
    yield Ellipsoid((0, -54, 80), (58, 43, 36), 900, 0.9)
    yield Ellipsoid((0, 10, 68), (58, 62, 11), 650, 1.0)
    yield from _mirrored(Ellipsoid((54, -22, 56), (13, 17, 18), 250, 1.0))
    yield from _mirrored(Ellipsoid((55, -22, 56), (8, 11, 12), -450, 0.4))
    yield Ellipsoid((0, -8, 126), (64, 84, 59), 36, brain, keep=(2, 72, 300))
    yield Ellipsoid((0, -6, 90), (61, 66, 26), 36, brain, keep=(2, 72, 300))
    yield Ellipsoid((0, -8, 124), (48, 66, 40), 30, 0.55 * brain, keep=(2, 78, 300))
    yield from _mirrored(Ellipsoid((17, 8, 112), (15, 20, 14), 40, 1.05 * brain))
    yield from _mirrored(Ellipsoid((11, -6, 126), (6, 32, 9), 6, 0.3 * brain))
    yield Ellipsoid((0, -54, 80), (50, 35, 28), 38, 0.85 * brain)
    yield Tube((42, 0, -37, 10, 9), (88, 0, -24, 14, 12), 34, 0.55 * brain)


def _face(body: dict[str, float]) -> Iterator[Part]:
    """Jaws, teeth, gums, tongue, orbits, sinuses' walls."""
    arch = (1, 18.0, 200.0)
    for name, x in (("left", -47.0), ("right", 47.0)):
        yield Ellipsoid((x, 12, 28), (5, 15, 38), 900, 0.9)
        yield Ellipsoid((x * 1.07, 18, 22), (5, 15, 26), 58, body[f"masseter_{name}"])
        yield Ellipsoid((x * 1.05, 50, 57), (8, 18, 6), 800, 0.8)  # cheek bone
    yield Tube((-14, 0, 18, 47, 64), (12, 0, 18, 50, 66), 950, 0.9, arch)
    yield Tube((-14, 0, 18, 37, 53), (12, 0, 18, 40, 55), 50, body["muscle"], arch)
    yield Tube((32, 0, 20, 42, 62), (46, 0, 20, 40, 62), 600, 0.8, arch)
    yield Tube((12, 0, 22, 41, 60), (32, 0, 22, 41, 60), 1700, 0.6, arch)
    yield Tube((12, 0, 22, 32, 50), (46, 0, 22, 32, 50), 50, body["muscle"], arch)
    for number in (1, 2):
        if body[f"gum_{number}"] > 0:
            x, y = on_dental_arch(body[f"gum_{number}_angle"])
            yield Ellipsoid((0.94 * x, 0.97 * y, 14 if number == 1 else 30), (5, 5, 5), None, body[f"gum_{number}"])
    yield Ellipsoid((0, 46, 34.5), (30, 28, 3.5), 500, 0.8)
    yield Ellipsoid((0, 42, 13), (25, 36, 19), 58, 1.3)  # tongue
    for x in (-32.0, 32.0):
        yield Ellipsoid((x, 64, 78), (21, 25, 20), 600, 0.8, keep=(1, 0, 80))
        yield Ellipsoid((x, 66, 78), (18, 23, 17), -80, 0.5)
        yield Ellipsoid((x * 0.9, 54, 78), (8, 12, 8), 45, 2.6)  # muscles of the eye
        yield Ellipsoid((x, 74, 78), (12, 12, 12), 12, 0.8)


def _airway() -> Iterator[Part]:
    """Nose, sinuses, pharynx, larynx, trachea."""
    air = -980.0
    for x in (-1.0, 1.0):
        yield Ellipsoid((x * 27, 52, 54), (14, 16, 14), air, 0.05)
        yield Ellipsoid((x * 9, 64, 50), (6, 34, 15), -700, 0.3)
        yield Ellipsoid((x * 8, 88, 100), (9, 5, 9), air, 0.1)
    yield Ellipsoid((0, 34, 70), (13, 12, 8), air, 0.1)
    yield Ellipsoid((0, 22, 47), (14, 11, 13), air, 0.1)
    yield Ellipsoid((0, 48, 30), (19, 24, 2.5), air, 0.2)
    yield Tube((12, 0, 8, 13, 7), (46, 0, 16, 12, 8), air, 0.1)
    yield Tube((-18, 0, 9, 14, 8), (12, 0, 8, 13, 7), air, 0.1)
    shell = (1, 4.0, 60.0)
    yield Tube((-24, 0, 12, 21, 23), (-19, 0, 12, 21, 23), 450, 0.9, (1, 10.0, 60.0))  # hyoid
    yield Tube((-24, 0, 12, 17, 19), (-19, 0, 12, 17, 19), 45, 1.0, (1, 10.0, 60.0))
    yield Tube((-62, 0, 10, 19, 21), (-34, 0, 10, 21, 24), 190, 1.0, shell)  # thyroid cartilage
    yield Tube((-62, 0, 10, 16, 18), (-34, 0, 10, 18, 21), 50, 1.2, shell)
    yield Tube((-44, 0, 12, 7, 10), (-18, 0, 9, 13, 8), air, 0.1)
    yield Tube((-56, 0, 11, 3.5, 9), (-44, 0, 12, 7, 10), air, 0.1)
    yield Tube((-66, 0, 9, 8.5, 9), (-56, 0, 11, 3.5, 9), air, 0.1)
    yield Tube((-185, 0, -26, 9, 9), (-66, 0, 9, 8.5, 9), air, 0.1)
    for x in (-1.0, 1.0):
        yield Ellipsoid((x * 16, -28, -198), (20, 9, 9), air, 0.1)


def _glands(body: dict[str, float]) -> Iterator[Part]:
    """Structures with physiological uptake: what makes a mere threshold on PET fail."""
    yield from _mirrored(Ellipsoid((19, 9, 10), (7, 9, 14), 52, body["tonsil_right"]), body["tonsil_left"])
    yield Ellipsoid((0, 24, -7), (14, 7, 9), 52, body["lingual_tonsil"])
    yield Ellipsoid((0, 9, 53), (12, 5, 8), 50, body["adenoid"])
    yield Ellipsoid((0, 21, 31), (13, 12, 4), 50, body["palate"])
    yield from _mirrored(Ellipsoid((44, -3, 24), (9, 16, 20), -15, body["parotid_right"]), body["parotid_left"])
    below = Ellipsoid((29, 30, -14), (10, 15, 10), 48, body["submandibular_right"])
    yield from _mirrored(below, body["submandibular_left"])
    yield from _mirrored(Ellipsoid((11, 52, 0), (5, 15, 5), 45, body["sublingual"]))
    yield from _mirrored(Ellipsoid((8, 12, -51), (4, 10, 4), 60, body["larynx_right"]), body["larynx_left"])
