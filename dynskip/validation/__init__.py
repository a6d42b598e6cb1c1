"""Every op against float64, with the error that is allowed."""
