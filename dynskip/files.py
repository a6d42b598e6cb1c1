"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OTHER_CACHE = "Set DYNSKIP_CACHE to a folder of your own"


def cache_folder() -> Path:
    """``$DYNSKIP_CACHE``, or ``dynskip`` in the user's folder for caches; ValueError for a user without a home."""
    chosen, caches = os.environ.get("DYNSKIP_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return (Path(caches) if caches else Path.home() / ".cache") / "dynskip"
    except RuntimeError as error:  # there is neither $HOME nor an entry of this user in the password database
        raise ValueError(f"cache_folder: the user must have a home, got none. {OTHER_CACHE}.") from error


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Write ``text`` so that a kill leaves the old file or the new one, and a reader finds one of them.

    sync: the text is on the disk before the file has its name.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(3)}.partial")  # hosts may share folders
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as `write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def whole_folder(directory: Path) -> Iterator[Path]:
    """A path to write a folder to, which takes the place of ``directory`` once the context ends without an error."""
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
