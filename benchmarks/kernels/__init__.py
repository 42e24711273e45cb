"""Single kernels, a file a family, each against the least memory traffic and arithmetic it needs."""
