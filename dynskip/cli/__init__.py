"""The command line: ``dynskip`` and ``python -m dynskip``."""
