"""Access to S3: objects, contents by their digest, outcomes, and the embedded server."""
