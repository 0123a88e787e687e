"""The benchmarks of the paper's tables, a file each."""
