"""Generated datasets: evidence planted for one expert each (`diagnostic`), and the benchmarks' shapes (`synthetic_benchmark`).

In: a task's name, sizes and a seed. Out: a prepared dataset like any other, the same on every machine.
"""
