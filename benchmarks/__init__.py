"""One table each: `python -m benchmarks.stream`."""
