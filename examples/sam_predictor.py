"""Segment Anything on photographs: masks of the same points from the encoder as shipped and from the patched one.

    python examples/sam_predictor.py                               # random weights: only agreement means anything
    python examples/sam_predictor.py --checkpoint sam_vit_b.pth --densities 1 0.5 0.25 --device cuda

For each photograph and density: the time of ``SamPredictor.set_image``, and the mean intersection over union of the
masks of a few points with those of the encoder as shipped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from skimage import data
from torch import nn

from sparse_attn_modules import Dense, LocalWindow, patch_model, unpatch_model

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")
POINTS = ((0.5, 0.5), (0.3, 0.4), (0.7, 0.6))  # fractions of width and height


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["vit_b", "vit_l", "vit_h"], default="vit_b")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0])
    parser.add_argument("--photographs", nargs="+", choices=PHOTOGRAPHS, default=list(PHOTOGRAPHS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    sam = sam_model_registry[options.model](checkpoint=options.checkpoint).to(options.device)
    if options.checkpoint is None:
        for name, parameter in sam.named_parameters():
            if "rel_pos" in name:
                nn.init.normal_(parameter, std=0.02)  # zeros otherwise, which would show nothing of them
    print(f"{'photograph':<12}{'attention':<16}{'set_image, s':>14}{'IoU of masks':>14}")
    for name in options.photographs:
        photograph = getattr(data, name)()
        seconds, expected = predict(sam, photograph)
        print(f"{name:<12}{'as shipped':<16}{seconds:>14.2f}")
        for density in options.densities:
            patch_model(sam.image_encoder, Dense() if density == 1 else LocalWindow(density=density))
            seconds, masks = predict(sam, photograph)
            unpatch_model(sam.image_encoder)
            title = "exact" if density == 1 else f"density {density:g}"
            print(f"{name:<12}{title:<16}{seconds:>14.2f}{intersection_over_union(masks, expected):>14.4f}")


def predict(sam: nn.Module, photograph: np.ndarray) -> tuple[float, np.ndarray]:
    """Seconds that the image took to encode, and the masks ``[points · 3, H, W]`` of the points."""
    from segment_anything import SamPredictor

    predictor = SamPredictor(sam)
    start = time.perf_counter()
    predictor.set_image(photograph)
    if predictor.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    height, width = photograph.shape[:2]
    masks = [predictor.predict(np.array([[x * width, y * height]]), np.array([1]))[0] for x, y in POINTS]
    return seconds, np.concatenate(masks)


def intersection_over_union(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean over the masks; 1 for two empty ones."""
    union = (found | expected).sum((1, 2))
    return float(np.where(union == 0, 1.0, (found & expected).sum((1, 2)) / np.maximum(union, 1)).mean())


if __name__ == "__main__":
    main()
