"""What every recipe does alike: its command line, its model card, and the order of a run.

A recipe's script adds the folder of recipes to Python's path and imports from here.
"""
