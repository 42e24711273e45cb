"""Calls every native operator that the public calls use, with each of its integer tensors replaced by indices far out
of range, each in its own process; prints the calls that a signal ended."""

import os

import torch
from public_calls import CALLS, differentiable

import sslkernels as sk

WRONG = (10**9, -(10**9))


def recorded_calls():
    """(name, operator, arguments) of the native operators, one call for each set of tensors that are given."""
    namespace, found = torch.ops.sslkernels_native, {}

    def record(name, packet):
        def call(*args):
            given = tuple(isinstance(a, torch.Tensor) for a in args)
            if (name, given) not in found:
                found[name, given] = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
            return packet(*args)

        setattr(namespace, name, call)

    names = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if "sslkernels_native" in n}
    packets = {name: getattr(namespace, name) for name in names}
    for name, packet in packets.items():
        record(name, packet)
    for call in CALLS.values():
        with sk.use_backend("cpu"):
            outputs = differentiable(call.run(*call.leaves("cpu")))
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    x, codes = torch.randn(5, 3), torch.randn(4, 3)
    empty = torch.empty(5, dtype=torch.float64)
    found["gather_codes", ()] = [x, codes, torch.zeros(5, dtype=torch.int64), empty, torch.empty(5, 3), torch.empty(5)]
    return [(name, packets[name], args) for (name, _), args in found.items()]


def ends_by_a_signal(operator, args) -> bool:
    child = os.fork()
    if child == 0:
        try:
            operator(*args)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = 0
    for name, operator, args in recorded_calls():
        for i, given in enumerate(args):
            if not isinstance(given, torch.Tensor) or given.dtype not in (torch.int64, torch.int32):
                continue
            for value in WRONG:
                wrong = given.clone().fill_(value)
                count += 1
                if ends_by_a_signal(operator, [*args[:i], wrong, *args[i + 1 :]]):
                    print(f"{name}, argument {i}: {value}")
    assert count > 100
