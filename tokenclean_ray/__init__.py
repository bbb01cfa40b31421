"""Token cleaning for supervised fine-tuning data, at the scale of a Ray cluster."""

__version__ = "0.1.0"
