"""What a layer, a step and a stream take: formulas, calibrated tables, where they are kept."""
