"""The README's examples, run as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

# Nobody has calibrated the machine that tests run on.
pytestmark = pytest.mark.filterwarnings("ignore::dynskip.engine.default_costs.UnmeasuredCostsWarning")

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8"), re.DOTALL
)


def test_the_first_example_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS[0].splitlines()) <= 10
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "24/24 layers {0-23}",
        "8/24 layers {0,3,6,9,12,15,18,21}",
        "4/24 layers {0,6,12,18}",
    ]
    assert all(line.endswith(("(stop)", "(length)")) for line in lines)


def test_the_serving_examples_serve(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    engine, front = (block for block in BLOCKS if "Engine(" in block or "AsyncLLM(" in block)
    assert len([line for line in engine.splitlines() if line]) <= 10
    exec(compile(engine, "README.md", "exec"), names)
    *lines, stats = capsys.readouterr().out.splitlines()
    assert sorted(line.split(" layers ")[0] for line in lines) == [
        "0, 4/24", "1, 4/24", "2, 8/24", "3, 4/24", "4, 24/24", "5, 4/24",
    ]  # fmt: skip
    assert all(line.endswith(("(stop)", "(length)")) for line in lines)
    assert stats.startswith("6 done, 0 running, 0 waiting | ")
    exec(compile(front, "README.md", "exec"), names)
    assert len(capsys.readouterr().out) > 20


def test_the_other_examples_run_and_their_controllers_are_controllers() -> None:
    from dynskip import LLM, SamplingParams

    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 3, 4096)  # type: ignore[attr-defined]
    llm = LLM()
    prompts = [llm.chat_prompt("Say hello."), llm.chat_prompt("Why does bread rise, and why does it fall? " * 3)]
    params = SamplingParams(max_tokens=2)
    shallow, deep = llm.generate(prompts, params, paths=names["ShortPromptsGoShallow"]())  # type: ignore[operator]
    assert shallow.path is not None and shallow.path.budget == 8
    assert deep.path is not None and deep.path.budget == 24
    for output in llm.generate(prompts, params, paths=names["SkipSmallStates"]()):  # type: ignore[operator]
        assert output.path is None and output.token_ids
