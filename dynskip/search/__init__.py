"""Which layers to skip: paths of each budget, searched on a model's own prompts, and judged on others."""
