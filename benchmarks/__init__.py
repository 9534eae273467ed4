"""Benchmarks: ``python -m benchmarks.bench_<op>`` from the root of the repository."""
