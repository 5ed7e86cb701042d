"""Every touch of a private name of torch, SAELens, Lightning, transformers or datasets, and of a seam they do not promise.

One function or import a seam. ``tests/test_compat.py`` has a test for each, which fails when the library moves it. Nothing else in
the package may use a name with a leading underscore that is not our own.
"""
