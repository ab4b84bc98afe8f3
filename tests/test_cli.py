"""The commands: what they print and write, what they refuse, and what importing the library must not load."""

import importlib.util
import runpy
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


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--random", "-1"], ["--steps", "x"]])
def test_demo_refuses_impossible_counts(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", *arguments])
    assert "argument" in capsys.readouterr().err


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
