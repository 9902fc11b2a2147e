"""How the things of the toy world look: for points (x, y) around its centre, each shape gives z and the normal.

The camera is orthographic and looks slightly down, the light comes from the upper left; every surface is a closed form.
"""

import math
from dataclasses import dataclass

import numpy as np

SIZE = 128  # pixels per side: 16x16 latents, as 512 pixels are 64x64 latents in Stable Diffusion
SUPERSAMPLE = 2  # samples per pixel along each axis

THINGS = ("ball", "box", "cone", "ring", "star", "person")  # label = place in this list + 1; 0 is the background
COLOURS = {
    "red": (222, 42, 42),
    "orange": (245, 142, 22),
    "yellow": (250, 224, 52),
    "green": (44, 168, 72),
    "blue": (48, 92, 224),
    "purple": (148, 64, 196),
}
BACKGROUNDS = {
    "white": (246, 246, 246),
    "grey": (150, 150, 150),
    "black": (24, 24, 24),
    "pink": (250, 188, 206),
    "cyan": (152, 228, 236),
}
LIGHT = (-0.45, -0.55, 0.70)  # towards the lamp
PITCH = 0.42  # radians that the camera looks down

# OpenPose's 18 points, in its order, for a person 1 tall, standing at x = 0; y is up from the ground. "R" is the
# person's own right, to the left in the picture. Arms and legs are drawn from joints, see `pose`.
KEYPOINTS = (
    *("nose", "neck", "r_shoulder", "r_elbow", "r_wrist", "l_shoulder", "l_elbow", "l_wrist"),
    *("r_hip", "r_knee", "r_ankle", "l_hip", "l_knee", "l_ankle", "r_eye", "l_eye", "r_ear", "l_ear"),
)


@dataclass(frozen=True)
class Thing:
    """One thing of a scene: what, in which colour, where (pixels), how large (pixels)."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float  # half its height
    z: float  # how far in front of the background its middle stands
    turn: float  # radians: the yaw of a box, the tilt of a star
    pose: tuple[float, ...] = ()  # a person's joint angles


def shading(normals: np.ndarray) -> np.ndarray:
    """Return how bright a surface is in the toy world's light, 0.48 to 1: what its colour is multiplied by.

    normals  (..., 3) float32, unit length; x right, y up, z towards the viewer
    """
    light = np.array(LIGHT, np.float32) / np.float32(math.sqrt(sum(v * v for v in LIGHT)))
    lit = np.maximum(normals[..., 0] * light[0] - normals[..., 1] * light[1] + normals[..., 2] * light[2], 0)
    return np.minimum(0.48 + 0.62 * lit, 1)


def render(things: tuple[Thing, ...], background: str):
    """Return picture, depth, normals, labels, owners and key points of things on a background, as Scene holds them."""
    n = SIZE * SUPERSAMPLE
    colour = np.empty((n, n, 3), np.float32)
    colour[:] = BACKGROUNDS[background]
    depth = np.full((n, n), -np.inf, np.float32)
    normals = np.zeros((n, n, 3), np.float32)
    normals[..., 2] = 1
    labels = np.zeros((n, n), np.uint8)
    owner = np.full((n, n), -1, np.int8)
    for number, thing in enumerate(things):
        reach = thing.radius * 1.3 + 2
        x0, x1 = (int(min(max((thing.x + s * reach) * SUPERSAMPLE, 0), n)) for s in (-1, 1))
        y0, y1 = (int(min(max((thing.y + s * reach) * SUPERSAMPLE, 0), n)) for s in (-1, 1))
        xs = ((np.arange(x0, x1, dtype=np.float32) + 0.5) / SUPERSAMPLE - np.float32(thing.x))[None, :]
        ys = ((np.arange(y0, y1, dtype=np.float32) + 0.5) / SUPERSAMPLE - np.float32(thing.y))[:, None]
        for z, normal in SHAPES[thing.kind](xs, ys, thing):
            z = z + np.float32(thing.z)
            box = np.s_[y0:y1, x0:x1]
            seen = z > depth[box]  # nan, outside the shape, is never greater
            depth[box][seen] = z[seen]
            nx, ny, nz = (np.broadcast_to(np.asarray(v, np.float32), z.shape)[seen] for v in normal)
            normals[box][seen] = facing = np.stack([nx, -ny, nz], axis=-1)
            colour[box][seen] = shading(facing)[:, None] * np.array(COLOURS[thing.colour], np.float32)
            labels[box][seen] = 1 + THINGS.index(thing.kind)
            owner[box][seen] = number
    image = np.floor(colour.reshape(SIZE, SUPERSAMPLE, SIZE, SUPERSAMPLE, 3).sum((1, 3)) / SUPERSAMPLE**2 + 0.5)
    inside = np.isfinite(depth)
    low, high = -60.0, 120.0  # every thing lies between: one scale for all scenes
    depth = np.where(inside, 0.1 + 0.9 * np.clip((depth - low) / (high - low), 0, 1), 0).astype(np.float32)
    s = np.s_[::SUPERSAMPLE, ::SUPERSAMPLE]
    people = [_seen_points(thing, i, owner[s]) for i, thing in enumerate(things) if thing.kind == "person"]
    keypoints = np.array(people, np.float32).reshape(-1, len(KEYPOINTS), 3)
    return image.astype(np.uint8), depth[s].copy(), normals[s].copy(), labels[s].copy(), owner[s].copy(), keypoints


def _ball(x, y, thing):
    r = np.float32(thing.radius)
    z = _sqrt(r * r - x * x - y * y)
    yield z, (x / r, y / r, z / r)


def _ring(x, y, thing):
    """A torus that faces the viewer."""
    big, small = np.float32(thing.radius * 0.72), np.float32(thing.radius * 0.28)
    rho = np.maximum(np.sqrt(x * x + y * y), np.float32(1e-3))
    out = rho - big
    z = _sqrt(small * small - out * out)
    yield z, (out * x / rho / small, out * y / rho / small, z / small)


def _cone(x, y, thing):
    """An upright cone, seen from slightly above: its axis leans towards the viewer at the top."""
    height, base = thing.radius * 2.0, thing.radius * 0.85
    down, back = math.cos(PITCH), -math.sin(PITCH)  # unit vector from the tip along the axis, in y and z
    slope = np.float32((base / height) ** 2)
    y = y + np.float32(thing.radius * 0.95)  # from the tip
    # Points P = (x, y, z) with |P|^2 - (P.a)^2 = slope (P.a)^2, a = (0, down, back): a quadratic in z.
    k = np.float32(1 + slope)
    a = 1 - k * np.float32(back * back)
    b = -k * np.float32(down * back) * y
    c = x * x + y * y - k * np.float32(down * down) * y * y
    z = (-b + _sqrt(b * b - a * c)) / a
    along = y * np.float32(down) + z * np.float32(back)
    z = np.where((along >= 0) & (along <= height), z, np.nan)
    normal = (x + 0 * y, y - k * along * np.float32(down), z - k * along * np.float32(back))
    length = np.maximum(np.sqrt(normal[0] ** 2 + normal[1] ** 2 + normal[2] ** 2), np.float32(1e-3))
    yield z, tuple(v / length for v in normal)


def _box(x, y, thing):
    """A cube turned about the upright axis, seen from slightly above: two sides and the top."""
    half = thing.radius * 0.72
    yaw = math.pi / 4 + (thing.turn - 0.5) * 0.9
    across = [(math.cos(yaw), math.sin(yaw)), (-math.sin(yaw), math.cos(yaw))]  # the two level axes, in x and depth
    up = (0.0, -math.cos(PITCH), math.sin(PITCH))
    level = [(cx, cz * math.sin(PITCH), cz * math.cos(PITCH)) for cx, cz in across]
    for axis in (up, *level):
        normal = axis if axis[2] > 0 else tuple(-v for v in axis)
        others = [other for other in (up, *level) if other is not axis]
        corners = [
            tuple(half * (n + s * u + t * v) for n, u, v in zip(normal, *others, strict=True))
            for s, t in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]
        yield _facet(x, y, corners)


def _star(x, y, thing):
    """Five points, each of two flat facets that rise to a ridge."""
    tilt = (thing.turn - 0.5) * 0.8 - math.pi / 2
    rim = []
    for i in range(10):
        r = thing.radius * (1.0 if i % 2 == 0 else 0.45)
        rim.append((r * math.cos(tilt + i * math.pi / 5), r * math.sin(tilt + i * math.pi / 5), 0.0))
    middle = (0.0, 0.0, thing.radius * 0.4)
    for i in range(10):
        yield _facet(x, y, [middle, rim[i], rim[(i + 1) % 10]])


def _person(x, y, thing):
    """Limbs and trunk are cylinders with round ends, the head a ball."""
    points = pose(thing)
    tall = 2 * thing.radius
    for a, b, width in BONES:
        (ax, ay), (bx, by) = points[a], points[b]
        yield _capsule(x, y, ax, ay, bx, by, width * tall)
    head = points["head"]
    yield _capsule(x, y, *head, *head, 0.105 * tall)


BONES = (  # from, to, half width / height of the person
    ("neck", "hips", 0.075),
    ("r_shoulder", "l_shoulder", 0.05),
    ("r_hip", "l_hip", 0.05),
    ("r_shoulder", "r_elbow", 0.042),
    ("r_elbow", "r_wrist", 0.036),
    ("l_shoulder", "l_elbow", 0.042),
    ("l_elbow", "l_wrist", 0.036),
    ("r_hip", "r_knee", 0.052),
    ("r_knee", "r_ankle", 0.044),
    ("l_hip", "l_knee", 0.052),
    ("l_knee", "l_ankle", 0.044),
)
SHAPES = {"ball": _ball, "box": _box, "cone": _cone, "ring": _ring, "star": _star, "person": _person}


def pose(thing: Thing) -> dict[str, tuple[float, float]]:
    """Every joint of a person, (x, y) around its middle, y down; from its six angles in [-1, 1]."""
    tall = 2 * thing.radius
    points = {"neck": (0, 0.77), "head": (0, 0.89), "hips": (0, 0.49), "nose": (0, 0.88)}
    for side, name in ((-1, "r_"), (1, "l_")):
        arm, elbow, leg = thing.pose[0:3] if side < 0 else thing.pose[3:6]
        points[name + "eye"] = (0.035 * side, 0.91)
        points[name + "ear"] = (0.09 * side, 0.9)
        points[name + "shoulder"] = shoulder = (0.115 * side, 0.76)
        points[name + "hip"] = hip = (0.07 * side, 0.48)
        swing = math.pi / 2 + arm * 1.15  # 0 hangs down, pi stands up
        upper = _polar(shoulder, side, swing, 0.17)
        points[name + "elbow"] = upper
        points[name + "wrist"] = _polar(upper, side, swing + elbow * 0.9, 0.16)
        stride = 0.22 + 0.2 * leg
        points[name + "knee"] = knee = _polar(hip, side, stride, 0.23)
        points[name + "ankle"] = _polar(knee, side, stride * 0.4, 0.22)
    return {name: (px * tall, (0.5 - py) * tall) for name, (px, py) in points.items()}


def _polar(start, side: int, angle: float, length: float) -> tuple[float, float]:
    """Go `length` from `start`, `angle` outwards from straight down."""
    return start[0] + side * length * math.sin(angle), start[1] - length * math.cos(angle)


def _seen_points(thing: Thing, number: int, owner: np.ndarray) -> list[tuple[float, float, float]]:
    """A person's points in pixels, each with 1 where this person is what the picture shows there, else 0."""
    rows = []
    points = pose(thing)
    for name in KEYPOINTS:
        x, y = points[name][0] + thing.x, points[name][1] + thing.y
        col, row = math.floor(x), math.floor(y)
        inside = 0 <= col < SIZE and 0 <= row < SIZE
        rows.append((x, y, float(inside and owner[row, col] == number)))
    return rows


def _capsule(x, y, ax: float, ay: float, bx: float, by: float, r: float):
    """A cylinder with round ends from a to b, both at z = 0: every point has the distance r to the segment."""
    dx, dy = np.float32(bx - ax), np.float32(by - ay)
    px, py = x - np.float32(ax), y - np.float32(ay)
    t = np.clip((px * dx + py * dy) / max(dx * dx + dy * dy, np.float32(1e-6)), 0, 1)
    ox, oy, r = px - t * dx, py - t * dy, np.float32(r)
    z = _sqrt(r * r - ox * ox - oy * oy)
    return z, (ox / r, oy / r, z / r)


def _facet(x, y, corners):
    """A flat convex polygon in space: z on its plane inside, nan outside."""
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = corners[:3]
    normal = np.cross((bx - ax, by - ay, bz - az), (cx - ax, cy - ay, cz - az))
    normal = normal / math.sqrt(float((normal**2).sum())) * (1 if normal[2] > 0 else -1)
    nx, ny, nz = (np.float32(v) for v in normal)
    z = np.float32(az) - (nx * (x - np.float32(ax)) + ny * (y - np.float32(ay))) / nz
    inside = np.ones(z.shape, bool)
    middle = np.mean(corners, axis=0)
    for (px, py, _), (qx, qy, _) in zip(corners, [*corners[1:], corners[0]], strict=True):
        side = (qx - px) * (middle[1] - py) - (qy - py) * (middle[0] - px)
        ex, ey = np.float32((qx - px) * math.copysign(1, side)), np.float32((qy - py) * math.copysign(1, side))
        inside &= ex * (y - np.float32(py)) - ey * (x - np.float32(px)) >= 0
    return np.where(inside, z, np.float32(np.nan)), (nx, ny, nz)


def _sqrt(x):
    """The root where there is one, nan elsewhere."""
    return np.where(x >= 0, np.sqrt(np.maximum(x, 0)), np.float32(np.nan))
