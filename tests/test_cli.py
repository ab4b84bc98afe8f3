"""The commands: what they print and write, what they refuse, and what importing the library must not load."""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from koopman_hpo import History, cli

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, output) of a quick demo."""
    out = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "koopman_hpo.cli", "demo", "--quick", "--steps", "100", "--lr", "1e-3", "--out", str(out)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stderr == ""
    return out, done.stdout


def test_demo_prints_a_table_and_the_gain(demo):
    _, said = demo
    for word in ("fixed", "local", "glocal", "3 random", "test loss", "accuracy", "plain steps", "times the cost"):
        assert word in said, said
    assert max(len(line) for line in said.splitlines()[:10]) <= 80


def test_demo_writes_figure_and_history(demo):
    folder, _ = demo
    assert (folder / "demo.png").stat().st_size > 50_000
    history = History.load(folder / "history.npz")
    assert history.labels == ("lr", "momentum", "l2")
    assert history.step[-1] == 100


def test_demo_is_determined_by_its_seed(demo, tmp_path):
    from koopman_hpo import demo as module

    first = History.load(demo[0] / "history.npz")
    module.main(module.Setting(0, 100, 1e-3, 0), tmp_path)
    np.testing.assert_array_equal(History.load(tmp_path / "history.npz").phi, first.phi)


def test_demo_survives_divergence(tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--steps", "60", "--random", "1", "--lr", "1e4", "--out", str(tmp_path)]) == 0
    assert "glocal" in capsys.readouterr().out


@pytest.mark.parametrize("lr", ["0", "-1", "nan"])
def test_demo_refuses_an_impossible_rate(lr, tmp_path, capsys):
    assert cli.main(["demo", "--lr", lr, "--out", str(tmp_path / "new")]) == 2
    assert "log: needs finite" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo", "--steps", "0"], "argument --steps: must be a whole number of at least 1, got 0"),
        (["demo", "--steps", "1e3"], "argument --steps: must be a whole number, got '1e3'"),
        (["demo", "--steps", str(2**63)], "argument --steps: must be a whole number"),
        (["demo", "--random", "-1"], "argument --random: must be a whole number of at least 0, got -1"),
        (["demo", "--seed", "-1"], "argument --seed: must be a whole number of at least 0, got -1"),
        (["demo", "--seed", "1.5"], "argument --seed: must be a whole number, got '1.5'"),
        (["demo", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["demo", "--out", ""], "argument --out: must be a path, got an empty one"),
        (["report", ""], "argument history: must be a path, got an empty one"),
        (["report", "a\0b"], "argument history: must be a path"),
        (["report"], "required: history"),
        (["reprot"], "invalid choice: 'reprot'"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_demo_refuses_a_folder_that_is_a_file(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert cli.main(["demo", "--out", str(file)]) == 2
    assert capsys.readouterr().err == f"koopman-hpo demo: {file} is a file; name a folder with --out\n"


def test_demo_refuses_a_folder_that_it_cannot_write(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "not writable" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    whole = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "rich" else whole(name, *a))
    assert cli.main(["demo"]) == 2
    said = capsys.readouterr().err
    assert 'rich not installed. Install what it needs with: pip install "koopman-hpo[demo]"' in said
    assert said.count("\n") == 1


def test_report_draws_a_saved_history(demo, tmp_path, capsys):
    out = tmp_path / "report.png"
    file = str(demo[0] / "history.npz")
    assert cli.main(["report", file, "--out", str(out)]) == 0
    assert out.stat().st_size > 50_000
    said = capsys.readouterr().out
    assert "0.001" in said


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("figure.xyz", "must end in one of"),
        ("figure", "must end in one of"),
        (".", "is a directory"),
        ("nowhere/figure.png", "which does not exist"),
        ("history.npz", "would overwrite the history"),
        ("same.png", "would overwrite the history"),
    ],
)
def test_report_refuses_a_figure_that_cannot_be_written_and_writes_nothing(out, says, demo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path(shutil.copy(demo[0] / "history.npz", "history.npz"))
    Path("same.png").symlink_to(file)
    before = file.read_bytes()
    assert cli.main(["report", str(file), "--out", out]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("koopman-hpo report: the figure ")
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert file.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["history.npz", "same.png"]


def test_report_does_not_overwrite_a_history_named_like_a_figure(demo, tmp_path, capsys):
    file = Path(shutil.copy(demo[0] / "history.npz", tmp_path / "history.png"))
    before = file.read_bytes()
    assert cli.main(["report", str(file)]) == 2
    assert "would overwrite the history" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_report_of_a_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "."]) == 2
    assert "Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"no archive", b""])
def test_report_refuses_a_wrong_file_in_one_line(content, tmp_path, capsys):
    file = tmp_path / "wrong.npz"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["report", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("koopman-hpo report: history.load:")
    assert str(file) in said


def test_report_refuses_an_empty_history(tmp_path, capsys):
    file = History(("lr",)).save(tmp_path / "empty.npz")
    assert cli.main(["report", str(file)]) == 2
    assert "without a window" in capsys.readouterr().err


def test_doctor_finds_this_machine_usable(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in ("numpy", "numba", "scipy", "CUDA", "extra demo", "adapter torch", "self-check         ok"):
        assert word in said, said
    if importlib.util.find_spec("koopman_hpo_adapters.torch") is None:
        assert "not part of this release" in said


def test_importing_the_library_loads_no_extra():
    heavy = ("matplotlib", "rich", "sklearn", "tqdm", "torch", "jax", "autograd", "pandas")
    modules = "koopman_hpo, koopman_hpo.cli, koopman_hpo_adapters.numpy"
    code = f"import {modules}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_regression_example_says_what_was_gained(tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "numpy_regression.py"))
    example["main"](["--out", str(tmp_path / "run.png")])
    said = capsys.readouterr().out
    assert "gained by glocal: +" in said
    assert (tmp_path / "run.png").stat().st_size > 50_000
