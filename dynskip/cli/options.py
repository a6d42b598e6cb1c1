"""Options that several commands share, what they mean, and which exceptions are mistakes in them.

Those end a command with status 2 and one line, others with a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynskip.arguments import is_own_error
from dynskip.assets import NAMES

if TYPE_CHECKING:
    import torch

    from dynskip.llm import LLM

DTYPES = ("bfloat16", "float16", "float32")
BACKENDS = ("auto", "torch", "triton", "native")


class UserError(Exception):
    """A mistake in what the user asked of the command line; its text is the whole message."""


def user_message(error: BaseException) -> str | None:
    """One line for the user if ``error`` is theirs to mend, else None.

    Theirs are UserError, every OSError (a file, a folder, a network that is not there) and what dynskip's checks raise.
    """
    if not (is_own_error(error) or isinstance(error, UserError | OSError)):
        return None
    return " ".join(str(error).split()) or type(error).__name__


def in_range(least: float, most: float) -> Callable[[str], Any]:
    """The ``type`` of an option that is a number in ``least..most``, whole where ``least`` is an int."""
    kind = int if isinstance(least, int) else float

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:  # NaN lies nowhere
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} in {least}..{most}, got {text[:40]!r}")
        return value

    return parse


class LazyChoices:
    """The ``choices`` of an option that are looked up where one is given: `dynskip --help` does not import torch."""

    def __init__(self, find: Callable[[], Sequence[str]]) -> None:
        self._find = find

    def __iter__(self) -> Iterator[str]:
        return iter(self._find())


def add_number(
    parser: Any, option: str, metavar: str, least: float, most: float, default: float | None, text: str
) -> None:
    """Add an option that is a number in ``least..most``; its help ends with the default, where there is one."""
    shown = text if default is None else f"{text} (default: {default})"
    parser.add_argument(option, type=in_range(least, most), default=default, metavar=metavar, help=shown)


def add_model_options(
    parser: argparse.ArgumentParser, model_default: str = "opt-mini", positional: bool = False
) -> None:
    """Add what chooses a model and how it runs.

    --model, --adapter, --dtype, --device, --backend, --deterministic, --threads.

    model_default: what runs without --model, for its help. positional: MODEL, which must be given, in its place.
    """
    group = parser.add_argument_group("model")
    if positional:
        group.add_argument("model", metavar="MODEL", help="folder, GGUF file, hub id, or a model by name")
    else:
        group.add_argument(
            "--model",
            metavar="NAME",
            help=f"folder, GGUF file, hub id, or one of {', '.join(NAMES)} (default: {model_default})",
        )
    add_adapter_option(group)
    group.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: bfloat16)")
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cpu)")
    group.add_argument("--backend", choices=BACKENDS, help="who gathers, scatters and attends (default: auto)")
    group.add_argument("--deterministic", action="store_true", help="no bit of a row depends on its neighbours; slower")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")


def add_adapter_option(parser: Any) -> None:
    """Add --adapter, beside the option that chooses the model."""
    parser.add_argument("--adapter", metavar="FOLDER", help="LoRA adapter in peft's format, merged into the weights")


def load_llm(args: argparse.Namespace) -> LLM:
    """The model that the options of ``add_model_options`` choose."""
    from dynskip.llm import LLM

    return LLM(
        args.model,
        dtype=torch_dtype(args.dtype),
        device=torch_device(args.device),
        backend=args.backend,
        deterministic=args.deterministic or None,
        adapter=args.adapter,
    )


def file_path(text: str) -> Path:
    """The path that an option names; ``~`` is the home directory, which a shell leaves alone in ``--out=~/runs``."""
    return Path(os.path.expanduser(text))


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a name in ``DTYPES``; None for None."""
    import torch

    if name is None:
        return None
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), "DTYPES lists names of torch dtypes"
    return dtype


def torch_device(name: str | None) -> torch.device | None:
    """The device of that name, which is there; None for None."""
    import torch

    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device must be there, got {name!r} where torch finds {torch.cuda.device_count()} CUDA devices"
        )
    return device


def set_threads(num_threads: int | None) -> None:
    """Let torch use ``num_threads`` CPU threads; None leaves its choice."""
    if num_threads is None:
        return
    if num_threads < 1:
        raise UserError(f"--threads must be at least 1, got {num_threads}")
    import torch

    from dynskip.execution.threads import most_threads

    if num_threads > most_threads():
        raise UserError(f"--threads must be at most {most_threads()} on {os.cpu_count()} CPUs, got {num_threads}")
    torch.set_num_threads(num_threads)


def check_readable(path: Path, option: str) -> None:
    """Raise UserError where ``option`` names no file at ``path``: before a model is loaded for it."""
    if not path.is_file():
        raise UserError(f"{option} must name a file, got {str(path)!r}. Check the path.")


def check_writable(path: Path, remedy: str) -> None:
    """Raise UserError, which ends with ``remedy``, where the file at ``path`` cannot be written; make its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} must be a file that can be written, got: {error.strerror}. {remedy}") from error


def show_progress(quiet: bool) -> bool:
    """Whether to draw progress bars: on a terminal, unless told to be ``quiet``. transformers' own obey as well."""
    shown = not quiet and sys.stderr.isatty()
    if not shown:
        from transformers.utils import logging

        logging.disable_progress_bar()
    return shown
