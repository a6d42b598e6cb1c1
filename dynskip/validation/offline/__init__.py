"""Every kernel compiled for GPUs that need not be there, and what it takes read from its machine code and PTX."""
