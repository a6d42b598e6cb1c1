"""Files shipped with the package."""

from __future__ import annotations

import os
from pathlib import Path

OPT_MINI = "opt-mini"


def opt_mini_directory() -> Path:
    """The directory of opt-mini, the small OPT model that speaks at several depths.

    Raises FileNotFoundError where the installation lacks it.
    """
    directory = Path(__file__).parent / OPT_MINI
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"opt_mini_directory: {directory} must hold the model, got no config.json. Reinstall dynskip."
        )
    return directory


def find_model(name: str | Path) -> str | Path:
    """Where the model of that name is: of ``"opt-mini"`` the folder shipped with the package, else ``name`` itself.

    A folder of the caller's that is called opt-mini comes first. ``~`` at the beginning is the home directory.
    """
    if name == OPT_MINI and not Path(name).is_dir():
        return opt_mini_directory()
    return type(name)(os.path.expanduser(name))
