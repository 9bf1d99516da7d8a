"""What the command ``choose`` works on: a model by its name or from a file, and the photographs of a folder."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_SAM_NAMES = ("sam_vit_b", "sam_vit_l", "sam_vit_h")
_SAM_SIZE = 1024
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Subject:
    """A model, ready to run, and how it takes photographs.

    Args:
        model: in evaluation mode.
        size: side of the square images that it takes.
        mean, std: of the colours, in [0, 1], by which images are normalised.
        pads: fit a photograph into the square and pad it, as Segment Anything does, rather than cut the square out.
    """

    model: nn.Module
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pads: bool = False

    def prepare(self, photograph: Any) -> Tensor:
        """A ``PIL.Image`` as the model takes it, ``[3, size, size]``."""
        import numpy as np
        from PIL import Image

        width, height = photograph.size
        edge = max(width, height) if self.pads else min(width, height)
        if not self.pads:
            left, top = (width - edge) // 2, (height - edge) // 2
            photograph = photograph.crop((left, top, left + edge, top + edge))
        wanted = [max(round(side * self.size / edge), 1) for side in photograph.size]
        photograph = photograph.convert("RGB").resize(wanted, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(photograph)).float().div(255)  # [height, width, 3]
        normal = ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)
        image = torch.zeros(3, self.size, self.size)
        image[:, : normal.shape[1], : normal.shape[2]] = normal
        return image

    def photograph(self, image: Tensor) -> Tensor:
        """What :meth:`prepare` made, as pixels ``[size, size, 3]`` in [0, 1]."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (image.float().cpu().permute(1, 2, 0) * std + mean).clamp(0, 1)


def images_in(folder: Path) -> list[Path]:
    """The images in a folder and below it, in order.

    Raises:
        ValueError: if it is no folder, or has no image.
    """
    if not folder.is_dir():
        raise ValueError(f"choose: images must be a folder, got {folder}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"choose: images must be a folder with images, got none in {folder}")
    return paths


def read_images(paths: Sequence[Path], subject: Subject, most: int) -> tuple[list[Tensor], list[Path]]:
    """The first images that can be read, at most so many, and the paths of those before them that cannot.

    Raises:
        ValueError: if none can be read.
    """
    from PIL import Image

    found: list[Tensor] = []
    unreadable: list[Path] = []
    for path in paths:
        if len(found) == most:
            break
        try:
            with Image.open(path) as photograph:
                found.append(subject.prepare(photograph))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises on bad files
            unreadable.append(path)
    if not found:
        raise ValueError(f"choose: images must be readable, got {len(unreadable)} files that are not")
    return found, unreadable


def find_model(name: str, size: int | None, checkpoint: Path | None, random_weights: bool) -> Callable[[], Subject]:
    """What loads a model: all that can be checked without loading is checked here.

    Args:
        name: of a model of timm; ``sam_vit_b``, ``sam_vit_l`` or ``sam_vit_h`` of segment_anything, of which the image
            encoder is taken; or ``path.py:function`` for a function without arguments that returns a model.
        size: side of the images in pixels; that for which the model was made if None.
        checkpoint: weights to load; timm's pretrained ones if None.
        random_weights: load no weights.

    Raises:
        ValueError: if there is no such model, or it cannot take such images.
    """
    if checkpoint is not None and not checkpoint.is_file():
        raise ValueError(f"choose: checkpoint must be a file, got {checkpoint}")
    if size is not None and size < 1:
        raise ValueError(f"choose: image-size must be positive, got {size}")
    if name in _SAM_NAMES:
        if size not in (None, _SAM_SIZE):
            raise ValueError(f"choose: image-size must be {_SAM_SIZE} for {name}, got {size}")
        if checkpoint is None and not random_weights:
            raise ValueError(f"choose: checkpoint must be given for {name}, got none; or random-weights to try it out")
        check_installed("segment_anything", "sam")
        return lambda: _load_sam(name, checkpoint)
    if ".py:" in name:
        path, function = name.rsplit(":", 1)
        if not Path(path).is_file():
            raise ValueError(f"choose: model must be a file and a function in it, got {path}, which is no file")
        if size is None:
            raise ValueError("choose: image-size must be given for a model from a file, got none")
        return lambda: _load_from_file(Path(path), function, size, checkpoint)
    check_installed("timm", "timm")
    import timm

    if not timm.is_model(name.split(".")[0]):
        similar = timm.list_models(f"*{name.split('.')[0]}*")[:4]
        hint = f"; there are {', '.join(similar)}" if similar else ""
        raise ValueError(
            f"choose: model must be one of timm's, one of {', '.join(_SAM_NAMES)}, or path.py:function, "
            f"got {name!r}{hint}"
        )
    return lambda: _load_timm(name, size, checkpoint, random_weights)


def _load_timm(name: str, size: int | None, checkpoint: Path | None, random_weights: bool) -> Subject:
    import timm

    options: dict[str, Any] = {} if size is None else {"img_size": size}
    weights: dict[str, Any] = {"pretrained": checkpoint is None and not random_weights}
    if checkpoint is not None:
        weights["checkpoint_path"] = str(checkpoint)
    try:
        model = timm.create_model(name, **options, **weights)
    except TypeError as error:
        raise ValueError(f"choose: model must be a vision transformer of variable size, got {name}: {error}") from None
    except Exception as error:  # of any kind: network, hub, files, sizes
        _check_can_be_made(name, options)
        if checkpoint is not None:
            raise _not_its_weights(name, checkpoint, error) from error
        raise ValueError(
            f"choose: weights of {name} must be within reach, got {type(error).__name__}: {error}; give a checkpoint, "
            "or random-weights to try it out"
        ) from None
    config = timm.data.resolve_model_data_config(model)
    return Subject(model.eval(), size or config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]))


def _check_can_be_made(name: str, options: dict[str, Any]) -> None:
    """Raises ValueError if a model of timm cannot be made without weights either."""
    import timm

    try:
        timm.create_model(name, **options)
    except Exception as error:  # of any kind: models check their sizes as they like, or divide by them
        size = options.get("img_size", "none")
        raise ValueError(
            f"choose: model and image-size must be what timm can make, got {name} and {size}: {_in_a_line(error)}"
        ) from error


def _not_its_weights(name: str, checkpoint: Path, error: Exception) -> ValueError:
    return ValueError(f"choose: checkpoint must hold weights of {name}, got {checkpoint}: {_in_a_line(error)}")


def _in_a_line(error: Exception) -> str:
    """What an error of others says, in short."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def check_takes(name: str, model: nn.Module, image: Tensor) -> None:
    """Raises ValueError if a model does not take an image ``[1, 3, size, size]``."""
    try:
        with torch.no_grad():
            model(image)
    except Exception as error:  # of any kind: the code is not ours
        raise ValueError(
            f"choose: image-size must be one that {name} takes, got {image.shape[-1]}: {_in_a_line(error)}"
        ) from error


def _load_sam(name: str, checkpoint: Path | None) -> Subject:
    from segment_anything import sam_model_registry

    try:
        sam = sam_model_registry[name.removeprefix("sam_")](None if checkpoint is None else str(checkpoint))
    except Exception as error:  # of any kind: pickles, names, shapes
        if checkpoint is None:
            raise
        raise _not_its_weights(name, checkpoint, error) from error
    mean, std = (tuple((part.flatten() / 255).tolist()) for part in (sam.pixel_mean, sam.pixel_std))
    return Subject(sam.image_encoder.eval(), _SAM_SIZE, mean, std, pads=True)


def _load_from_file(path: Path, function: str, size: int, checkpoint: Path | None) -> Subject:
    spec = importlib.util.spec_from_file_location(f"_choose_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of any kind: the code is not ours
        raise ValueError(f"choose: model must be in a file that runs, got {path}: {_in_a_line(error)}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    make = getattr(module, function, None)
    if not callable(make):
        raise ValueError(f"choose: model must be a function of {path}, got {function!r}, which it does not have")
    try:
        model = make()
    except Exception as error:  # of any kind: the code is not ours
        raise ValueError(f"choose: model must be what {function} of {path} returns, got {_in_a_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"choose: model must be what {function} of {path} returns, got {type(model).__name__}")
    if checkpoint is not None:
        try:
            if checkpoint.suffix == ".safetensors":
                from safetensors.torch import load_file

                state = load_file(checkpoint)
            else:
                state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            model.load_state_dict(state)
        except Exception as error:  # of any kind: pickles, names, shapes
            raise _not_its_weights(f"{path}:{function}", checkpoint, error) from error
    return Subject(model.eval(), size, *_IMAGENET)


def check_installed(package: str, extra: str) -> None:
    """Raises ValueError, naming the extra that brings it, if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f'choose: {package} must be installed, but is not; pip install "sparse_attn_modules[{extra}]" brings it'
        )
