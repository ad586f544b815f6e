"""The engines of the benchmark, each in a process of its own."""
