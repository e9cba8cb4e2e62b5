"""Jobs, and what runs them: threads of this process, a Dask cluster, a Prefect work pool."""
