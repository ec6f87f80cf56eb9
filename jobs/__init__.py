"""Entry points that put the parts together for one purpose each: `python -m jobs.<name>`, or `ray job submit`."""
