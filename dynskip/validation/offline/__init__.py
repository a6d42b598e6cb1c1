"""Every kernel compiled for GPUs that need not be there, and its machine code read."""
