"""Right, fast and planned on one GPU, in minutes and without a network: `python -m benchmarks.gpu`."""
