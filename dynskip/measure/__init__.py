"""Timing what runs here: interleaved rounds, the machine, the device, calibration. A library, not a benchmark."""
