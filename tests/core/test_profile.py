"""The profile of a call: parsing ncu's output, and a dry run on the CPU."""

from __future__ import annotations

from benchmarks import profile

CSV = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum","launch__registers_per_thread"
"","","","ns","byte","register/thread"
"0","1","void sslkernels::(anonymous namespace)::mask_tokens_kernel<long, 1>(Parameters)","2,000","4,000,000","40"
"1","1","gemm","6000","n/a","168"
"""


def test_rows_of_ncu():
    rows = profile.parse_rows(CSV)
    assert [row.metrics["gpu__time_duration.sum"] for row in rows] == [2000, 6000]
    assert [row.metrics["dram__bytes.sum"] for row in rows] == [4e6, None]
    assert rows[1].metrics["sm__throughput.avg.pct_of_peak_sustained_elapsed"] is None
    header, first, second, total = profile.table("t", rows)
    assert len(header) == len(first) == len(second) == len(total)
    assert first[:4] == ["mask_tokens_kernel<long, 1>", "2.0 us", "25%", "2000"]
    assert second[:4] == ["gemm", "6.0 us", "75%", "0"]
    assert total[:4] == ["all", "8.0 us", "100%", "500"]
    assert profile.parse_rows("==ERROR== nothing\n") == []


def test_dry_run(capsys):
    arguments = ["--dry-run", "--quick", "--device", "cpu", "--op", "cross_entropy", "--provider", "reference"]
    assert profile.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("ncu --profile-from-start off") == 2
    assert "--number 1 --quick --device cpu --op cross_entropy --provider reference" in printed.replace("\n", " ")
