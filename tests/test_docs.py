"""The prose is true: its Python runs, its commands and links exist."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from koopman_hpo import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "adapters" / "README.md", *(ROOT / "docs").glob("*.md")])
named = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@named
@pytest.mark.filterwarnings("ignore::koopman_hpo.DivergenceWarning")
def test_python_blocks_run_in_order(page):
    names = {"__name__": page.stem}
    for i, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {i}", "exec"), names)


@named
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    for line in lines:
        words = line.split("#")[0].split()
        if words[:1] == ["make"] and len(words) > 1:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif words[:1] == ["koopman-hpo"] and len(words) > 1:
            cli._parser().parse_args(shlex.split(line.split("#")[0])[1:] + (["x"] if words[1:] == ["report"] else []))
        elif words[:1] in (["python"], ["python3"]):
            assert (ROOT / words[1]).is_file(), line
        elif words[:2] == ["pip", "install"]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(re.findall(r"\[(\w+)\]", line)) <= set(extras), line


@named
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).is_file(), target


def test_readme_shows_every_optimizer():
    from koopman_hpo import inner

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("sgd", "adam", "adamw", "rmsprop", "adagrad", "lion"):
        assert callable(getattr(inner, name))
        assert f"`inner.{name}`" in text
