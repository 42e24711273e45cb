"""`python -m benchmarks.gpu first` and `second`: they validate every kernel on a GPU that is there for minutes.

`plan.py` says what they do, `runner.py` how: each step is a process with a time limit, and what it found is in the
folder OUT before the next begins. `record.py` joins what came back, here, into benchmarks/results.
"""
