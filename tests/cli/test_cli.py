"""The shell around the commands, and the commands generate and info."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from drafts import draw_lengths

import dynskip.cli
from dynskip.cli import COMMANDS, main
from dynskip.cli.options import UserError, user_message
from dynskip.models.registry import ARCHITECTURES
from dynskip.version import __version__

WORDS = ["the", "cat", "sat", "on", "a", "mat"]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OPT model of 4 layers with a tokenizer of whole words and a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny-opt")
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "user:", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for message in messages %}{{ 'user: ' + message['content'] }}{% endfor %}",
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    OPTForCausalLM(config).save_pretrained(directory)
    return directory


def generate(model_directory: Path, *arguments: str) -> int:
    options = ["--dtype", "float32", "--backend", "torch", "--ignore-eos", "--max-tokens", "4"]
    return main(["generate", "--model", str(model_directory), *options, *arguments])


def expect_mistake(capsys: pytest.CaptureFixture[str], status: int, *parts: str) -> None:
    """The command has ended with status 2, nothing on stdout, and one line on stderr that holds ``parts``."""
    out, err = capsys.readouterr()
    assert status == 2, err
    assert out == ""
    assert err.startswith("dynskip")
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err, err


def json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_help_names_every_command_and_gives_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    for name in COMMANDS:
        assert f"\n    {name} " in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_gives_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"dynskip {name}" in capsys.readouterr().out.partition("examples:")[2]


def test_every_module_of_the_package_that_is_a_command_is_in_the_table() -> None:
    found = {
        path.stem
        for path in Path(dynskip.cli.__file__).parent.glob("*.py")
        if "\nEXAMPLES = " in path.read_text(encoding="utf-8")
    }
    assert found == set(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dynskip {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["command"]),
        (["fly"], ["'fly'", "generate"]),
        (["generate", "--colour", "red", "x"], ["--colour"]),
        (["generate", "--max-tok", "4", "x"], ["--max-tok"]),
        (["generate", "--max-tokens", "many", "x"], ["--max-tokens", "'many'"]),
        (["generate", "--dtype", "int8", "x"], ["--dtype", "int8", "bfloat16"]),
        (["info", "--all"], ["--all"]),
        (["generate", "--max-tokens", "0", "x"], ["max_tokens", "at least 1"]),
        (["generate", "--temperature", "-1", "x"], ["temperature"]),
        (["generate", "--top-p", "1.5", "x"], ["top_p"]),
        (["generate", "--top-k", "-2", "x"], ["top_k"]),
        (["generate", "--n", "0", "x"], ["n must", "1..1024"]),
        (["generate", "--n", "300000", "x"], ["n must", "1..1024", "300000"]),
        (["generate", "--stop", "x" * 5000, "x"], ["stop", "1024 characters"]),
        (["generate", "caf\udce9"], ["prompt 1", "lone surrogates"]),
        (["generate", "--stop", "", "x"], ["stop"]),
        (["generate", "--threads", "0", "x"], ["--threads", "at least 1"]),
        (["calibrate", "--threads", "-2"], ["--threads", "at least 1", "-2"]),
        (["generate", "--threads", "1000000", "x"], ["--threads", "at most", "CPUs", "1000000"]),
        (["generate", "--threads", "99999999999999999999", "x"], ["--threads", "at most", "CPUs"]),
        (["generate", "--device", "abacus", "x"], ["--device", "abacus", "cuda:N"]),
        (["generate", "--device", "meta", "x"], ["--device", "meta", "cuda:N"]),
        (["generate", "--device", "cuda:99", "x"], ["--device", "cuda:99", "CUDA devices"]),
        (["generate", "--path", "full", "--path", "full", "x"], ["--path", "got 2 for 1 prompts"]),
        (["generate", "--file", "no/such/file", "x"], ["--file", "both"]),
        (["generate", "--file", "no/such/file"], ["no/such/file"]),
        (["generate", "--model", "/no/such/folder", "x"], ["/no/such/folder"]),
    ],
)
def test_a_mistake_ends_with_status_2_and_one_line(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    expect_mistake(capsys, main(arguments), *parts)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("uniform:5", ["budget", "1..4"]),
        ("uniform", ["uniform:B"]),
        ("exit:0", ["budget", "1..4"]),
        ("random:2", ["random:B:SEED"]),
        ("layers:0,9", ["0..3", "9"]),
        ("layers:0,0", ["distinct"]),
        ("sideways:3", ["sideways:3", "full, uniform:B"]),
    ],
)
def test_a_bad_path_is_a_mistake(
    path: str, parts: list[str], model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expect_mistake(capsys, generate(model_directory, "--quiet", "--path", path, "the cat"), *parts)


def test_a_prompt_whose_numbers_are_not_finite(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(model_directory, broken)
    weights = load_file(broken / "model.safetensors")
    for name in weights:
        if name.endswith(("layers.1.fc2.bias", "layers.2.fc2.bias")):
            weights[name][0] = 0.9 * torch.finfo(torch.float32).max  # twice that is too much
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--quiet", "--path", "layers:0", "--path", "full", "--path", "layers:0,3", "the", "cat", "sat"]
    assert generate(broken, "--json", *arguments) == 1
    out, err = capsys.readouterr()
    first, failed, last = map(json.loads, out.splitlines())
    assert first["error"] is last["error"] is None
    assert len(first["outputs"][0]["token_ids"]) == len(last["outputs"][0]["token_ids"]) == 4
    assert failed["outputs"] == [{"text": "", "token_ids": [], "finish_reason": "error"}]
    assert "output of layer 2, in torch.float32" in failed["error"]
    assert err == f"dynskip generate: prompt 1: {failed['error']}\n"
    assert generate(broken, *arguments) == 1
    out, err = capsys.readouterr()
    assert "== the [" in out and "== sat [" in out and err == f"dynskip generate: prompt 1: {failed['error']}\n"


def test_too_many_tokens_is_a_mistake(model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect_mistake(capsys, generate(model_directory, "--max-tokens", "99", "the cat"), "99", "32")


@pytest.mark.parametrize(
    ("path", "layers"),
    [
        ("full", [0, 1, 2, 3]),
        ("uniform:2", [0, 2]),
        ("exit:3", [0, 1, 2]),
        ("layers:3,1", [1, 3]),
    ],
)
def test_generate_runs_along_the_path(
    path: str, layers: list[int], model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model_directory, "--json", "--path", path, "the cat") == 0
    (line,) = json_lines(capsys)
    assert (line["prompt"], line["num_layers"], line["layers"]) == ("the cat", 4, layers)
    assert [len(output["token_ids"]) for output in line["outputs"]] == [4]
    assert line["outputs"][0]["finish_reason"] == "length"


def test_generate_gives_each_prompt_its_own_path_and_the_text_it_has_alone(
    model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, paths = ["the cat", "a mat sat on", "on"], ["full", "uniform:2", "random:2:5"]
    options = [part for path in paths for part in ("--path", path)]
    assert generate(model_directory, "--json", "--deterministic", *options, *prompts) == 0
    together = json_lines(capsys)
    alone = []
    for prompt, path in zip(prompts, paths, strict=True):
        assert generate(model_directory, "--json", "--deterministic", "--path", path, prompt) == 0
        alone += json_lines(capsys)
    assert together == alone
    assert len({tuple(line["layers"]) for line in together}) == 3


@pytest.mark.filterwarnings("ignore:No costs were measured")
@pytest.mark.parametrize("entries", ["own", "path"])
def test_generate_with_a_draft_prints_what_it_prints_without(
    entries: str, model_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import dynskip.llm

    arguments = ["--json", "--deterministic", "--max-tokens", "16", "the cat", "a mat sat on"]
    assert generate(model_directory, *arguments) == 0
    expected = json_lines(capsys)
    assert [(line["draft"], line["num_drafted"]) for line in expected] == [(None, 0)] * 2
    draw_lengths(monkeypatch)
    run, drafts = dynskip.llm.LLM.generate, []

    def noted(*args: Any, **options: Any) -> Any:
        outputs = run(*args, **options)
        drafts.extend(output.draft for output in outputs)
        return outputs

    monkeypatch.setattr(dynskip.llm.LLM, "generate", noted)
    assert generate(model_directory, *arguments, "--draft", "uniform:2", "--draft-entries", entries) == 0
    lines = json_lines(capsys)
    assert [line["outputs"] for line in lines] == [line["outputs"] for line in expected]
    assert all(line["draft"] == [0, 2] and line["num_drafted"] >= line["num_accepted"] > 0 for line in lines)
    assert [draft.entries for draft in drafts] == [entries] * 2


def test_a_draft_may_be_a_path_that_was_found(model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model_directory, "--draft", "found:2", "the cat") == 2
    assert "model must have paths that a search has found, got none" in capsys.readouterr().err


def test_generate_prints_one_output_bare_and_several_under_headings(
    model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model_directory, "--json", "the cat") == 0
    text = json_lines(capsys)[0]["outputs"][0]["text"]
    assert generate(model_directory, "the cat") == 0
    assert capsys.readouterr().out == f"{text}\n"
    assert generate(model_directory, "--path", "uniform:2", "the cat", "a mat") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("==")] == [
        "== the cat [2/4 layers {0,2}]",
        "== a mat [2/4 layers {0,2}]",
    ]


def test_generate_samples_repeatably(model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--json", "--temperature", "2", "--top-p", "0.99", "--top-k", "8", "--n", "3", "the cat"]
    runs = []
    for seed in ("1", "1", "2"):
        assert generate(model_directory, "--seed", seed, *options) == 0
        runs.append(json_lines(capsys)[0]["outputs"])
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(output["token_ids"]) for output in runs[0]}) > 1


def test_options_that_change_logits(model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dynskip import LLM, SamplingParams

    llm = LLM(model_directory, dtype="float32", backend="torch")

    def expected(**params: Any) -> list[dict[str, Any]]:
        options = {"max_tokens": 12, "ignore_eos": True, "n": 8, "temperature": 3.0, "seed": 4, **params}
        (output,) = llm.generate(["the cat"], SamplingParams(**options))
        return [{"text": sample.text, "token_ids": sample.token_ids} for sample in output.samples]

    def found(*options: str) -> list[dict[str, Any]]:
        common = ("--max-tokens", "12", "--n", "8", "--temperature", "3", "--seed", "4", "--json")
        assert generate(model_directory, *common, *options, "the cat") == 0
        (line,) = json_lines(capsys)
        return [{name: sample[name] for name in ("text", "token_ids")} for sample in line["outputs"]]

    free = expected()
    assert found() == free
    for options, params in (
        (("--min-p", "0.9"), {"min_p": 0.9}),
        (("--repetition-penalty", "3.5"), {"repetition_penalty": 3.5}),
        (("--presence-penalty", "2"), {"presence_penalty": 2.0}),
        (("--frequency-penalty", "-2"), {"frequency_penalty": -2.0}),
        (("--min-tokens", "3"), {"min_tokens": 3}),
        (("--stop", "mat", "--include-stop"), {"stop": "mat", "include_stop_str_in_output": True}),
    ):
        assert found(*options) == expected(**params) != free, options


def test_generate_stops_before_a_text(model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model_directory, "--json", "the cat") == 0
    words = json_lines(capsys)[0]["outputs"][0]["text"].split()
    assert generate(model_directory, "--json", "--stop", words[1], "the cat") == 0
    output = json_lines(capsys)[0]["outputs"][0]
    assert output["finish_reason"] == "stop"
    assert words[1] not in output["text"]


def test_generate_puts_a_prompt_into_the_chat_template(
    model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model_directory, "--json", "--chat", "the cat") == 0
    assert generate(model_directory, "--json", "user: the cat") == 0
    chat, plain = json_lines(capsys)
    assert chat["outputs"] == plain["outputs"]
    assert (chat["prompt"], chat["num_prompt_tokens"]) == ("the cat", 3)


def test_generate_reads_a_file_and_stdin(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\n\n  \na mat\n", encoding="utf-8")
    for arguments in (["--file", str(file)], ["--file", "-"], []):
        monkeypatch.setattr(sys, "stdin", io.StringIO(file.read_text(encoding="utf-8")))
        assert generate(model_directory, "--json", *arguments) == 0
        assert [line["prompt"] for line in json_lines(capsys)] == ["the cat", "a mat"]


def test_only_line_ends_separate_prompts_and_marks_are_no_text(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffthe cat\r\na\u2028mat\rsat\x0con\n\ufeffa\x1cmat\x85\n".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes()), encoding="utf-8"))
    for arguments in (["--file", str(file)], []):
        assert generate(model_directory, "--json", *arguments) == 0
        lines = capsys.readouterr().out.split("\n")[:-1]
        prompts = [json.loads(line)["prompt"] for line in lines]
        assert prompts == ["the cat", "a\u2028mat", "sat\x0con", "a\x1cmat\x85"]


def test_generate_goes_on_for_as_many_tokens_as_fit(model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model_directory, "--json", "--max-tokens", "all", "the cat") == 0
    (line,) = json_lines(capsys)
    assert line["num_prompt_tokens"] + len(line["outputs"][0]["token_ids"]) == 32


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("as_json", [True, False])
def test_output_arrives_whatever_stdout_can_write(
    encoding: str, as_json: bool, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["the cat \u65e5", "caf\xe9 \U0001f600"]
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert generate(model_directory, *(["--json"] if as_json else []), *prompts) == 0
    text = written.getvalue().decode(encoding)
    if as_json:
        assert [json.loads(line)["prompt"] for line in text.split("\n")[:-1]] == prompts
        assert ("\\u65e5" in text) == (encoding != "utf-8")
    else:
        escaped = [prompt.encode(encoding, "backslashreplace").decode(encoding) for prompt in prompts]
        assert all(f"== {prompt} [" in text for prompt in escaped)


def test_stdin_of_a_locale_that_says_nothing_is_utf8(
    model_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for content, is_text in (("the \u65e5".encode(), True), (b"the \xff", False)):
        stdin = io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", stdin)
        status = generate(model_directory, "--json")
        if is_text:
            assert json_lines(capsys)[0]["prompt"] == "the \u65e5"
        else:
            expect_mistake(capsys, status, "UTF-8", "0xff", "stdin")


def test_stdin_that_is_closed_is_a_mistake(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    for arguments in ([], ["--file", "-"]):
        expect_mistake(capsys, main(["generate", *arguments]), "stdin must be open", "got none", "argument")


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["info"], ["simulate"], ["generate", "x"], ["fly"]])
def test_stdout_that_is_closed_is_a_mistake(command: list[str]) -> None:
    ended = subprocess.run(
        ["sh", "-c", 'exec "$0" -m dynskip "$@" >&-', sys.executable, *command], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "dynskip: error: stdout must be open, got none. Redirect it to a file or to /dev/null\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's own")
def test_stdout_that_is_full_or_broken_ends_a_command_in_one_line_or_none() -> None:
    command = [sys.executable, "-m", "dynskip", "simulate", "--requests", "4"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("dynskip simulate: error: ")
    assert ended.stderr.count("\n") == 1
    for arguments in (command, [sys.executable, "-m", "dynskip", "--help"]):
        reader, writer = os.pipe()
        os.close(reader)
        broken = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        assert (broken.returncode, broken.stderr) == (0, b"")


def test_without_stderr_errors_do_not_go_to_stdout() -> None:
    ended = subprocess.run(
        ["sh", "-c", 'exec "$0" -m dynskip fly 2>&-', sys.executable], stdout=subprocess.PIPE, text=True
    )
    assert (ended.returncode, ended.stdout) == (2, "")


def test_generate_without_a_prompt_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n\n", encoding="utf-8")
    binary.write_bytes(b"the \xff cat")
    expect_mistake(capsys, main(["generate", "--file", str(empty)]), "empty.txt", "at least one prompt")
    expect_mistake(capsys, main(["generate", "--file", str(binary)]), "UTF-8", "0xff", "binary.txt")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    expect_mistake(capsys, main(["generate"]), "stdin", "at least one prompt")
    terminal = io.StringIO("")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    expect_mistake(capsys, main(["generate"]), "a prompt must be given")


def test_info_tells_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from dynskip.ops.backends import available_backends

    assert main(["info"]) == 0
    table = dict(line.split("  ", maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert table["torch"].strip() == torch.__version__
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dynskip"]["version"] == __version__
    assert report["backends"]["cpu"] == available_backends("cpu")
    assert report["cpu"]["num_threads"] == torch.get_num_threads()


def test_info_describes_the_shipped_model(
    model_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import OPTForCausalLM

    monkeypatch.setattr("dynskip.assets.opt_mini_directory", lambda: model_directory)
    assert main(["info", "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["opt-mini"]
    assert (model["num_layers"], model["hidden_size"], model["num_heads"]) == (4, 32, 2)
    # The tied head is stored once, and parameters() yields it once.
    parameters = OPTForCausalLM.from_pretrained(model_directory).parameters()
    assert model["num_parameters"] == sum(parameter.numel() for parameter in parameters)
    assert model["kv_bytes_per_token_and_layer"] == 2 * 32 * 2
    assert main(["info"]) == 0
    assert "4 layers, hidden 32, 2 heads" in capsys.readouterr().out


def test_info_without_the_shipped_model_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Path:
        raise FileNotFoundError("opt_mini_directory: the model must be there, got none.")

    monkeypatch.setattr("dynskip.assets.opt_mini_directory", missing)
    assert main(["info"]) == 0
    assert "opt-mini" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert "got none" in json.loads(capsys.readouterr().out)["opt-mini"]["missing"]


def run_broken(error: BaseException, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    def run(_: argparse.Namespace) -> int:
        raise error

    texts = dict.fromkeys(("HELP", "DESCRIPTION", "EXAMPLES"), "")
    module = SimpleNamespace(**texts, add_options=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "dynskip.cli.broken", module)  # type: ignore[arg-type]
    monkeypatch.setattr(dynskip.cli, "COMMANDS", ("broken",))
    return main([*options, "broken"])


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ValueError("too many values to unpack"), KeyError("path"), AssertionError("x: y must z, got w")):
        with pytest.raises(type(error)):
            run_broken(error, monkeypatch)


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError("generate: n must be 1,\n got 2.")
    assert run_broken(error, monkeypatch) == 2
    assert capsys.readouterr().err == "dynskip broken: error: generate: n must be 1, got 2.\n"
    assert run_broken(error, monkeypatch, "--traceback") == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_broken(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err == "\ndynskip broken: interrupted\n"


@dataclasses.dataclass(frozen=True)
class Case:
    error: BaseException
    message: str | None


@pytest.mark.parametrize(
    "case",
    [
        Case(UserError("anything"), "anything"),
        Case(FileNotFoundError(2, "No such file or directory", "x"), "[Errno 2] No such file or directory: 'x'"),
        Case(ValueError("LayerPath.of: layers must be distinct, got 3 twice."), None),
        Case(MemoryError("KVCache: the cache needs 9 MiB for 5 entries, got 3 MiB free on cpu."), None),
        Case(RuntimeError("resolve_backend: name must be a backend that runs on cpu, got 'triton'."), None),
        Case(MemoryError(), "bug"),
        Case(ValueError("invalid literal for int() with base 10: 'x'"), "bug"),
        Case(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "bug"),
        Case(IndexError("f: x must y, got z."), "bug"),
    ],
    ids=lambda case: f"{type(case.error).__name__}-{case.error}",
)
def test_who_has_to_mend_an_error(case: Case) -> None:
    expected = {None: str(case.error), "bug": None}.get(case.message, case.message)
    assert user_message(case.error) == expected


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_info_and_generate_know_other_architectures(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from evaluation_models import save_checkpoint
    from families import family_config

    config = family_config(family)
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", num_heads)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    save_checkpoint(tmp_path, family=family)
    assert main(["info", "--json", "--model", str(tmp_path)]) == 0
    loaded = json.loads(capsys.readouterr().out)["model"]
    assert (loaded["architecture"], loaded["num_layers"], loaded["num_kv_heads"]) == (family, 6, num_kv_heads)
    assert loaded["kv_bytes_per_token_and_layer"] == 2 * num_kv_heads * head_size * 2
    assert main(["info", "--model", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{family}, 6 layers, hidden 32, {num_heads} heads" in out
    assert ("4 heads sharing 2 of keys and values" in out) == (num_kv_heads < num_heads)
    assert generate(tmp_path, "--json", "--path", "uniform:3", "w007 w009") == 0
    (line,) = json_lines(capsys)
    assert (line["num_layers"], line["num_prompt_tokens"]) == (6, 2)
    assert len(line["outputs"][0]["token_ids"]) == 4


def test_info_loads_a_model_and_tells_its_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=512,
        hidden_size=64,
        ffn_dim=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    assert main(["info", "--json", "--model", str(tmp_path), "--dtype", "float32"]) == 0
    loaded = json.loads(capsys.readouterr().out)["model"]
    # Four square projections and two of the feed-forward a layer, and the packed copy of the tied head.
    matrices = 3 * (4 * 64 * 64 + 2 * 64 * 256) + 512 * 64
    assert loaded["matrices_mb"] == pytest.approx(matrices * 4 / 1e6, abs=0.06)
    assert loaded["peak_mb"] >= loaded["resting_mb"] - 1
    assert main(["info", "--model", str(tmp_path)]) == 0
    assert "at its peak by" in capsys.readouterr().out
    assert main(["info", "--model", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
