"""``tool.py --tools test`` (`segment`): masks of whole videos, for data sets and for a user's own video."""
