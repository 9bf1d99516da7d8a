"""Embeds a folder of images: one vector per image, into safetensors files, with a patched model.

    python examples/embed_folder.py photographs/ embeddings/ --model vit_base_patch16_dinov3 --size 1024 --density 0.25

Images of any format that Pillow reads, in the folder and below it, become ``embeddings/00000.safetensors`` and so on:
a tensor ``embeddings`` with a row for each image that could be read, and their paths in the file's metadata. Run again,
it goes on where it stopped: a file is written under another name first, so one that exists is complete. Images that
cannot be read are named at the end. Decoding runs ahead in threads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sparse_attn_modules import Dense, LocalWindow, patch_model

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("output", type=Path, help="folder of the embeddings")
    parser.add_argument("--model", default="vit_base_patch16_dinov3", help="any model of timm that can be patched")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", type=Path, help="weights to load; timm's pretrained ones otherwise")
    source.add_argument("--random-weights", action="store_true", help="load no weights, to try it out")
    parser.add_argument("--size", type=int, default=1024, help="images become squares of so many pixels")
    parser.add_argument("--density", type=float, default=1.0, help="of attention: 1 is exact")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shard", type=int, default=1024, help="images per file")
    parser.add_argument("--threads", type=int, default=min(16, os.cpu_count() or 1), help="that decode images")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    for name in ("size", "batch", "shard", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"{name}: must be at least 1, got {getattr(options, name)}")
    if not 0 < options.density <= 1:
        parser.error(f"density: must lie in (0, 1], got {options.density}")
    if options.checkpoint is not None and not options.checkpoint.is_file():
        parser.error(f"checkpoint: must be a file, got {options.checkpoint}")
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device).cpu()  # which the meta device cannot
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch is built without the device
        parser.error(f"device: must be one that is here, got {options.device}: {error}")
    paths = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"images: there must be images in {options.images}, found none")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"output: must be a folder that can be made, got {options.output}: {error}")
    try:
        model, transform = load(options.model, options.size, options.checkpoint, options.random_weights)
    except Exception as error:  # of any kind: timm's, the hub's, the network's
        parser.error(
            f"model: must be one that timm can make for {options.size} pixels, with weights within reach, "
            f"got {options.model}: {type(error).__name__}: {error}"
        )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model.to(device, dtype)
    patch_model(model, Dense() if options.density == 1 else LocalWindow(density=options.density))
    width: int = model.num_features
    embed = torch.compile(model, dynamic=True) if options.compile else model
    settings = {
        "model": options.model,
        "weights": describe_weights(model, options.checkpoint, options.random_weights),
        "dtype": str(dtype).removeprefix("torch."),
        "size": options.size,
        "density": options.density,
        "shard": options.shard,
    }
    check_settings(options.output / "settings.json", settings)  # now that nothing but images can be wrong

    shards = [paths[i : i + options.shard] for i in range(0, len(paths), options.shard)]
    left_out: list[Path] = []
    with (
        ThreadPoolExecutor(options.threads) as pool,
        tqdm(total=len(paths), unit="image", disable=not sys.stderr.isatty()) as progress,
    ):
        for number, shard in enumerate(shards):
            target = options.output / f"{number:05}.safetensors"
            names = [str(path.relative_to(options.images)) for path in shard]
            if target.exists():
                names_before, missing = names_in(target)
                if names != names_before:
                    parser.error(f"output: {target} must be of the images that are there now; choose another folder")
                left_out += [options.images / name for name in missing]
                progress.update(len(shard))
                continue
            found: list[Tensor] = []
            readable: list[bool] = []
            for images, are_readable in batches(shard, transform, options.batch, pool):
                readable += are_readable
                if images is not None:
                    with torch.inference_mode():
                        found.append(embed(images.to(device, dtype)).float().cpu())
                progress.update(len(are_readable))
            missing = [name for name, is_readable in zip(names, readable) if not is_readable]
            save(target, torch.cat(found) if found else torch.zeros(0, width), names, missing)
            left_out += [options.images / name for name in missing]
    print(f"{len(paths) - len(left_out)} embeddings in {len(shards)} files in {options.output}")
    for path in left_out:
        print(f"could not be read: {path}")


def load(name: str, size: int, checkpoint: Path | None, random_weights: bool) -> tuple[Any, Callable[[Any], Tensor]]:
    """A timm model that yields one vector per image, and the transform of the images that it was trained with."""
    import timm

    pretrained = checkpoint is None and not random_weights
    options = {"checkpoint_path": str(checkpoint)} if checkpoint is not None else {}
    if random_weights:
        torch.manual_seed(0)  # the same in every run, so that one can go on where another stopped
    model = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=size, **options).eval()
    config = timm.data.resolve_model_data_config(model)
    config["input_size"], config["crop_pct"] = (3, size, size), 1.0
    return model, timm.data.create_transform(**config)


def describe_weights(model: Any, checkpoint: Path | None, random_weights: bool) -> str | dict[str, object]:
    """What tells the weights of a model that :func:`load` made from others."""
    if random_weights:
        return "random"
    if checkpoint is not None:
        status = checkpoint.stat()
        return {"checkpoint": str(checkpoint.resolve()), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    facts = model.pretrained_cfg
    return ".".join(filter(None, ["pretrained " + facts["architecture"], facts.get("tag")]))


def check_settings(path: Path, settings: dict[str, object]) -> None:
    """Embeddings made with other settings must not end up in one folder."""
    try:
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(settings))
            unfinished.replace(path)
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # the latter if it is no JSON, or no text
        sys.exit(f"embed_folder: output must hold settings that can be written and read, got {path}: {error}")
    if before != settings:
        sys.exit(f"embed_folder: output must be made with {before}, got {settings}")


def batches(
    paths: list[Path], transform: Callable[[Any], Tensor], size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[Tensor | None, list[bool]]]:
    """Images ``[B, 3, size, size]`` of those that can be read, and which can; the next batch is decoded meanwhile."""
    groups = [paths[i : i + size] for i in range(0, len(paths), size)]
    pending = [pool.submit(read, path, transform) for path in groups[0]]
    for following in [*groups[1:], []]:
        upcoming = [pool.submit(read, path, transform) for path in following]
        images = [future.result() for future in pending]
        present = [image for image in images if image is not None]
        yield (torch.stack(present) if present else None), [image is not None for image in images]
        pending = upcoming


def read(path: Path, transform: Callable[[Any], Tensor]) -> Tensor | None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises on what it refuses
        return None


def save(path: Path, embeddings: Tensor, names: list[str], left_out: list[str]) -> None:
    from safetensors.torch import save_file

    unfinished = path.with_suffix(".unfinished")
    metadata = {"paths": json.dumps(names), "left_out": json.dumps(left_out)}
    save_file({"embeddings": embeddings.contiguous()}, unfinished, metadata)
    unfinished.replace(path)


def names_in(path: Path) -> tuple[list[str], list[str]]:
    """The images of a file, and those of them that could not be read and have no row."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return json.loads(metadata["paths"]), json.loads(metadata["left_out"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        sys.exit(
            f"embed_folder: output must hold files that an earlier run wrote, got {path}: {type(error).__name__}: "
            f"{error}; delete it to have it made again"
        )


if __name__ == "__main__":
    main()
