"""What the documentation shows is true: links resolve, configurations parse, commands exist, code runs."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipeline.records import FinishReason

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), ROOT / "infra/README.md"])
SITE_ONLY = ROOT / "docs"  # its pages are built as a site, which has nothing else of the repository

FENCE = re.compile(r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)
CODE = re.compile(r"`([^`\n]+)`")
FILE_NAME = re.compile(r"(?:pipeline|cage|jobs|tests|configs|infra|docs|examples)/[\w./-]*")
COMMAND = re.compile(r"cage [a-z].*")

FRAGMENT = "fragment"  # the mark of a configuration that is an addition to the job of README.md
NOT_RUN = "not run: "  # the mark of code that needs what a test does not have, and what that is
MODEL_NAMES = ('"HuggingFaceTB/SmolLM2-135M-Instruct"', '"smollm2-135m"')  # a tiny model stands in for these


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
PAGES_OF_TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]  # it also names what was


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, the comment before it ("" where there is none), its text and its line."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks_of(page: Path, language: str) -> list[Block]:
    text = text_of(page)
    found = [
        Block(
            page, text.count("\n", 0, each.start("language")) + 1, each["language"], each["mark"] or "", each["text"]
        )
        for each in FENCE.finditer(text)
    ]
    return [block for block in found if block.language == language]


def all_blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page, language)]


def prose_of(page: Path) -> str:
    return FENCE.sub("", text_of(page))


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    plain = [CODE.sub(r"\1", heading).lower() for heading in HEADING.findall(prose_of(page))]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def named(blocks: list[Block]) -> Any:
    return pytest.mark.parametrize("block", blocks, ids=lambda block: block.name)


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in (one or other for one, other in LINK.findall(prose_of(page))):
        if "://" in target or target.startswith("mailto:"):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), f"{target} is not there"
        if page.parent == SITE_ONLY:
            assert file.is_relative_to(SITE_ONLY), f"{target} is not part of the site"
        if anchor:
            assert anchor in anchors_of(file), f"{target}: {sorted(anchors_of(file))}"


@pytest.mark.parametrize("page", PAGES_OF_TODAY, ids=name_of)
def test_every_file_that_is_named_exists(page: Path) -> None:
    for name in CODE.findall(prose_of(page)):
        if FILE_NAME.fullmatch(name):
            assert (ROOT / name).exists(), f"{name} is not there"


def test_the_map_has_every_folder() -> None:
    on_the_map = {name for name in CODE.findall(text_of(ROOT / "docs/architecture.md")) if FILE_NAME.fullmatch(name)}
    folders = {f"{file.parent.relative_to(ROOT)}/" for file in (ROOT / "pipeline").glob("*/__init__.py")}
    folders |= {f"{file.parent.relative_to(ROOT)}/" for file in (ROOT / "jobs").glob("*/__init__.py")}
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "pipeline").glob("*.py") if file.stem != "__init__"}
    assert folders | files <= on_the_map


def first_job() -> dict[str, Any]:
    """The configuration that README.md shows: what fragments are added to."""
    [block] = blocks_of(ROOT / "README.md", "yaml")
    tree: dict[str, Any] = yaml.safe_load(block.text)
    return tree


def added(tree: dict[str, Any], fragment: dict[str, Any]) -> dict[str, Any]:
    """A configuration with a fragment's keys; its principals take the place of the others."""
    whole = copy.deepcopy(tree)
    for key, value in fragment.items():
        whole[key] = {**whole.get(key, {}), **value} if key != "principals" else value
    return whole


@named(all_blocks("yaml"))
def test_every_configuration_parses(block: Block, tmp_path: Path) -> None:
    from jobs.commands.job_files import load_job

    tree = yaml.safe_load(block.text)
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(added(first_job(), tree) if block.mark == FRAGMENT else tree), encoding="utf-8")
    load_job(file)


def commands_of(page: Path) -> Iterator[list[str]]:
    """The words of every `cage` command in a page's blocks and prose."""
    for block in blocks_of(page, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            yield shlex.split(line.removeprefix(".venv/bin/"), comments=True)
    for code in CODE.findall(prose_of(page)):
        if COMMAND.fullmatch(code):
            yield shlex.split(code)


@every_page
def test_every_command_exists(page: Path) -> None:
    from jobs.cli import app

    targets = set(re.findall(r"^(\w+):", text_of(ROOT / "Makefile"), re.M))
    for program, *words in filter(None, commands_of(page)):
        if program == "make":
            assert set(words) <= targets
        if program == "cage":
            check_command(typer.main.get_command(app), words)


def check_command(command: Any, words: list[str]) -> None:
    """A command of this name takes these options; arguments may be left out where prose only names it."""
    while words and hasattr(command, "commands"):
        name, *words = words
        assert name in command.commands, f"no command {name}"
        command = command.commands[name]
    if words:
        command.make_context(command.name, words)


def runnable_blocks() -> list[Block]:
    return [block for block in all_blocks("python") if not block.mark.startswith(NOT_RUN)]


@pytest.mark.slow
@named(runnable_blocks())
def test_every_python_block_runs(block: Block, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": f"row{at}", "prompt": text} for at, text in enumerate(["why?", "how?"])]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code = block.text
    for name in MODEL_NAMES:
        code = code.replace(name, repr(str(tiny("llama", seed=3))))
    exec(compile(code, block.name, "exec"), {"__name__": "__main__"})


def test_the_equilibrium_in_ten_lines_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    [block] = [block for block in blocks_of(ROOT / "docs/python.md", "python") if "cage.solve" in block.text]
    exec(compile(block.text, block.name, "exec"), {})
    printed = [
        [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-\d+)?", line)]
        for line in capsys.readouterr().out.splitlines()
    ]
    claimed = [re.findall(r"# (.*?):", line)[0] for line in block.text.splitlines() if line.startswith("print")]
    assert len(printed) == len(claimed) == 4
    for numbers, claim in zip(printed, claimed, strict=True):
        expected = [float(number) for number in claim.split(",")]
        assert numbers == pytest.approx(expected * (len(numbers) // len(expected)), abs=6e-3)


def row_from(shown: str) -> dict[str, Any]:
    """The row of a run whose numbers are those that a page shows."""

    def found(pattern: str) -> list[Any]:
        return re.findall(pattern, shown, re.M)

    [(row_id, sample, prompt, reason, num_tokens, response)] = found(
        r"^row (.+), sample (\d+)\nuser:\n  (.*)\nanswer \(([\w ]+), (\d+) tokens\):\n  (.*)$"
    )
    [(kl, mass, residual, unsolved)] = found(r"base ([\d.]+) nats .* cover ([\d.]+) of .* residual (\S+), (\d+)")
    principals = found(r"^(\w+) +([\d.]+) +([\d.]+) +([\d.]+)$")
    names = [name for name, *_ in principals]
    return {
        "row_id": row_id,
        "sample": int(sample),
        "error": None,
        "prompt": [{"role": "user", "content": prompt}],
        "finish_reason": next(each for each in FinishReason if each.words == reason),
        "num_tokens": int(num_tokens),
        "response": response,
        "weights": {name: float(weight) for name, weight, _, _ in principals},
        "rewards": {name: float(reward) for name, _, reward, _ in principals},
        "payments": {name: float(paid) for name, _, _, paid in principals},
        "kl_per_token": float(kl),
        "covered_mass": float(mass),
        "max_residual": float(residual),
        "num_unsolved": int(unsolved),
        "tokens": [
            {
                "text": text,
                "base_logprob": float(base),
                "logprob": float(final),
                "payments": dict(zip(names, map(float, paid.split()), strict=True)),
            }
            for text, base, final, paid in found(r"^'(.*?)' +(-[\d.]+) +(-[\d.]+) +(.*)$")
        ],
    }


def test_the_row_is_shown_as_cage_inspect_prints_it() -> None:
    from jobs.commands.inspect import describe_row

    [block] = blocks_of(ROOT / "README.md", "text")
    assert describe_row(row_from(block.text)) + "\n" == block.text


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    nav = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(nav) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
