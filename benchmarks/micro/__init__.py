"""What benchmarks/kernels.py is made of: parameter sets, contenders, timing, pictures."""
