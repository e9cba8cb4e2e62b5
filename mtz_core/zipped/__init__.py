"""The zipped network: who owns which weights, the module, its report and its files."""
