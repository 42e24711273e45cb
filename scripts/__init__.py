"""What the Makefile runs beside tests and benchmarks: pages written from results and code, notebooks, wheels."""
