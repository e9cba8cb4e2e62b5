"""The stages of the pipeline, one file each, and all access to files, S3 and MLflow."""
