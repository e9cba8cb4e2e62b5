"""One group, or one model: its workspace, its DVC pipeline, and the flows that bring them up to date."""
