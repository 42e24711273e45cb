"""The benchmark harness: statistics, order, memory meter, cost models, host time, reports, the GPU record."""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import json

import pytest
import torch
from rich.console import Console

import sslkernels as sk
from benchmarks import __main__ as command
from benchmarks import environment, host_time, memory, overview, providers, report
from benchmarks.benchmark import Benchmark, HostCase, discover
from benchmarks.harness import Bar, Effort, Provider, Rejected, Row, Run, interleave, measure, quantile, result_bytes
from benchmarks.kernels.kernel import KernelBenchmark, floor_sums, floors
from benchmarks.ops.mask_tokens import collator
from benchmarks.roofline import Roofs
from sslkernels.core import native

BENCHMARKS = {benchmark.op: benchmark for benchmark in discover()}
CPU = torch.device("cpu")
ROOFS = Roofs(10e9, {"float32": 1e11, "bfloat16": 4e11})


def test_quantile():
    samples = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert quantile(samples, 0.5) == 3.0
    assert quantile(samples, 0.2) == pytest.approx(1.8)
    assert quantile([7.0], 0.8) == 7.0


class CountingTimer:
    """A timer that notes the order of the runs and gives them a fixed time."""

    def __init__(self, **seconds):
        self.order = []
        self.seconds = seconds

    def time(self, run):
        self.order.append(run.call())
        return self.seconds.get(self.order[-1], 0.001)

    def finish(self, marks):
        return marks


def test_rounds_interleave_all_providers():
    runs = {name: Run(lambda name=name: name) for name in "abc"}
    timer = CountingTimer()
    samples = interleave(runs, timer, minimum=6, budget=0.0)
    assert {name: len(times) for name, times in samples.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = [tuple(timer.order[i : i + 3]) for i in range(0, 18, 3)]
    assert all(set(turn) == set("abc") for turn in rounds)
    assert len(set(rounds)) > 1
    again = CountingTimer()
    interleave(runs, again, minimum=6, budget=0.0)
    assert again.order == timer.order


def test_quick_providers_go_on():
    runs = {name: Run(lambda name=name: name) for name in "abc"}
    timer = CountingTimer(a=0.12, b=1.0)
    samples = interleave(runs, timer, minimum=3, budget=0.0, quick_samples=15)
    assert {name: len(times) for name, times in samples.items()} == {"a": 9, "b": 3, "c": 15}


def test_a_time_that_is_known_saves_a_round():
    runs = {name: Run(lambda name=name: name) for name in "ab"}
    timer = CountingTimer(a=1.0, b=2.0)
    samples = interleave(runs, timer, minimum=2, budget=0.0, first={"b": 7.0})
    assert {name: len(times) for name, times in samples.items()} == {"a": 2, "b": 2}
    assert samples["b"][0] == 7.0
    assert timer.order.count("b") == 1


def test_memory_meter_sees_an_allocation():
    size = 64 << 20
    peak, result = memory.peak_extra(lambda: torch.ones(size // 4).sum(), CPU)
    if peak is None:
        pytest.skip("this system has no resettable peak resident set")
    assert result == size // 4
    assert 0.95 * size < peak < 1.5 * size
    small, _ = memory.peak_extra(lambda: None, CPU)
    assert small < 4 << 20


def test_memory_meter_sees_memory_that_a_loop_keeps():
    size, kept = 40 << 20, []

    def call():
        kept.append(torch.ones(size // 4))
        return len(kept)

    peak, result = memory.peak_of_steps(call, lambda: None, CPU)
    if peak is None:
        pytest.skip("this system has no resettable peak resident set")
    assert result == memory.STEPS == 10
    assert 9 * size < peak < 12 * size
    results, _ = memory.peak_of_steps(lambda: torch.ones(size // 4), lambda: None, CPU)
    assert results < 2 * size  # the results of one call at a time


def test_results_that_were_there_before_do_not_count():
    owned, given = torch.empty(8), torch.empty(8)
    run = Run(lambda: (), owned=(owned,))
    assert result_bytes(run, [owned[:4], given, torch.empty(16)], {"x": given}) == 64


@pytest.mark.parametrize(
    "op", [op for op, benchmark in BENCHMARKS.items() if not isinstance(benchmark, KernelBenchmark)]
)
def test_costs_by_hand(op):
    sums = BENCHMARKS[op].hand_sums()
    assert sums
    for case, bytes_, flops in sums:
        assert (case.bytes, case.flops) == (bytes_, flops), case.name


@pytest.mark.parametrize("operator", floors())
def test_floors_by_hand(operator):
    floor = floors()[operator]
    sums = [expected for expected in floor_sums() if expected.floor is floor]
    assert sums
    for _, arguments, bytes_, flops in sums:
        assert floor(*arguments) == (bytes_, flops), arguments


def test_light():
    assert ROOFS.light(10**10, 10**9, "float32") == 1.0
    assert ROOFS.light(10**9, 10**11, "float32") == 1.0


@pytest.mark.skipif(native.extension is None or not native.extension.build_info()["cuda"], reason="no CUDA kernels")
def test_every_operator_with_a_cuda_kernel_has_a_floor():
    registered = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    native_ops = [name for space, _, name in registered if space == "sslkernels_native"]
    assert set(floors()) == {name for name in native_ops if native.why_missing((name,), "CUDA") is None}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("benchmark_", BENCHMARKS.values(), ids=BENCHMARKS)
def test_bars_belong_to_default_cases(benchmark_, device):
    names = [case.name for case in benchmark_.cases(device)]
    assert len(set(names)) == len(names)
    assert {bar.case for bar in benchmark_.bars(device)} <= set(names)


@pytest.mark.parametrize("regime", ["random", "peaked"])
def test_inputs_have_the_given_part_ignored(regime):
    for benchmark_ in (BENCHMARKS["cross_entropy"], BENCHMARKS["linear_cross_entropy"]):
        shape = {"N": 40, "D": 16, "V": 300}
        case = benchmark_.case({key: shape[key] for key in benchmark_.shape_keys}, regime=regime, ignored=0.85)
        inputs = benchmark_.inputs(case, CPU)
        assert (inputs["target"] == -100).sum() == 34
        loss = benchmark_.oracle(case, inputs)[0]
        assert loss > 5 if regime == "random" else loss < 3


def test_masking_rule_check_finds_a_wrong_token():
    masking = BENCHMARKS["mask_tokens"]
    case = masking.case({"B": 64, "T": 64})
    inputs = masking.inputs(case, CPU)
    ids, labels = collator(case, inputs).call()
    assert max(masking.errors(inputs, (ids, labels)).values()) == 0
    labels[3, 0] = inputs["ids"][3, 0]  # a special token
    assert masking.errors(inputs, (ids, labels))["tokens against the rule"] == 1
    assert masking.errors(inputs, (inputs["ids"], torch.full_like(ids, -100)))["counts"] > 0


class Toy(Benchmark):
    """x -> 2 x, by a provider that is right, one that is wrong, one slow, one that raises, one that is absent."""

    op = "double"
    shape_keys = ("V",)
    names = ("x",)
    results = ("y",)
    differentiable = False
    baseline = "right"
    bars_on_error = False
    twin_rows = None
    host = HostCase({"V": 10}, 1e9)

    def cost(self, case):
        return 8 * case.shape["V"], 0

    def cases(self, device):
        return [self.case({"V": v}) for v in (1000, 2000, 4000)]

    def inputs(self, case, device):
        return {"x": torch.ones(case.shape["V"])}

    @staticmethod
    def plain(x):
        return x * 2

    @staticmethod
    def fused(x):
        return x * 2.2

    def providers(self, case, device):
        def rejecting(case, inputs):
            raise Rejected("it takes no odd size")

        return [
            Provider("right", self.run(self.plain)),
            Provider("sslkernels wrong", self.run(self.fused)),
            Provider("slow", self.run(self.plain), patience=0.0),
            Provider("peer rejecting", rejecting),
            Provider("peer missing", rejecting, unavailable="it is not installed"),
        ]

    def bars(self, device):
        return [Bar("slower", self.cases(device)[0].name, providers.time_ratio(providers.OURS, "right"), 1e9)]


@pytest.fixture(scope="module")
def toy_run():
    toy = Toy()
    environment = {"device": "toy", "threads": 1, "date": "today", "commit": "c0ffee", "torch": "2", "triton": "3"}
    result = report.Report({**environment, "python": "3", "extension": "not built", "peers": {}}, ROOFS)
    for case in toy.cases("cpu"):
        rows = measure(toy, case, CPU, ROOFS, toy.providers(case, CPU), Effort(minimum=3, quick_samples=0))
        result.add(case, rows, toy.bars("cpu"))
    result.host_time.append(host_time.measure(toy, CPU, rounds=30))
    return json.dumps(result.to_json())


@pytest.fixture
def toy_report(toy_run):
    return report.Report.from_json(json.loads(toy_run))


def test_a_compiled_provider_can_do_without_an_error():
    calls = []

    class Compiled(Toy):
        def providers(self, case, device):
            def build(case, inputs):
                return Run(lambda: calls.append(case.shape["V"]) or (inputs["x"] * 2,))

            return [Provider("right", self.run(self.plain)), Provider("compiled", build, warmups=1)]

        def twin(self, case):
            return self.case({"V": 10})

    toy = Compiled()
    case = toy.cases("cpu")[0]
    for errors in (True, False):
        calls.clear()
        effort = Effort(minimum=2, compiled_errors=errors)
        right, compiled = measure(toy, case, CPU, ROOFS, toy.providers(case, CPU), effort)
        assert right.errors == {"y": 0.0}
        assert (compiled.errors, 10 in calls) == (({"y": 0.0}, True) if errors else ({}, False))
        assert compiled.n >= 2


def test_measure(toy_report):
    rows = {row.provider: row for row in toy_report.rows if row.case == toy_report.cases[0]["name"]}
    assert rows["right"].error == 0
    assert rows["right"].speedup == 1
    assert rows["right"].n == 3
    assert rows["slow"].n == 1
    assert rows["sslkernels wrong"].error == pytest.approx(0.1, rel=1e-3)
    assert rows["peer rejecting"].status == "rejects: it takes no odd size"
    assert rows["peer missing"].status == "not run: it is not installed"
    light = 8 * 1000 / ROOFS.bandwidth
    assert rows["right"].light == pytest.approx(light / rows["right"].median)


def test_report_is_written_whole(toy_report, tmp_path):
    written = report.write(toy_report, tmp_path)
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.glob("double*.png"))) == 2
    assert (tmp_path / "overview.png").stat().st_size > 10_000
    text = (tmp_path / "results.md").read_text()
    assert "rejects: it takes no odd size" in text
    assert "peer missing" not in text
    assert "## Bars" in text
    assert "| double V=10, float32, fwd |" in text
    read = report.Report.from_json(json.loads((tmp_path / "results.json").read_text()))
    assert read == toy_report


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.md"
    path.write_text("old")

    def interrupted(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.write_atomically(path, interrupted)
    assert [p.name for p in tmp_path.iterdir()] == ["results.md"]
    assert path.read_text() == "old"


def test_combine(toy_report):
    data = toy_report.to_json()
    other = report.Report.from_json(json.loads(json.dumps(data)))
    other.cases, other.rows, other.bars = other.cases[:1], [Row(data["cases"][0]["name"], "right", n=99)], []
    other.host_time = [dataclasses.replace(other.host_time[0], n=99)]
    merged = report.combine([toy_report, other])
    first = [row for row in merged.rows if row.case == data["cases"][0]["name"]]
    assert [row.n for row in first] == [99]
    assert len(merged.cases) == 3
    assert [row.n for row in merged.host_time] == [99]
    other.environment = {**other.environment, "device": "another"}
    with pytest.raises(ValueError, match="different devices"):
        report.combine([toy_report, other])


def test_selection():
    def names(*arguments):
        return [case.name for _, case in command.select(command.parse([*arguments, "--device", "cpu"]))]

    everything = names("--all")
    parts = [names("--part", f"{i}/3") for i in (1, 2, 3)]
    assert sorted([*parts[0], *parts[1], *parts[2]]) == sorted(everything)
    shape = ("--shape", "N=8,D=4,V=100", "--dtype", "bfloat16", "--ignored", "0.7")
    custom = names("--op", "linear_cross_entropy", *shape)
    assert custom == ["linear_cross_entropy N=8 D=4 V=100, bfloat16, fwd+bwd, 70% ignored"]
    glove = "glove_loss N=8 V=100 D=4, bfloat16, fwd+bwd"
    assert names(*shape) == [glove, *custom, "linear_sample N=8 D=4 V=100, bfloat16, fwd"]
    assert names("--op", "cross_entropy", "--shape", "N=8,D=4,V=100") == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_run_has_every_op_in_a_few_cases(device):
    chosen = command.select(command.parse(["--device", device]))
    for benchmark_ in BENCHMARKS.values():
        matrix = [case.name for case in benchmark_.cases(device)]
        mine = [case.name for which, case in chosen if which is benchmark_]
        assert set(mine) <= set(matrix)
        assert len(mine) == len(set(mine)) <= 3
        if not isinstance(benchmark_, KernelBenchmark):
            assert bool(mine) == bool(matrix), benchmark_.op


@pytest.fixture
def finished(monkeypatch, tmp_path, toy_report):
    """The command, whose run is over at once with the toy report; it returns the folders that were written."""
    monkeypatch.setattr(command, "BENCHMARKS", (Toy(),))
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "run", lambda *_: report.Report.from_json(toy_report.to_json()))

    def finished(*arguments):
        assert command.main([*arguments, "--device", "cpu"]) == 0
        return {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("results.json")}

    return finished


@pytest.mark.parametrize("arguments", [[], ["--all"], ["--quick"], ["--op", "double"], ["--host-time"]], ids=str)
def test_a_users_run_writes_into_an_ignored_folder(finished, monkeypatch, arguments):
    monkeypatch.setattr(command, "select", lambda options: [(Toy(), Toy().cases("cpu")[0])])
    assert finished(*arguments) == {"scratch/toy"}
    ignored = (environment.ROOT / ".gitignore").read_text().split()
    assert "benchmarks/results/scratch/" in ignored


def test_publishing_keeps_the_cases_that_were_not_measured(finished, tmp_path, toy_report):
    before = json.loads(json.dumps(toy_report.to_json()))
    gone = before["cases"][0] | {"name": "double V=3, float32, fwd"}  # no case of the matrix any more
    kept = before["cases"][0]
    before["cases"] = [kept, gone]
    before["environment"]["date"] = kept["date"] = "before"
    before["environment"]["commit"] = kept["commit"] = "old"
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "results.json").write_text(json.dumps(before))
    toy_report.cases, toy_report.rows = toy_report.cases[1:], [r for r in toy_report.rows if r.case != kept["name"]]
    assert finished("--publish") == {"toy"}
    now = json.loads((tmp_path / "toy" / "results.json").read_text())
    assert [(case["shape"]["V"], case["date"]) for case in now["cases"]] == [
        (1000, "before"),
        (2000, "today"),
        (4000, "today"),
    ]
    assert (now["environment"]["date"], now["environment"]["commit"]) == ("today", "c0ffee")
    assert {row["case"] for row in now["rows"]} == {case["name"] for case in now["cases"]}
    assert "2000" in (tmp_path / "toy" / "results.md").read_text()


@pytest.mark.parametrize("other", [["--quick"], ["--output", "x"], ["--shape", "N=8,D=4,V=100"]], ids=str)
def test_only_cases_of_the_matrix_are_published(other, capsys):
    with pytest.raises(SystemExit):
        command.parse(["--publish", *other])
    assert "--publish" in capsys.readouterr().err


def test_the_overview_has_a_line_an_op(toy_report, tmp_path, capsys):
    [line] = overview.lines(toy_report)
    rows = {(row.case, row.provider): row for row in toy_report.rows}
    largest = max(toy_report.cases, key=lambda case: rows[case["name"], "right"].median)["name"]
    assert line.op == "double"
    assert line.case == overview.setting(largest)
    assert (line.eager, line.ours) == (rows[largest, "right"].median, rows[largest, "sslkernels wrong"].median)
    assert line.best_other == rows[largest, "slow"].median
    assert line.floor == next(case["light"] for case in toy_report.cases if case["name"] == largest)
    assert line.smallest == ("V=10", 1 / toy_report.host_time[0].ratio)
    shown = overview.cells(line)
    assert shown["speed-up"] == f"{line.eager / line.ours:.1f} x"
    assert shown["of the floor"] == f"{line.floor / line.ours:.0%}"
    for width in (80, 200):
        overview.show(toy_report, Console(width=width))
        printed = capsys.readouterr().out
        assert shown["sslkernels"] in printed
        assert "limits are met" in printed
        assert max(map(len, printed.splitlines())) <= width


def test_every_public_function_has_a_host_time_case():
    public = {name for name in sk.__all__ if name.islower() and inspect.isfunction(getattr(sk, name))}
    public = public - {"available_backends", "use_backend", "row_ids_of_rank"} | {"AliasTable"}
    assert public == {benchmark.op for benchmark in BENCHMARKS.values() if benchmark.host is not None}


def test_host_time_is_measured_on_one_thread():
    threads, seen = torch.get_num_threads(), set()

    class Watched(Toy):
        @staticmethod
        def fused(x):
            seen.add(torch.get_num_threads())
            return x * 2

    row = host_time.measure(Watched(), CPU, rounds=30)
    assert seen == {1}
    assert torch.get_num_threads() == threads
    assert row.n == 30
    assert row.met
    assert 0 < row.ours[0] <= row.ours[1] <= row.ours[2]
    assert row.ratio == row.ours[1] / row.eager[1]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="it needs glibc 2.33")
def test_memory_in_a_fragmented_heap():
    """A tensor that fills a hole of the heap stays in the resident set when it is freed."""
    sizes = [(megabytes << 20) // 4 for megabytes in range(3, 9)]
    del [torch.ones(max(sizes))][:]  # glibc maps no such block any more once one was freed
    blocks = [torch.ones(size) for size in sizes for _ in range(2)]
    del blocks[::2]
    left = sizes.copy()
    peak, _ = memory.peak_of_steps(lambda: torch.ones(left.pop(0) if left else 1), lambda: None, CPU)
    assert abs(peak - 4 * max(sizes)) < 1 << 20


@pytest.mark.parametrize(("slower_below", "expected"), [(10, "V=10"), (50, "V=80"), (1 << 20, "> V=2560")])
def test_level_from_is_the_first_size_that_is_not_slower(monkeypatch, slower_below, expected):
    def alternate(benchmark, case, *_, **__):
        return [1.0, 2.0 if case.shape["V"] < slower_below else 1.0, 3.0], [1.0, 1.0, 1.0]

    monkeypatch.setattr(host_time, "_alternate", alternate)
    assert host_time.measure(Toy(), CPU, rounds=3).level_from == expected


def test_selection_of_host_time():
    def ops(*arguments):
        return [b.op for b in command.host_cases(command.parse([*arguments, "--device", "cpu"]))]

    assert ops("--op", "free_energy", "--host-time") == ops("--op", "free_energy", "--quick") == ["free_energy"]
    assert len(ops()) == len(ops("--part", "1/3")) > 20
    assert ops("--part", "2/3") == ops("--case", "x") == ops("--provider", "cpu") == []
