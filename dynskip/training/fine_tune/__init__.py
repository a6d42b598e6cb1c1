"""Fine-tuning a checkpoint at full depth and along paths."""
