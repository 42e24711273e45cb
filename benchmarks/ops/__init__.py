"""One file an op: its cases, its providers and its bars."""
