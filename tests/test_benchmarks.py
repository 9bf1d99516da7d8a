"""The records of measurements and the tables made from them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
META = {"device": "Some CPU", "torch": "2.10.0", "cuda": None, "git": "0123456789abcdef", "date": "2026-01-02T03:04:05"}
ROW_KEYS = {"implementation", "B", "H", "N", "D", "dtype", "pattern", "density", "relative_position"}
ROW_KEYS |= {"fwd_ms", "bwd_ms", "fwd_tflops", "bwd_tflops", "peak_mib"}


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Scripts import each other as when they are run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What the script writes for one small size."""
    path = tmp_path_factory.mktemp("results") / "cpu_attention-cpu.json"
    command = [sys.executable, BENCHMARKS / "cpu_attention.py", "--tokens", "1024", "--densities", "1", "0.5", "0.2"]
    command += ["--rounds", "1", "--threads", "1", "--out", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def test_a_record_written_before_does_not_make_a_commit_dirty(tmp_path):
    import records

    def git(*arguments):
        author = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        subprocess.run(["git", "-C", tmp_path, *author, *arguments], check=True, capture_output=True)

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "package").mkdir()
    code, record = tmp_path / "package" / "code.py", tmp_path / "benchmarks" / "results" / "record.json"
    code.write_text("1")
    record.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    record.write_text("2")
    assert re.fullmatch(r"[0-9a-f]{40}", records.commit_of(tmp_path / "package"))
    code.write_text("2")
    assert records.commit_of(tmp_path / "benchmarks").endswith("-dirty")


def test_the_record_of_cpu_attention(record):
    path, printed = record
    content = json.loads(path.read_text())
    assert content.keys() == {"meta", "rows"}
    meta, rows = content["meta"], content["rows"]
    assert meta["torch"] == torch.__version__
    assert meta["threads"] == 1
    assert meta["cuda"] is None
    assert meta["device"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", meta["date"])
    assert meta["git"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", meta["git"])

    assert [row["implementation"] for row in rows] == ["sdpa", "ours", "ours", "ours"]
    assert [round(row["density"], 3) for row in rows] == [1, 1, 0.5, 0.25]  # 32 × 32 patches are 4 × 2 tiles
    for row in rows:
        assert row.keys() >= ROW_KEYS
        assert row["fwd_ms"] > 0
        assert row["bwd_ms"] > 0
        assert row["fwd_bwd_ms"] > row["bwd_ms"]
        assert row["fwd_speedup"] == pytest.approx(rows[0]["fwd_ms"] / row["fwd_ms"])
        active = row["fwd_tflops"] * row["fwd_ms"] / (rows[0]["fwd_tflops"] * rows[0]["fwd_ms"])
        assert active == pytest.approx(row["density"], rel=1e-6)  # tiles are full here, so tokens go as blocks
    assert "| " in printed
    assert str(path) in printed


def test_peak_memory_counts_what_is_held_at_one_time():
    from cpu_attention import peak_mib

    def two_then_one():
        a, b = torch.zeros(2**20), torch.zeros(2**20)  # 4 MiB each
        del a, b
        torch.zeros(2**19)

    assert peak_mib(two_then_one) == pytest.approx(8, abs=0.1)


def test_write_and_read(tmp_path):
    import records

    path = tmp_path / "new" / "attention-cpu.json"
    rows = [{"density": 0.25, "fwd_ms": 1.5}]
    records.write(path, META, rows)
    assert records.read(path) == (META, rows)
    assert records.result_path("attention", "cpu", tmp_path) == tmp_path / "attention-cpu.json"
    assert (
        records.environment("cpu", rounds=3).items() >= {"rounds": 3, "torch": torch.__version__, "cuda": None}.items()
    )
    with pytest.raises(ValueError, match="rows must not be empty"):
        records.write(path, META, [])
    with pytest.raises(ValueError, match=r"meta must hold .* got none of git"):
        records.write(path, {key: value for key, value in META.items() if key != "git"}, rows)


def test_caption_names_device_versions_commit_and_date():
    import records

    assert records.caption({**META, "threads": 2}) == (
        "Some CPU, torch 2.10.0, 2 threads, commit 0123456789, 2026-01-02"
    )
    on_gpu = {**META, "device": "NVIDIA H200", "cuda": "13.0", "threads": 16, "git": "0123456789abcdef-dirty"}
    assert records.caption(on_gpu) == ("NVIDIA H200, torch 2.10.0, CUDA 13.0, commit 0123456789-dirty, 2026-01-02")
    assert "commit" not in records.caption({**META, "git": None})


def test_table():
    from records import Column, table

    rows = [{"name": "a|b", "ms": 1.25, "ok": True}, {"name": "long name", "ms": None, "ok": False}]
    columns = [
        Column("name", "name"),
        Column("ms", "ms", ".1f"),
        Column("twice", lambda r: (r["ms"] or 1) * 2),
        Column("ok", "ok"),
    ]
    assert table(rows, columns).splitlines() == [
        "| name      |  ms | twice | ok  |",
        "| --------- | --: | ----: | --- |",
        r"| a\|b      | 1.2 |   2.5 | yes |",
        "| long name |     |     2 | no  |",
    ]
    assert table([{"n": 3, "x": 0.12345}, {"y": 1.0}]).splitlines()[2:] == [
        "|   3 | 0.1235 |     |",
        "|     |        |   1 |",
    ]


def run_make_tables(*arguments):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "make_tables.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_tables_are_written_between_markers_and_checked(record, tmp_path):
    results = record[0].parent
    document = tmp_path / "README.md"
    document.write_text(
        "# Title\n<!-- table: cpu_attention -->\nold\n<!-- end -->\ntext\n"
        "<!-- table: never_run -->\n<!-- end -->\nlast\n"
    )
    before = document.read_text()
    code, printed = run_make_tables("--check", "--results", results, document)
    assert code == 1
    assert f"{document}: stale" in printed
    assert document.read_text() == before

    assert run_make_tables("--results", results, document)[0] == 0
    text = document.read_text()
    assert text.startswith("# Title\n<!-- table: cpu_attention -->\n| tokens | attention")
    assert text.endswith("text\n<!-- table: never_run -->\n*Not measured yet.*\n<!-- end -->\nlast\n")
    assert "old" not in text
    rows = json.loads(record[0].read_text())["rows"]
    assert all(f"{row['fwd_ms']:.1f}" in text for row in rows)
    assert f"{rows[2]['fwd_speedup']:.2f}×" in text
    assert "torch " + torch.__version__ in text
    assert run_make_tables("--check", "--results", results, document) == (0, "")

    document.write_text(text.replace(f"{rows[2]['fwd_speedup']:.2f}×", "99.00×"))  # typed by hand
    assert run_make_tables("--check", "--results", results, document)[0] == 1


def test_one_table_for_each_device_of_any_script(tmp_path):
    import make_tables
    import records

    records.write(tmp_path / "latency-a100.json", {**META, "device": "A100"}, [{"model": "vit", "ms": 2.0}])
    records.write(tmp_path / "latency-h200.json", {**META, "device": "H200"}, [{"model": "vit", "ms": 1.0}])
    text = make_tables.fill("<!-- table: latency -->\n<!-- end -->", tmp_path)
    assert text.index("A100") < text.index("H200")
    assert text.count("| model |  ms |") == 2


def test_a_marker_without_an_end():
    import make_tables

    for text in (
        "<!-- table: a -->\n",
        "<!-- table: a -->\n<!-- table: b -->\n<!-- end -->\n",
    ):
        with pytest.raises(ValueError, match="table a must be followed by <!-- end -->"):
            make_tables.fill(text)


def test_the_tables_of_this_repository_are_up_to_date():
    code, printed = run_make_tables("--check")
    assert code == 0, printed


def test_the_summary_holds_ours_against_the_fastest_other():
    import attention_summary

    case = {"B": 1, "H": 2, "N": 4096, "D": 64, "density": 0.25, "relative_position": False, "fwd_tflops": 1.0}
    rows = [
        {**case, "pattern": "random", "implementation": "fa4", "fwd_ms": 0.3},
        {**case, "pattern": "random", "implementation": "ours", "fwd_ms": 0.2},
        {**case, "pattern": "random", "implementation": "flex", "fwd_ms": 0.25},
        {**case, "pattern": "dense", "implementation": "ours", "fwd_ms": 0.1},  # nobody to be held against
        {**case, "pattern": "local", "implementation": "ours", "fwd_ms": 0.1},
        {**case, "pattern": "local", "implementation": "fa4", "fwd_ms": 0.2},
    ]
    (row,) = attention_summary.summarize(rows)
    assert (row["fastest_other"], row["fwd_ms"], row["other_ms"]) == ("FlexAttention", 0.2, 0.25)
    assert row["speedup"] == pytest.approx(1.25)


def test_the_record_of_training(tmp_path):
    from training import ATTENTION_COLUMNS, STEP_COLUMNS, attention, steps

    path = tmp_path / "training-cpu.json"
    command = [sys.executable, BENCHMARKS / "training.py", "--small", "--device", "cpu", "--modes", "eager"]
    command += ["--densities", "1", "0.5", "--rounds", "1", "--calls", "1", "--out", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    import records

    _, rows = records.read(path)
    whole, alone = steps(rows), attention(rows)
    assert [(row["implementation"], round(row["density"], 1)) for row in whole] == [
        ("timm", 1.0),
        ("ours", 1.0),
        ("ours", 0.5),
    ]
    assert [(row["implementation"], row["density"]) for row in alone] == [
        ("sdpa_bias, heads first", 1.0),
        ("sdpa_bias, tokens first", 1.0),
        ("ours", 1.0),
        ("ours", 0.25),
    ]
    for row in whole:
        assert row["speedup"] == pytest.approx(whole[0]["step_ms"] / row["step_ms"], abs=1e-3)
    fastest = min(row["fwd_bwd_ms"] for row in alone[:2])
    for row in alone:
        assert row["speedup"] == pytest.approx(fastest / row["fwd_bwd_ms"], abs=1e-3)
    assert records.table(whole, STEP_COLUMNS) in done.stdout
    assert records.table(alone, ATTENTION_COLUMNS) in done.stdout


def test_the_variants_of_training_compute_the_same():
    import training

    from sparse_attn_modules import BlockMask, TokenGrid

    grid = TokenGrid(5, 9)
    tensors = [torch.randn(2, 3, grid.num_tokens, width) for width in (8, 8, 8, grid.height, grid.width)]
    expected = training._with_bias_written_out(*tensors)
    torch.testing.assert_close(training._ours(BlockMask.dense(grid), *tensors), expected)


def test_the_record_of_encoders_is_added_to(tmp_path):
    path = tmp_path / "encoders-cpu.json"
    command = [sys.executable, BENCHMARKS / "encoders.py", "--models", "sam_b", "--sizes", "64", "--batch", "2"]
    command += ["--device", "cpu", "--modes", "eager", "--rounds", "1", "--out", path, "--implementations"]
    for implementations in (["stock"], ["sdpa_bias", "ours", "ours_0.5", "no_attention"]):
        done = subprocess.run([*command, *implementations], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    import encoders
    import encoders_summary
    import plot_encoders
    import records

    meta, rows = records.read(path)
    titles = ["as shipped", "SDPA, bias written out", "ours, exact", "ours, density 0.5", "no attention"]
    assert [encoders.title(row) for row in rows] == titles
    assert [row["cosine"] for row in rows[:4]] == pytest.approx([1] * 4, abs=1e-5)  # too few tiles to skip any
    assert rows[4]["cosine"] < 0.99
    assert all(row["ms"] > 0 and row["peak_gib"] > 0 for row in rows)
    (short,) = encoders_summary.summarize([*rows, {**rows[0], "batch": 1}, {**rows[0], "mode": "compiled", "batch": 1}])
    assert [short["shipped"], short["other"], short["exact"], short["floor"]] == [*rows[:3], rows[4]]
    plot_encoders.draw(rows, records.caption(meta), tmp_path / "encoders.svg")
    assert (tmp_path / "encoders.svg").stat().st_size > 10000


def test_the_short_table_of_encoders_takes_the_fastest_mode():
    import encoders_summary
    import records

    case = {"model": "sam_b", "title": "SAM ViT-B", "image_size": 1024, "batch": 1, "density": 1.0, "peak_gib": 1.0}
    rows = [
        {**case, "implementation": name, "mode": mode, "ms": ms}
        for name, mode, ms in (
            ("stock", "eager", 50.0),
            ("ours", "eager", 25.0),
            ("stock", "graphs", 8.0),
            ("ours", "graphs", 2.0),
        )
    ]
    (line,) = records.table(encoders_summary.summarize(rows), encoders_summary.COLUMNS).splitlines()[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["SAM ViT-B", "1024²", "1", "graphs", "8.00", "", "", "2.00", "4.00×", "", "", "", "1.00", "1.00"]


def test_rows_of_encoders_in_another_dtype_stand_beside_the_first(tmp_path):
    import encoders
    import encoders_summary
    import records

    path = tmp_path / "encoders-cpu.json"
    case = {"model": "sam_b", "title": "SAM ViT-B", "image_size": 64, "batch": 1, "mode": "eager", "density": 1.0}
    half, single = (
        [{**case, "dtype": dtype, "implementation": name, "ms": 1.0} for name in ("stock", "ours")]
        for dtype in ("bfloat16", "float32")
    )
    records.write(path, META, half)
    _, rows = records.merge(path, META, single, encoders.KEYS)
    assert rows == [*half, *single]
    titles = [row["title"] for row in encoders_summary.summarize(rows)]
    assert titles == ["SAM ViT-B, bfloat16", "SAM ViT-B, float32"]
    assert [row["title"] for row in encoders_summary.summarize(half)] == ["SAM ViT-B"]


def test_encoders_without_rounds_or_variants(monkeypatch, tmp_path, capsys):
    import encoders

    path = tmp_path / "encoders-cpu.json"
    command = [
        "encoders.py",
        "--models",
        "sam_b",
        "--sizes",
        "64",
        "--batch",
        "1",
        "--device",
        "cpu",
        "--out",
        str(path),
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--rounds", "0"])
    with pytest.raises(SystemExit):
        encoders.main()
    assert "rounds: must be at least 1, got 0" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(encoders.Case, "measure", lambda *arguments: [])
    with pytest.raises(SystemExit, match="encoders: nothing was measured"):
        encoders.main()
    assert not path.exists()


def test_encoders_are_shown_in_the_fastest_mode_that_can_be_compared(tmp_path):
    import encoders_summary
    import plot_encoders

    case = {"model": "sam_b", "title": "SAM ViT-B", "image_size": 1024, "batch": 1, "peak_gib": 1.0}

    def row(name, mode, ms=1.0, density=1.0):
        return {**case, "implementation": name, "mode": mode, "ms": ms, "density": density}

    def chosen(*rows):
        return [
            (row["implementation"], row["mode"])
            for found in encoders_summary.in_fastest_mode(rows).values()
            for row in found
        ]

    eager = [row("stock", "eager"), row("ours", "eager")]
    without_stock, without_time = [row("ours", "graphs")], [row("stock", "graphs", None), row("ours", "graphs")]
    for graphs in (without_stock, without_time, [row("stock", "graphs"), row("ours", "graphs", density=0.25)]):
        assert chosen(*graphs, *eager) == [("stock", "eager"), ("ours", "eager")]
        assert len(encoders_summary.summarize([*graphs, *eager])) == 1
        plot_encoders.draw([*graphs, *eager], "", tmp_path / "encoders.svg")
    assert chosen(*without_stock, row("stock", "eager")) == [("ours", "graphs")]
    assert chosen(row("stock", "another"), *eager) == [("stock", "eager"), ("ours", "eager")]
    assert chosen(row("stock", "another")) == [("stock", "another")]
    plot_encoders.draw([row("stock", "another"), row("ours", "another")], "", tmp_path / "encoders.svg")
    for rows in ([], without_stock, without_time):
        with pytest.raises(ValueError, match="plot_encoders: record must have rows as shipped"):
            plot_encoders.draw(rows, "", tmp_path / "encoders.svg")


def test_records_of_another_commit_are_not_added_to(tmp_path):
    import records

    path, keys = tmp_path / "encoders-cpu.json", ("model", "mode")
    old, new = {"model": "a", "mode": "eager", "ms": 1.0}, {"model": "a", "mode": "compiled", "ms": 2.0}
    assert records.merge(path, META, [old], keys) == (META, [old])
    records.write(path, META, [old])
    assert records.merge(path, META, [new], keys)[1] == [old, new]
    assert records.merge(path, META, [{**old, "ms": 3.0}], keys)[1] == [{**old, "ms": 3.0}]
    later = {**META, "date": "2026-01-03T00:00:00"}
    assert records.merge(path, later, [new], keys) == (later, [old, new])
    assert records.merge(path, {**META, "git": "other"}, [new], keys)[1] == [new]
