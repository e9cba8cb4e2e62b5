"""Jobs and their executors: threads of this process, a Dask cluster, a Prefect work pool."""
