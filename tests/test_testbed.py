"""The testbed: scenes are what their labels say, the committed model is good at them, and its training goes on."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("timm")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from testbed import model as testbed  # noqa: E402
from testbed.measures import Measures, extents, measure, over_items  # noqa: E402
from testbed.scenes import CARDS, COLOURS, MARKED, MEAN, NOTHING, OTHER, STD, Scenes, Setting  # noqa: E402

SMALL = Setting(size=160, card=32, digits=5, digit_sizes=(12, 60))


@pytest.fixture(scope="module")
def batch():
    return Scenes(SMALL, seed=3).batch("training", 11, 24)


def test_batches_are_a_function_of_seed_split_and_number(batch):
    again = Scenes(SMALL, seed=3)
    assert torch.equal(again.batch("training", 11, 24).images, batch.images)
    for other in (
        again.batch("training", 12, 24),
        again.batch("validation", 11, 24),
        Scenes(SMALL, seed=4).batch("training", 11, 24),
    ):
        assert not torch.equal(other.images, batch.images)
        assert not torch.equal(other.classes, batch.classes)


def test_what_is_asked_for_is_on_the_card_of_the_colour(batch):
    for colours, classes, asked in zip(batch.colours, batch.classes, batch.asked):
        cards = dict(zip(colours[:CARDS].tolist(), classes[:CARDS].tolist()))
        assert sorted(cards) == list(range(CARDS))
        assert len(set(cards.values())) == CARDS
        assert [cards[colour] for colour in colours.tolist()] == asked.tolist()


def test_half_of_the_digits_are_marked_and_classes_alone_do_not_tell_which():
    batch = Scenes(Setting(size=32, card=4, digits=12, digit_sizes=(12, 12))).batch("training", 0, 500)
    classes, cards = batch.classes[:, CARDS:], batch.classes[:, :CARDS]
    is_asked = classes == batch.asked[:, CARDS:]
    assert is_asked.float().mean() == pytest.approx(0.5, abs=0.03)
    is_on_a_card = (classes[..., None] == cards[:, None]).any(-1)
    assert is_asked[is_on_a_card].float().mean() == pytest.approx(0.5 / 0.875, abs=0.03)
    assert not is_asked[~is_on_a_card].any()


def test_labels_against_squares_computed_by_hand(batch):
    """Whether a patch's centre lies in a digit's square, from centre, height and angle, one patch at a time."""
    labels = batch.labels().view(len(batch.images), SMALL.side, SMALL.side)
    seen = set()
    for scene in range(6):
        squares = []
        for item in range(CARDS, batch.classes.shape[1]):
            if batch.present[scene, item]:
                (a, b, c), (d, e, f) = batch.place[scene, item].double().tolist()
                half, angle = SMALL.size / 2, math.atan2(b, a)
                scale = math.hypot(a, b)
                assert scale * float(batch.heights[scene, item]) == pytest.approx(SMALL.size, rel=1e-4)
                determinant = a * e - b * d
                x, y = (b * f - e * c) / determinant, (d * c - a * f) / determinant
                is_marked = batch.classes[scene, item] == batch.asked[scene, item]
                assert abs(angle) <= math.radians(25) + 1e-4
                squares.append((half * (x + 1), half * (y + 1), float(batch.heights[scene, item]), angle, is_marked))
        for row in range(SMALL.side):
            for column in range(SMALL.side):
                expected = NOTHING
                for x, y, height, angle, is_marked in squares:
                    dx, dy = 8 * column + 4 - x, 8 * row + 4 - y
                    along = math.cos(angle) * dx + math.sin(angle) * dy
                    across = math.cos(angle) * dy - math.sin(angle) * dx
                    if abs(abs(along) - height / 2) < 1e-3 or abs(abs(across) - height / 2) < 1e-3:
                        expected = None  # too near the edge to tell
                    elif max(abs(along), abs(across)) < height / 2:
                        expected = MARKED if is_marked else OTHER
                if expected is not None:
                    assert labels[scene, row, column] == expected
                    seen.add(expected)
    assert seen == {NOTHING, OTHER, MARKED}


def test_digits_neither_overlap_nor_lie_on_cards_and_have_a_patch_at_least():
    setting = Setting(size=256)
    batch = Scenes(setting).batch("training", 5, 40)
    assert (extents(batch)[batch.judged] >= 1).all()
    half = batch.heights / 2**0.5
    turn, shift = batch.place[..., :2], batch.place[..., 2:]
    centres = (1 - torch.linalg.solve(turn, shift)[..., 0]) * setting.size / 2
    for scene in range(len(batch.images)):
        items = batch.judged[scene].nonzero().flatten()
        apart = torch.cdist(centres[scene, items], centres[scene, items])
        needed = half[scene, items, None] + half[scene, items]
        needed.fill_diagonal_(0)
        assert (apart >= needed - 1e-2).all()
        near_edge = setting.size / 2 - (centres[scene, items] - setting.size / 2).abs()
        assert ((near_edge - setting.card).clamp(min=0).norm(dim=-1) >= half[scene, items] - 1e-2).all()
        assert (near_edge >= half[scene, items, None] - 1e-2).all()
    assert batch.judged.sum(-1).float().mean() > 4


def test_digits_are_painted_in_their_colour_where_their_square_is(batch):
    pixels = torch.nn.functional.avg_pool2d(batch.images * STD + MEAN, 8).flatten(2).transpose(1, 2)
    items = batch.classes.shape[1]
    mean = over_items(pixels, batch.owner, items) / extents(batch).clamp(min=1)[..., None]
    hue = mean - mean.mean(-1, keepdim=True)
    palette = torch.tensor(COLOURS)
    palette = palette - palette.mean(-1, keepdim=True)
    nearest = torch.cosine_similarity(hue[..., None, :], palette, dim=-1).argmax(-1)
    assert (nearest == batch.colours)[:, :CARDS].all()
    assert (nearest == batch.colours)[batch.judged].float().mean() > 0.85


def test_hands_of_training_and_validation_differ_and_so_do_those_of_card_and_scene():
    scenes = Scenes(SMALL)
    training, validation = (set(scenes._hands[split].flatten().tolist()) for split in ("training", "validation"))
    assert training & validation <= {0}  # the filling of the shorter rows
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(10, (500, CARDS + 8), generator=generator)
    hands = scenes._hands_of(classes, "validation", generator)
    for card in range(CARDS):
        same_class = classes[:, CARDS:] == classes[:, card : card + 1]
        assert same_class.any()
        assert (hands[:, CARDS:] != hands[:, card : card + 1])[same_class].all()


def test_measures():
    batch = Scenes(SMALL, seed=8).batch("validation", 0, 6)
    owner = batch.owner.flatten(1)
    logits = torch.zeros(*owner.shape, testbed.create(64, 64, 1, 1).num_classes)
    logits[..., :3] = 20.0 * torch.nn.functional.one_hot(batch.labels(), 3)
    logits[..., 3:13] = torch.nn.functional.one_hot(batch.classes.gather(1, owner.clamp(min=0)), 10)
    logits[..., -1] = extents(batch).gather(1, owner.clamp(min=0)).clamp(min=1).log()
    perfect, flawed = Measures(), Measures()
    perfect.add(testbed.Answers.of(logits), batch)
    assert (perfect.accuracy, perfect.recognition, perfect.iou, perfect.count_accuracy) == (100, 100, 100, 100)
    wrong = batch.judged.nonzero()[0]  # one digit
    patches = owner[wrong[0]] == wrong[1]
    logits[wrong[0], patches, :3] = logits[wrong[0], patches][:, [0, 2, 1]]
    flawed.add(testbed.Answers.of(logits), batch)
    assert flawed.accuracy == pytest.approx(100 * (1 - 1 / flawed.digits))
    assert flawed.agreement(perfect) == pytest.approx(100 * (1 - float(patches.sum()) / owner.numel()), abs=1e-4)
    assert flawed.iou < 100
    assert flawed.count_accuracy < 100


@pytest.fixture
def train(monkeypatch):
    """Runs the training script with arguments, as the command line would."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "testbed"))
    import train

    def call(*arguments):
        sizes = ["--small", "--device", "cpu", "--low-steps", "2", "--steps", "2", "--batch", "2"]
        monkeypatch.setattr(sys, "argv", ["train.py", *sizes, *map(str, arguments)])
        train.main()

    return call


def test_a_training_that_is_resumed_ends_where_an_uninterrupted_one_does(train, tmp_path, capsys):
    train("--folder", tmp_path / "whole")
    train("--folder", tmp_path / "parts", "--stop-after", "3")
    assert "interrupted after 3 steps" in capsys.readouterr().out
    train("--folder", tmp_path / "parts", "--resume")
    assert "resumed after 3 steps" in capsys.readouterr().out
    from safetensors.torch import load_file

    whole, parts = (load_file(tmp_path / name / "testbed.safetensors") for name in ("whole", "parts"))
    torch.testing.assert_close(whole, parts, atol=2e-3, rtol=1e-2)
    assert whole["pos_embed"].shape == (1, 16 * 16, 64)
    record = json.loads((tmp_path / "parts" / "training.json").read_text())
    assert [row["step"] for row in record["rows"]] == [1, 2, 3, 4]
    assert len(record["meta"]["loss"]) == 4
    assert (tmp_path / "parts" / "training.png").stat().st_size > 10_000


def test_the_committed_model(capsys):
    """Strict keys, 10 MB, 4096 tokens of head_dim 64, no class token; and it is good at scenes that it never saw."""
    assert testbed.WEIGHTS.stat().st_size <= 10e6
    model = testbed.load()
    assert (model.num_prefix_tokens, model.patch_embed.num_patches) == (0, 4096)
    assert model.blocks[0].attn.head_dim == 64
    scenes = Scenes(Setting())
    torch.set_num_threads(2)
    measures = measure(model, [scenes.batch("validation", 7, 3)], dtype=None)
    assert measures.digits > 25
    assert measures.accuracy > 88
    assert measures.recognition > 88
    assert measures.iou > 55
