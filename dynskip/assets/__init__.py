"""Files shipped with the package."""

from __future__ import annotations

from pathlib import Path


def opt_mini_directory() -> Path:
    """The directory of opt-mini, the small OPT model that speaks at several depths.

    Raises FileNotFoundError where the installation lacks it.
    """
    directory = Path(__file__).parent / "opt-mini"
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"opt_mini_directory: {directory} must hold the model, got no config.json. Reinstall dynskip."
        )
    return directory
