"""Training scripts, one in each folder, and in `recipe_parts` what they share. Not part of the installed package.

Every module is imported by its full name, such as `recipes.lora_sft.card`, so that modules of two recipes never take
each other's place. Python finds that name from the repository's root; but ``python recipes/NAME/NAME.py`` may start
anywhere, and puts nothing on Python's path but the script's own folder. There, a module `recipes` that has a
``__path__``, which makes it a package, leads back to this folder.
"""
