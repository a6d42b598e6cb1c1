"""Finding the constants that kernels run fastest with on a device, and writing them to its table."""
