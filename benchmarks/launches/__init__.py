"""Calls of the Triton launchers, a file a family: together they launch every specialisation of a kernel that matters.

`benchmarks.triton_launches` records what they launch. They are written for tensors on the device "meta", which have no
memory: any size is free, and so are the launchers' own torch operations.
"""
