"""Measurements, grouped by the question that they answer. Not part of the installed package.

Every module is imported by its full name, such as `benchmarks.scaling.scaling_model`; a module `benchmarks` beside the
scripts of a folder leads back to this one, as in `recipes`, where the reason is.
"""
