"""Writes what the pages say that can be read off the results and the code: `python -m scripts.pages`."""
