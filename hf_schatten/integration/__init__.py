"""Trainer and Accelerate: registration, factory, callback, checkpoints. The only importer of Trainer."""
