"""The .beton file: its format, and how it is written."""
