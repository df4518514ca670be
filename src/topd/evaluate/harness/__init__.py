"""Local tasks for lm-evaluation-harness: its YAML files, and the functions that they name."""
