"""Tasks of ours for lmms-eval: YAML files and the functions that they name."""
