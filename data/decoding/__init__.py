"""Stored bytes to crops: crop positions, and the decoders that cut them out."""
