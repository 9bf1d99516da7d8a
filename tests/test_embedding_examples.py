"""The examples that embed folders and compare masks, on tiny models and a few photographs."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
embed_folder = pytest.importorskip("embed_folder")
safetensors = pytest.importorskip("safetensors.torch")
SIZE = 96


@pytest.fixture
def folder(tmp_path):
    """Five photographs in two folders, and one file that is none."""
    image = pytest.importorskip("PIL.Image")
    data = pytest.importorskip("skimage.data")
    images = tmp_path / "images"
    (images / "below").mkdir(parents=True)
    for number, name in enumerate(["astronaut", "coffee", "chelsea", "camera", "coins"]):
        place = images / "below" if number % 2 else images
        image.fromarray(getattr(data, name)()).resize((120, 100)).save(place / f"{name}.png")
    (images / "broken.jpg").write_bytes(b"not an image")
    (images / "notes.txt").write_text("no image either")
    return images


def run(images, output, *more, weights=("--random-weights",)):
    arguments = ["--model", "vit_tiny_patch16_224", *weights, "--size", str(SIZE), "--device", "cpu"]
    embed_folder.main([str(images), str(output), *arguments, "--batch", "2", "--shard", "4", "--threads", "2", *more])


def rows(output):
    """Embedding of each image, by its path."""
    found = {}
    for path in sorted(output.glob("*.safetensors")):
        names, left_out = embed_folder.names_in(path)
        embeddings = safetensors.load_file(path)["embeddings"]
        present = [name for name in names if name not in left_out]
        assert len(present) == len(embeddings)
        found |= dict(zip(present, embeddings))
    return found


def test_embeddings_are_those_of_the_model(folder, tmp_path, capsys):
    import timm
    from PIL import Image

    run(folder, tmp_path / "out")
    found = rows(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert found.keys() == {"astronaut.png", "below/camera.png", "below/coffee.png", "chelsea.png", "coins.png"}
    printed = capsys.readouterr().out
    assert "5 embeddings in 2 files" in printed
    assert "broken.jpg" in printed
    model, transform = embed_folder.load("vit_tiny_patch16_224", SIZE, None, True)
    assert isinstance(model, timm.models.VisionTransformer)
    for name, embedding in found.items():
        with torch.no_grad():
            expected = model(transform(Image.open(folder / name).convert("RGB"))[None])[0]
        torch.testing.assert_close(embedding, expected, atol=1e-4, rtol=1e-4)


def test_a_run_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, capsys):
    read, seen = embed_folder.read, []

    def count(path, transform):
        seen.append(path.name)
        return read(path, transform)

    monkeypatch.setattr(embed_folder, "read", count)
    output = tmp_path / "out"
    run(folder, output)
    expected = rows(output)
    assert len(seen) == 6
    (output / "00001.safetensors").unlink()
    (output / "00001.unfinished").write_bytes(b"a run was stopped here")
    seen.clear()
    run(folder, output)
    assert len(seen) == 2
    found = rows(output)
    for name, embedding in expected.items():
        assert torch.equal(found[name], embedding)
    assert "broken.jpg" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"output must be made with .*got"):
        run(folder, output, "--density", "0.5")
    (folder / "astronaut.png").unlink()
    with pytest.raises(SystemExit):
        run(folder, output)
    assert "must be of the images that are there now" in capsys.readouterr().err


def test_an_image_over_the_pixel_limit_is_left_out(folder, tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image")
    image.new("1", (400, 300)).save(folder / "large.png")
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 50_000)
    run(folder, tmp_path / "out")
    assert len(rows(tmp_path / "out")) == 5
    assert f"could not be read: {folder / 'large.png'}" in capsys.readouterr().out


def test_other_weights_are_refused(folder, tmp_path):
    output, checkpoint = tmp_path / "out", tmp_path / "weights.pth"
    model, _ = embed_folder.load("vit_tiny_patch16_224", SIZE, None, True)
    torch.save(model.state_dict(), checkpoint)
    weights = ("--checkpoint", str(checkpoint))
    run(folder, output, weights=weights)
    expected = rows(output)
    (output / "00001.safetensors").unlink()
    run(folder, output, weights=weights)
    assert all(torch.equal(embedding, expected[name]) for name, embedding in rows(output).items())
    with pytest.raises(SystemExit, match=r"output must be made with .*weights.pth.*, got .*'weights': 'random'"):
        run(folder, output)
    torch.save(model.half().state_dict(), checkpoint)
    with pytest.raises(SystemExit, match=r"output must be made with .*got"):
        run(folder, output, weights=weights)
    settings = json.loads((output / "settings.json").read_text())
    assert settings["dtype"] == "float32"
    name = embed_folder.describe_weights(model, None, False)
    assert name.startswith("pretrained vit_tiny_patch16_224.")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--shard", "0", "shard: must be at least 1, got 0"),
        ("--batch", "-1", "batch: must be at least 1, got -1"),
        ("--threads", "0", "threads: must be at least 1, got 0"),
        ("--size", "0", "size: must be at least 1, got 0"),
        ("--density", "nan", "density: must lie in (0, 1], got nan"),
        ("--device", "nonsense", "device: must be one that is here, got nonsense"),
        ("--device", "meta", "device: must be one that is here, got meta"),
        ("--model", "vit_of_nobody", f"model: must be one that timm can make for {SIZE} pixels, with weights within"),
    ],
)
def test_what_is_refused_leaves_no_settings(folder, tmp_path, capsys, option, value, message):
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out", option, value)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "settings.json").exists()


def test_outputs_that_cannot_be_gone_on_with(folder, tmp_path, capsys):
    output = tmp_path / "out"
    output.write_text("a file")
    with pytest.raises(SystemExit):
        run(folder, output)
    assert "output: must be a folder that can be made, got" in capsys.readouterr().err
    output.unlink()
    run(folder, output)
    (output / "00000.safetensors").write_bytes(b"broken")
    with pytest.raises(SystemExit, match=r"output must hold files that an earlier run wrote, got .*00000.safetensors"):
        run(folder, output)
    (output / "settings.json").write_text('{"model": ')
    with pytest.raises(SystemExit, match=r"output must hold settings that can be written and read, got .*settings"):
        run(folder, output)


def test_a_folder_without_images(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "out")
    assert "there must be images in" in capsys.readouterr().err


def test_intersection_over_union():
    sam_predictor = pytest.importorskip("sam_predictor")
    found = torch.zeros(3, 4, 4, dtype=torch.bool).numpy()
    expected = found.copy()
    found[0, :2], expected[0, 1:3] = True, True  # 4 of 12
    found[1] = expected[1] = True
    assert sam_predictor.intersection_over_union(found, expected) == pytest.approx((1 / 3 + 1 + 1) / 3)
