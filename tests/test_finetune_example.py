"""The fine-tuning example on a CPU: it trains, resumes where it was interrupted, and publishes what it measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIZES = ["--small", "--device", "cpu", "--low-steps", "3", "--steps", "4", "--batch", "2", "--validation-batches", "1"]

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")


@pytest.fixture
def run(monkeypatch):
    """Runs the script with arguments, as the command line would."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def call(*arguments):
        import finetune_vit

        monkeypatch.setattr(sys, "argv", ["finetune_vit.py", *SIZES, *map(str, arguments)])
        finetune_vit.main()

    return call


def checkpoint(folder):
    return torch.load(folder / "finetune_vit.pt")


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, tmp_path, capsys):
    options = ("--densities", "0.4", "--schedule")
    run("--folder", tmp_path / "whole", *options)
    shown = capsys.readouterr().out
    run("--folder", tmp_path / "parts", *options, "--stop-after", "2")
    assert checkpoint(tmp_path / "parts")["step"] == 2
    assert "interrupted after 2 steps" in capsys.readouterr().out
    run("--folder", tmp_path / "parts", *options, "--resume")
    assert "resumed after 2 steps" in capsys.readouterr().out

    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert whole["step"] == parts["step"] == 4
    assert list(whole["runs"]) == ["dense", "density 0.4"]
    for name, state in whole["runs"].items():
        other = parts["runs"][name]
        assert len(state["curve"]["loss"]) == 4
        torch.testing.assert_close(other["curve"]["loss"], state["curve"]["loss"], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(other["model"], state["model"], atol=1e-3, rtol=1e-3)
        assert any(not torch.equal(state["model"][key], value) for key, value in whole["weights"].items())
    # The schedule starts dense and ends sparse, so the two variants begin alike and part later.
    dense, sparse = (whole["runs"][name]["curve"]["loss"] for name in whole["runs"])
    assert sparse[0] == pytest.approx(dense[0], abs=0.02)
    assert whole["runs"]["density 0.4"]["schedule"]["step"] == 4
    assert shown.count("accuracy, evaluated densely") == 2
    assert (tmp_path / "parts" / "finetune_vit.png").stat().st_size > 10_000


def test_the_record(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "benchmarks"))
    import records

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import finetune_vit

    monkeypatch.setattr(finetune_vit, "RESULTS", tmp_path / "pictures")
    place = records.result_path
    monkeypatch.setattr(records, "result_path", lambda script, device: place(script, device, tmp_path))
    run("--folder", tmp_path, "--densities", "0.5", "--out")
    record = json.loads((tmp_path / "finetune_vit-cpu.json").read_text())
    assert [row["variant"] for row in record["rows"]] == ["dense", "density 0.5"]
    assert [round(row["block density"], 2) for row in record["rows"]] == [1.0, 0.51]
    for row in record["rows"]:
        assert row["tokens"] == 1024
        assert row["ms per step"] > 0
        assert 0 <= row["accuracy"] <= 1
        assert len(record["meta"]["curves"][row["variant"]]["loss"]) == row["steps"] == 4
    assert (tmp_path / "pictures" / "finetune_vit-cpu.png").exists()


def test_batches_are_a_function_of_their_number(run):
    from digits_on_photographs import DigitsOnPhotographs

    task, again = (DigitsOnPhotographs(64, (12, 30), 3, torch.device("cpu"), seed=5) for _ in range(2))
    images, labels = task.batch("training", 7, 6)
    assert images.shape == (6, 3, 64, 64)
    assert images.isfinite().all()
    assert 0 <= labels.min() <= labels.max() < 10
    for other, same in (
        (again.batch("training", 7, 6), True),
        (task.batch("training", 8, 6), False),
        (task.batch("validation", 7, 6), False),
    ):
        assert torch.equal(other[0], images) == same


def test_no_handwriting_of_the_validation_is_trained_on(run):
    from digits_on_photographs import DigitsOnPhotographs

    task = DigitsOnPhotographs(32, (8, 16), 1, torch.device("cpu"))
    training, validation = (torch.cat(task._by_class[split]) for split in ("training", "validation"))
    assert len(training) + len(validation) == 1797
    assert not set(training.tolist()) & set(validation.tolist())
    assert all(len(hands) > 20 for hands in task._by_class["validation"])


def test_the_running_mean_starts_without_a_bias(run):
    from training_curves import running_mean

    assert running_mean([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert running_mean([0.0, 1.0])[1] == pytest.approx(1 / 1.9)
