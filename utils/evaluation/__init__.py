"""``tool.py --tools eval`` (`evaluate`): measures, the rules by which they are taken, data sets' figures and tables."""
