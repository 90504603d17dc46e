"""Benchmarks of ``make bench``: each module has ``run() -> {"name", "figures", "ratios"}``; peers are interleaved in the same run."""
