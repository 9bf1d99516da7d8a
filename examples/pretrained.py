"""Models with pretrained weights where the network gives them, else with random ones."""

from __future__ import annotations

import os
import socket

import torch
from torch import nn

_SAM_HOST = "dl.fbaipublicfiles.com"
_SAM_CHECKPOINT = f"https://{_SAM_HOST}/segment_anything/sam_vit_b_01ec64.pth"


def load_timm(name: str, size: int) -> tuple[nn.Module, bool]:
    """A timm model without classifier for square images, and whether its weights are pretrained."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import timm

    def create(pretrained: bool) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=pretrained, img_size=size, num_classes=0)

    if _is_reachable("huggingface.co"):
        try:
            return create(pretrained=True), True
        except (OSError, RuntimeError) as error:
            print(f"pretrained weights of {name} cannot be loaded: {error}")
    return create(pretrained=False), False


def load_sam(size: int) -> tuple[nn.Module, bool]:
    """Segment Anything's ViT-B image encoder, which takes 1024 × 1024 pixels, and whether it is pretrained."""
    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    sam = sam_model_registry["vit_b"]()
    for name, table in sam.image_encoder.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(table, std=0.02)  # zeros otherwise, which would show nothing of the relative position
    if _is_reachable(_SAM_HOST):
        try:
            sam.load_state_dict(torch.hub.load_state_dict_from_url(_SAM_CHECKPOINT, map_location="cpu"))
            return sam.image_encoder, True
        except (OSError, RuntimeError) as error:
            print(f"pretrained weights of Segment Anything cannot be loaded: {error}")
    return sam.image_encoder, False


def _is_reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True
