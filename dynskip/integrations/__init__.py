"""What other programs load of dynskip, by their own means."""
