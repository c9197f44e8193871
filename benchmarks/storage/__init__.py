"""What persist's files cost, beside the classic HDF5 designs. ``python -m benchmarks.storage`` measures it."""
