"""`python -m benchmarks.gpu first` and `second`: they validate every kernel on a GPU that is there for minutes.

`plan.py` lists the steps, `runner.py` runs them: each is a process with a time limit, and its findings are in the
folder OUT before the next one begins. `record.py` joins them into benchmarks/results, back here.
"""
