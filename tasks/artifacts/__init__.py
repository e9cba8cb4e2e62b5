"""Values of the core and their files, written whole or not at all."""
