"""What the Makefile runs beside tests and benchmarks: pages that are written from results and code, notebooks, wheels."""
