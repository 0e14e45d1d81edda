"""Talking emoji faces, drawn by code: what the bundled MEMO learns to draw.

A face is a dict of numbers (`random_face`), a pose is a dict of per-frame tensors (`REST` names them), and `draw` turns
both into pictures. All shapes are signed distances in the head's own coordinates, so that a face can turn and move.
`face_embedding` stands in for the face analysis model of MEMO, and `mouth_opening` measures a picture.
"""

import random

import torch

SIZE = 96  # pixels
EMOTIONS = {"happy": 3, "neutral": 4, "sad": 6}  # labels of emotion2vec, which MEMO uses
NUM_EMOTIONS = 9  # the label 9 is MEMO's "no emotion"
REST = {"x": 0.0, "y": 0.0, "roll": 0.0, "opening": 0.0, "spread": 0.0, "blink": 0.0, "joy": 0.0}

SKINS = [(1.00, 0.80, 0.24), (0.98, 0.83, 0.70), (0.80, 0.57, 0.38)]
BACKGROUNDS = [(0.96, 0.96, 0.97), (0.80, 0.90, 0.98), (0.98, 0.88, 0.80)]
HATS = [(0.86, 0.24, 0.26), (0.22, 0.45, 0.85), (0.25, 0.62, 0.36)]
HAT_KINDS = 4  # none, woolly hat, party hat, bow
EYE_KINDS = 2  # black, white with a pupil


def random_face(rng=random):
    """Kinds and colours of a face; `rng` is a random.Random."""

    def near(colour):
        return [min(1.0, max(0.0, c + rng.uniform(-0.02, 0.02))) for c in colour]

    return {
        "skin": near(rng.choice(SKINS)),
        "background": near(rng.choice(BACKGROUNDS)),
        "colour": near(rng.choice(HATS)),
        "hat": rng.randrange(HAT_KINDS),
        "eyes": rng.randrange(EYE_KINDS),
        "wide": rng.uniform(-1, 1),  # distance and size of the eyes
    }


def face_embedding(face):
    """(1, 512): a fixed random projection of the face's numbers, in place of a face recognition network."""
    numbers = [2 * c - 1 for c in face["skin"] + face["background"] + face["colour"]] + [face["wide"]]
    numbers += [float(face["hat"] == k) for k in range(HAT_KINDS)] + [
        float(face["eyes"] == k) for k in range(EYE_KINDS)
    ]
    projection = torch.randn(len(numbers), 512, generator=torch.Generator().manual_seed(0))
    return torch.tensor(numbers)[None] @ projection / len(numbers) ** 0.5


def draw(face, pose):
    """(frames, 3, SIZE, SIZE) in [-1, 1]; pose: of REST's names, those given, tensors of (frames,)."""
    frames = max([len(v) for v in pose.values()], default=1)
    p = {k: torch.as_tensor(pose.get(k, v), dtype=torch.float32).expand(frames)[:, None, None] for k, v in REST.items()}
    line = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    gy, gx = torch.meshgrid(line, line, indexing="ij")
    x0, y0 = gx - p["x"], gy - 0.12 - p["y"]
    x = x0 * p["roll"].cos() + y0 * p["roll"].sin()  # the head's coordinates; its radius is 0.74
    y = y0 * p["roll"].cos() - x0 * p["roll"].sin()
    smile, frown = p["joy"].clamp(min=0), (-p["joy"]).clamp(min=0)

    def colour(values):
        return torch.tensor(values)[:, None, None, None]  # (3, frames, height, width)

    def cover(picture, distance, paint, soft=1.2, strength=1.0):
        """Paint where distance is negative; the edge is `soft` pixels wide."""
        alpha = (0.5 - distance * SIZE / 2 / soft).clamp(0, 1) * strength
        return picture + (paint - picture) * alpha

    def ellipse(cx, cy, rx, ry):
        """About the distance to an ellipse."""
        u, v = (x - cx) / rx, (y - cy) / ry
        r = (u * u + v * v).sqrt() + 1e-6
        return (r - 1) * r / ((u / rx) ** 2 + (v / ry) ** 2).sqrt().clamp(min=1e-3)

    background = colour(face["background"])
    picture = background * (1.03 - 0.09 * (gy + 1) / 2) + torch.zeros_like(x)
    r = (x * x + y * y).sqrt()
    picture = cover(picture, r - 0.78, background * 0.72, soft=9, strength=0.7)  # a soft shadow

    # Head: lit from above left
    skin = colour(face["skin"])
    light = 1.07 - 0.30 * (r / 0.74) ** 3 - 0.10 * (0.6 * y + 0.3 * x)
    shade = skin * light + (1 - skin) * 0.30 * torch.exp(-((x + 0.28) ** 2 + (y + 0.42) ** 2) / 0.07)
    warm = colour((0.0, -0.06, -0.06)) * (r / 0.74) ** 4
    picture = cover(picture, r - 0.74, shade + warm)
    blush = colour([face["skin"][0], face["skin"][1] * 0.70, face["skin"][2] * 0.72])
    for side in (-1, 1):
        near = torch.exp(-((x - side * 0.45) ** 2 + (y - 0.20) ** 2) / 0.016)
        picture = picture + (blush - picture) * near * (0.35 + 0.45 * smile)

    # Eyes, brows
    apart, large = 0.27 + 0.025 * face["wide"], 1 + 0.06 * face["wide"]
    dark = colour((0.17, 0.10, 0.09))
    lid = 1 - 0.9 * p["blink"]
    for side in (-1, 1):
        cx, cy = side * apart, -0.12
        if face["eyes"] == 1:
            picture = cover(picture, ellipse(cx, cy, 0.150 * large, 0.175 * large * lid + 0.012), dark)
            picture = cover(picture, ellipse(cx, cy, 0.125 * large, 0.150 * large * lid), colour((1.0, 1.0, 1.0)))
            picture = cover(picture, ellipse(cx, cy + 0.01, 0.075 * large, 0.095 * large * lid + 0.012), dark)
        else:
            picture = cover(picture, ellipse(cx, cy, 0.095 * large, 0.150 * large * lid + 0.015), dark)
        glint = colour((1.0, 1.0, 1.0))
        picture = cover(
            picture, ellipse(cx - 0.03, cy - 0.05, 0.032, 0.032), glint, strength=(lid - 0.5).clamp(0, 1) * 2
        )
        inner = side * (x - cx) / 0.16  # -1 at the nose, 1 at the temple
        arch = -0.40 - 0.06 * smile - 0.03 * p["opening"] + 0.035 * inner**2 + 0.085 * frown * inner
        brow = torch.maximum((y - arch).abs() - 0.026, (x - cx).abs() - 0.15)
        picture = cover(picture, brow, dark + 0.06, soft=1.6)

    # Hat
    cloth = colour(face["colour"]) * (1.1 - 0.35 * (x + 0.5).clamp(0, 1)) + torch.zeros_like(x)
    if face["hat"] == 1:
        crown = torch.maximum(ellipse(0.0, -0.42, 0.66, 0.42), y + 0.44)
        picture = cover(picture, crown, cloth)
        picture = cover(picture, torch.maximum((y + 0.46).abs() - 0.075, x.abs() - 0.66), cloth * 0.72, soft=1.6)
        picture = cover(picture, ellipse(0.0, -0.86, 0.11, 0.11), cloth * 0.5 + 0.5)
    elif face["hat"] == 2:
        cone = torch.maximum(0.87 * (x.abs() - 0.56 * (y + 1.08)), y + 0.56 - 0.25 * x * x)
        stripe = (0.5 + 4 * (y * 14 + 4 * x).sin()).clamp(0, 1)
        picture = cover(picture, cone, cloth * (1 - 0.25 * stripe) + 0.25 * stripe)
        picture = cover(picture, ellipse(0.0, -1.02, 0.08, 0.08), colour((1.0, 0.95, 0.7)))
    elif face["hat"] == 3:
        for side in (-1, 1):
            wing = torch.maximum(ellipse(side * 0.19 + 0.3, -0.63, 0.20, 0.15), -side * (x - 0.3) - 0.02)
            picture = cover(picture, wing, cloth)
        picture = cover(picture, ellipse(0.3, -0.63, 0.07, 0.08), cloth * 0.75)

    # Mouth: a line that bends with the emotion and opens downwards
    width = 0.26 + 0.06 * p["spread"] + 0.04 * smile
    u = (x / width).clamp(-1, 1)
    bend = (0.05 + 0.13 * smile - 0.20 * frown) * (0.5 - u * u)
    upper = 0.25 + bend - 0.06 * p["opening"] * (1 - u * u)
    lower = 0.25 + bend + 0.32 * p["opening"] * (1 - u * u).clamp(min=0) ** 0.5
    inside = torch.maximum(torch.maximum(upper - y, y - lower), x.abs() - width)
    picture = cover(picture, inside - 0.028, colour((0.30, 0.06, 0.07)), soft=1.4)
    tongue = torch.maximum(ellipse(0.0, 0.30 + 0.32 * p["opening"], 0.7 * width, 0.12), inside + 0.02)
    picture = cover(picture, tongue, colour((0.62, 0.16, 0.18)), strength=(3 * p["opening"]).clamp(0, 1))
    teeth = torch.maximum(torch.maximum(inside + 0.012, y - upper - 0.055), x.abs() - 0.75 * width)
    picture = cover(picture, teeth, colour((0.98, 0.97, 0.95)), strength=(4 * p["opening"] - 0.4).clamp(0, 1))
    return picture.clamp(0, 1).permute(1, 0, 2, 3) * 2 - 1


def mouth_opening(pictures):
    """(frames,): how much of the mouth's region is dark, of (frames, 3, height, width) in [-1, 1]."""
    height, width = pictures.shape[-2:]
    region = pictures[..., int(0.60 * height) : int(0.92 * height), int(0.28 * width) : int(0.72 * width)]
    luminance = (region.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1) / 2 + 0.5
    return torch.sigmoid((0.36 - luminance) * 25).mean(dim=(-2, -1))
