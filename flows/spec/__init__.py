"""What a fleet declares: its file, overrides, the snapshot of a run, jobs. Does not use Prefect."""
