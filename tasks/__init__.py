"""The stages of the pipeline, one file each, and the doors to files, S3 and MLflow."""
