"""The contestants of benchmarks/performance.py, one file for each library."""
