"""What carries a cluster: memory, disk and messages of Dask distributed, beside Ray."""
