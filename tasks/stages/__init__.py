"""The stages of a group, one file a stage: `run(params, …)` loads, calls the core and saves."""
