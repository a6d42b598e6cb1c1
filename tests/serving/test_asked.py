"""What the front before replicas reads of a request: its path, its outputs, and how its prompt begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from api import NAME, TABLE, local, run, tiny_llm
from models import NUM_LAYERS

from dynskip import LLM, LayerPath
from dynskip.serving.replicas.asked import Asked


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


def test_one_name_of_a_path_is_as_good_as_another(llm: LLM, tmp_path: Path) -> None:
    async def main() -> None:
        async with local(llm, table=TABLE, folder=tmp_path, path="uniform:2") as server:
            table = server.service.table.without_model()
            uniform, listed = LayerPath.uniform(NUM_LAYERS, 2), LayerPath.of(NUM_LAYERS, [0, 1, 3, 5])

            def asked(**fields: Any) -> Asked:
                return Asked.of(json.dumps({"prompt": "w005", **fields}).encode(), table)

            for fields in ({}, {"path": "uniform:2"}, {"depth": 2}, {"depth": "30%"}, {"model": f"{NAME}@1"}):
                assert asked(**fields).path == uniform
            assert asked(depth=3).path == asked(path="layers:5,3,1,0").path == listed
            for wrong in (
                {"depth": 3, "path": "full"},
                {"path": 7},
                {"depth": True},
                {"model": "nobody"},
                {"depth": 1.5},
            ):
                assert asked(**wrong).path == uniform, "the replica says what is wrong"
            assert (asked(n=3).num_outputs, asked(n=3, prompt=["w005", "w006"]).num_outputs) == (3, 6)
            assert (asked(n=-1).num_outputs, asked(n="3").num_outputs, asked(prompt=[5, 6]).num_outputs) == (1, 1, 1)
            for body in (b"", b"{", b"[1]", b"[" * 10**5, b'"text"', b"\xff"):
                assert Asked.of(body, table) == Asked.of(b"{}", table)

    run(main())


def test_prompts_that_begin_alike_have_one_prefix(llm: LLM) -> None:
    async def main() -> None:
        async with local(llm) as server:
            table = server.service.table.without_model()

            def prefix(**fields: Any) -> str:
                return Asked.of(json.dumps(fields).encode(), table).prefix

            system, first = {"role": "system", "content": "s"}, {"role": "user", "content": "a"}
            turns = [system, first, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
            assert prefix(messages=turns) == prefix(messages=turns[:2]), "a conversation that goes on"
            assert prefix(messages=turns) != prefix(messages=[system, {"role": "user", "content": "other"}])
            assert prefix(messages=turns) != prefix(messages=turns[1:])
            assert prefix(prompt="x" * 300 + "a") == prefix(prompt="x" * 300 + "b") != prefix(prompt="y" * 300)
            assert prefix(prompt=[5] * 70 + [1]) == prefix(prompt=[5] * 70 + [2]) != prefix(prompt=[6] * 70)
            assert prefix(prompt=["x", "y"]) == prefix(prompt="x")

    run(main())
