"""Load weights, also those of other projects, converting names and shapes. Nothing in a file is executed."""
