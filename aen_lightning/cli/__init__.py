"""The ``aen`` command: one file a command, and no arithmetic.

The module of a command that is a plain function imports no library at its top, also not for its annotations
(jsonargparse imports what stands under ``TYPE_CHECKING``): so help and wrong use are answered at once.
"""
