"""The ``aen`` command: one file a command, and no arithmetic."""
