"""What every recipe does alike: its command line, its model card, and the order of a run."""
