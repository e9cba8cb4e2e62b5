"""Results of a stage, of a group, of a fleet: shown, recorded, reported."""
