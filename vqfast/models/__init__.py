"""One file per model: its configuration, presets and module."""
