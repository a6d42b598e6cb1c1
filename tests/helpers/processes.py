"""Processes that others start."""

from __future__ import annotations

import psutil


def command_of(process: psutil.Process) -> str:
    """Its command line, or nothing of one that has ended since it was listed."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
