"""Benchmarks of this package against what one would use without it, on the machine in front of you: `dsv3 bench`.

Each module has `run(...) -> Result` and `render(result) -> str`. Numbers are of this machine, now; bars are on ratios.
"""
