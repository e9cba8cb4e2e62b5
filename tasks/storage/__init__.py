"""The doors to S3."""
