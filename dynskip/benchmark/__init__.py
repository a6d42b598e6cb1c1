"""What steps along paths take on this machine, beside what they should take."""
