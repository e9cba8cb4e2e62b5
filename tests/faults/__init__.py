"""The pipeline while processes are killed and a storage misbehaves."""
