"""The .beton file: its format and its writer."""
