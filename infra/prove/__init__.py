"""The proof: what the project promises, and the tests and runs that show it.

Read ``lines`` (what is promised and what shows it) -> ``run`` (running that, with figures) -> ``report`` (text, JSON, one HTML page), and
``matrix`` (every fault of every part, what happens then, and the test that shows it; ``docs/faults.md`` is generated from it).
"""
